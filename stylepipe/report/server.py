"""The report as a page of this machine that follows runs while they train."""

from __future__ import annotations

import errno
import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stylepipe.errors import UserError
from stylepipe.report.page import Report, live_data, make_report, render
from stylepipe.report.pictures import Cache, Picture
from stylepipe.report.run import fingerprint

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"  # the report is for who is on this machine
NAMES = {HOST, "localhost"}
_TEXT = {"html": "text/html; charset=utf-8", "json": "application/json"}
_WAITING = (
    '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    '<meta http-equiv="refresh" content="1"><title>stylepipe</title>'
    '<p style="font: 16px system-ui, sans-serif; margin: 40px">The runs are being read ...</p>'
)


class LiveReport:
    """Holds the newest report, and makes another one beside it when a file of the runs has changed.

    Args:
        folders: of the runs.
        max_bytes: of the page.
        make: makes a report; for tests.
    """

    def __init__(self, folders: Sequence[Path], max_bytes: int, make: Callable[..., Report] = make_report) -> None:
        self._folders, self._max_bytes, self._make = folders, max_bytes, make
        self._cache = Cache()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._seen: object = None
        self.report: Report | None = None
        self.problem = ""
        self._pictures: dict[str, Picture] = {}

    def look(self) -> None:
        """Have the files looked at, unless that is being done already; returns at once."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._refresh, daemon=True)
                self._thread.start()

    def picture(self, key: str) -> Picture | None:
        """Return a picture of the newest report, or of the one before: a page may not know the newest yet."""
        return self._pictures.get(key)

    def _refresh(self) -> None:
        try:
            seen = [fingerprint(folder) for folder in self._folders]
            if seen == self._seen and not self.problem:
                return
            report = self._make(self._folders, self._max_bytes, self._cache)
        except UserError as error:
            self.problem = str(error)
        except Exception as error:  # the next look may go well; the page before stays
            logger.warning("the report could not be made: %s", error, exc_info=True)
            self.problem = f"The report could not be made ({type(error).__name__}: {error}); the terminal says more."
        else:
            before = self.report.pictures if self.report else {}
            self._pictures = before | report.pictures
            self._seen, self.report, self.problem = seen, report, ""


def make_server(live: LiveReport, port: int) -> ThreadingHTTPServer:
    """Open a port of this machine, 0 for any that is free.

    Raises:
        UserError: it is in use, or not ours to take.
    """

    class Handler(_Handler):
        report = live

    try:
        return _Server((HOST, port), Handler)
    except OverflowError as error:
        raise UserError(f"--port {port}: expected a number from 0 to 65535") from error
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is in use" if error.errno == errno.EADDRINUSE else "may not be taken by this user"
        raise UserError(f"--port {port}: {why}; give another, or --port 0 for any that is free") from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet where a browser has hung up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    report: LiveReport

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host not in NAMES:  # a page of elsewhere whose name was pointed at this machine
            self._answer(HTTPStatus.FORBIDDEN, _TEXT["html"], b"this server answers to 127.0.0.1 and localhost only")
            return
        path = self.path.partition("?")[0]
        live = self.report
        report = live.report
        if path == "/":
            live.look()
            page = render(report, live=True) if report else _WAITING
            self._answer(HTTPStatus.OK, _TEXT["html"], page.encode("ascii"))
        elif path == "/version.json":
            live.look()
            version = report.data["made"] if report else None
            self._answer(HTTPStatus.OK, _TEXT["json"], _json({"version": version, "problem": live.problem}))
        elif path == "/data.json" and report:
            self._answer(HTTPStatus.OK, _TEXT["json"], live_data(report).encode("ascii"))
        elif path.startswith("/picture/") and (picture := live.picture(path.removeprefix("/picture/"))):
            self._answer(HTTPStatus.OK, picture.mime, picture.content, cached=True)
        else:
            self._answer(HTTPStatus.NOT_FOUND, _TEXT["html"], b"not found")

    def log_message(self, format: str, *args: Any) -> None:
        """Leave the terminal to what matters."""

    def _answer(self, status: HTTPStatus, kind: str, content: bytes, cached: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "private, max-age=86400, immutable" if cached else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        # No page of elsewhere, which this browser shows as well, may show this one or its pictures within itself.
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(content)


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode("ascii")
