"""A web server on loopback with Range support that fails on command; it also passes for S3, GCS and Hugging Face."""

from __future__ import annotations

import re
import threading
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """What one answer does wrong: any of these."""

    status: int | None = None  # instead of a body
    retry_after: str | None = None
    cut_after: int | None = None  # bytes of the body, then the connection is closed
    stall_after: int | None = None  # bytes of the body, then silence
    delay_s: float = 0.0  # before each of ten pieces of the body
    ignore_range: bool = False
    shift: int = 0  # send the range that begins so many bytes later
    content: bytes | None = None  # instead of the file's
    no_length: bool = False  # the end of the body is that of the connection


class Request(NamedTuple):
    method: str
    path: str  # with query
    range: str | None
    authorization: str | None


class FaultyServer:
    """Serves `files` by the path below `url`, or else by the last part of it; and `pages` by their whole path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.pages: dict[str, bytes] = {}
        self.always: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.stopping = threading.Event()
        self._planned: dict[str, deque[Fault]] = defaultdict(deque)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}/data"

    def plan(self, name: str, *faults: Fault) -> None:
        """Let the next answers for a file fail, one fault each; then it is served well."""
        self._planned[name].extend(faults)

    def fault(self, name: str) -> Fault:
        return self._planned[name].popleft() if self._planned[name] else self.always.get(name, Fault())

    def ranges(self, name: str) -> list[str | None]:
        """Return the Range headers of the requests for a file, in the order they came."""
        return [one.range for one in self.requests if file_name(one.path) == name and one.method == "GET"]

    def __enter__(self) -> FaultyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def file_name(path: str) -> str:
    path = unquote(urlsplit(path).path)
    return path.partition("/data/")[2] or path.rpartition("/")[2]


def _handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.requests.append(
                Request(self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization"))
            )
            if (page := server.pages.get(unquote(urlsplit(self.path).path))) is not None:
                self.answer(200, page, {"Content-Type": "application/json"})
                return
            name = file_name(self.path)
            fault = server.fault(name)
            content = server.files.get(name) if fault.content is None else fault.content
            extra = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            if fault.status is not None or content is None:
                self.answer(fault.status or 404, b"no such thing", extra)
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked is None or fault.ignore_range:
                self.answer(200, content, extra, fault)
                return
            first = int(asked[1]) + fault.shift
            last = min(int(asked[2] or len(content) - 1) + fault.shift, len(content) - 1)
            if first >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            extra["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], extra, fault)

        do_HEAD = do_GET  # noqa: N815 (as http.server names it)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.do_GET()

        def answer(self, status: int, body: bytes, extra: dict[str, str], fault: Fault | None = None) -> None:
            fault = fault or Fault()
            self.send_response(status)
            for name, value in extra.items():
                self.send_header(name, value)
            if fault.no_length:
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            end = fault.cut_after if fault.stall_after is None else fault.stall_after
            step = max(len(body) // 10, 1) if fault.delay_s else len(body) or 1
            sent = body[:end]
            for at in range(0, len(sent), step):
                server.stopping.wait(fault.delay_s)
                self.wfile.write(sent[at : at + step])
            if fault.stall_after is not None:
                self.wfile.flush()
                server.stopping.wait()
            if end is not None:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client gave up, as it should
                super().handle()

    return Handler
