"""`stylepipe report`: a page that shows how runs fare, as a file or served while they train."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stylepipe.errors import UserError
from stylepipe.files import atomic_path
from stylepipe.report.page import MEGABYTE, make_report, render
from stylepipe.report.run import check_runs
from stylepipe.report.server import HOST, LiveReport, make_server

DEFAULT_NAME = "report.html"
DEFAULT_PORT = 8321
MIN_MB = 0.5


@dataclass(frozen=True)
class ReportOptions:
    """Write a page of a run's images over time, curves, metrics and settings; of several runs, side by side.

    The page is one file that needs no network.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="HTML")] = None
    """The page. Default: report.html in the run's folder, of several runs in this one."""
    max_mb: float = 4.0
    """Megabytes of the page at most. Pictures that do not fit are made smaller or fewer, and the page says so."""
    serve: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the page at a port of this machine instead, for browsers of this machine only, and keep it up to date."""
    port: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """With --serve: the port, or 0 for any that is free. Default: 8321."""


def main(argv: list[str]) -> None:
    """Write the page and print where it is; or print its address and serve it until Ctrl-C."""
    options = tyro.cli(ReportOptions, args=argv, prog="stylepipe report")
    if not options.serve:
        print(report(options))
        return
    if options.out is not None:
        print(report(options))
    serve(options)


def report(options: ReportOptions) -> Path:
    """Write the page and return its path.

    Raises:
        UserError: an option does not make sense, a folder is no run, or the page cannot be written.
    """
    if options.port is not None and not options.serve:
        raise UserError(f"--port {options.port}: a port is of --serve; give that too, or leave it out")
    folders, max_bytes = check_runs(options.runs), _max_bytes(options)
    out = options.out or (folders[0] if len(folders) == 1 else Path()) / DEFAULT_NAME
    if out.is_dir():
        out = out / DEFAULT_NAME
    page = render(make_report(folders, max_bytes))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as temporary:
            temporary.write_text(page, encoding="ascii")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; give another place with --out") from error
    return out


def serve(options: ReportOptions) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: an option does not make sense, a folder is no run, or the port cannot be had.
    """
    live = LiveReport(check_runs(options.runs), _max_bytes(options))
    with make_server(live, DEFAULT_PORT if options.port is None else options.port) as server:
        live.look()
        print(f"http://{HOST}:{server.server_address[1]}/  (Ctrl-C ends)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def _max_bytes(options: ReportOptions) -> int:
    if not (math.isfinite(options.max_mb) and options.max_mb >= MIN_MB):
        raise UserError(f"--max-mb {options.max_mb:g}: expected at least {MIN_MB:g}, such as 4")
    return int(options.max_mb * MEGABYTE)
