"""What a run says while it runs: a live bar or plain lines, log.txt and stats.jsonl."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from stylepipe.files import atomic_path, locked, silence
from stylepipe.parsing import parse_json
from stylepipe.run_files import LOG_FILE, METRICS_FILE, STATS_FILE

BAR_FORMAT = "{percentage:3.0f}% |{bar}| {n:.3f}/{total:g} kimg, {rate_inv_fmt}, {remaining} left{postfix}"


class Progress:
    """Shows how far the training is: a live bar in a terminal, one plain line per tick elsewhere.

    Where nobody can read it any more, as behind a `tee` that has ended or on a full disk, it falls silent.

        with Progress(total_kimg, images_seen) as progress:
            progress.update(images_seen)                      # after each step
            progress.tick(line, {"G": 0.7, "D": 1.1})         # after each tick

    Args:
        total_kimg: length of the training.
        images_seen: where it starts or goes on.
        shown: False on every process but the main one: then nothing is printed.
        stream: where to print; by default standard error for the bar and standard output for lines.
    """

    def __init__(
        self, total_kimg: float, images_seen: int = 0, *, shown: bool = True, stream: TextIO | None = None
    ) -> None:
        self._shown = shown
        self._lines = stream or sys.stdout
        self._screen = screen = stream or sys.stderr
        self._bar: tqdm[None] | None = None
        if shown and screen.isatty():
            with self._unless_nobody_reads():
                self._bar = tqdm(
                    total=total_kimg,
                    initial=images_seen / 1000,
                    unit="kimg",
                    bar_format=BAR_FORMAT,
                    dynamic_ncols=True,
                    leave=False,
                    file=screen,
                    smoothing=0.05,  # a mean over the last few dozen steps: lazy regularizers make single ones uneven
                )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, images_seen: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            with self._unless_nobody_reads():
                self._bar.update(images_seen / 1000 - self._bar.n)

    def tick(self, line: str, losses: Mapping[str, float]) -> None:
        """Show the newest losses beside the bar; without a bar, print the line."""
        with self._unless_nobody_reads():
            if self._bar is not None:
                self._bar.set_postfix_str("  ".join(f"{name} {value:.3f}" for name, value in losses.items()))
            elif self._shown:
                print(line, file=self._lines, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        with self._unless_nobody_reads():
            if self._bar is not None:
                self._bar.write(text, file=self._bar.fp)
            elif self._shown:
                print(text, file=self._lines, flush=True)

    def close(self) -> None:
        """Wipe the bar."""
        if self._bar is not None:
            with self._unless_nobody_reads():
                self._bar.close()
            self._bar = None

    @contextmanager
    def _unless_nobody_reads(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            stream = self._lines if self._bar is None else self._screen
            self._shown, self._bar = False, None
            with suppress(OSError, ValueError):  # it may be closed, or none of the system's
                silence(stream)


class _Lines:
    """A file of lines, each on its way to the disk when `write` returns; what a full disk does not take is kept.

    Attributes:
        failure: why the latest lines could not be written, if they could not.
    """

    def __init__(self, path: Path, mode: str) -> None:
        self._file = open(path, f"{mode}b", buffering=0)  # noqa: SIM115 - it is open for as long as the run
        self._left = b""
        self.failure: OSError | None = None

    def write(self, line: str) -> None:
        self._left += line.encode() + b"\n"
        self.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()

    def flush(self) -> None:
        """Try to write what is kept."""
        self.failure = None
        try:
            while self._left:
                self._left = self._left[self._file.write(self._left) :]
        except OSError as error:
            self.failure = error


class RunLog:
    """Appends to a run's log.txt and stats.jsonl; every line is on its way to the disk when the call returns.

    What cannot be written is kept, and written as soon as it can.

    Where a run begins or goes back, metrics.jsonl follows.

    Each line of log.txt begins with the kimg at which it was written, each object of stats.jsonl with images_seen.

    Args:
        out: the run's folder, which exists.
        resume_from_images_seen: drop what an interrupted run wrote later than this; None starts the files anew.
    """

    def __init__(self, out: Path, resume_from_images_seen: int | None = None) -> None:
        self._out = out
        self._open(resume_from_images_seen)

    def rewind(self, images_seen: int) -> None:
        """Drop what was written later than this: the training goes on from there."""
        before = (self._log, self._stats)
        for file in before:
            file.flush()
        self._open(images_seen)
        for file in before:
            file.close()

    @property
    def failure(self) -> OSError | None:
        """Why the latest lines could not be written, if they could not."""
        return self._log.failure or self._stats.failure

    def line(self, text: str, images_seen: int | None = None) -> None:
        """Append text to log.txt, each of its lines with its kimg: by default that of the last `stats`."""
        kimg = (self.images_seen if images_seen is None else images_seen) / 1000
        for part in text.splitlines() or [""]:
            self._log.write(f"{kimg:10.3f} | {part}".rstrip())

    def stats(self, images_seen: int, values: Mapping[str, float | str]) -> None:
        """Append one JSON object to stats.jsonl; numbers that are not finite become null, which every reader takes."""
        self.images_seen = images_seen
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._stats.write(json.dumps({"images_seen": images_seen, **plain}, allow_nan=False))

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        self._stats.close()

    def _open(self, resume_from_images_seen: int | None) -> None:
        self.images_seen = resume_from_images_seen or 0
        log, stats, metrics = (self._out / name for name in (LOG_FILE, STATS_FILE, METRICS_FILE))
        with locked(self._out):
            if resume_from_images_seen is None:
                metrics.unlink(missing_ok=True)
            else:
                _drop_later_lines(metrics, _stats_position, resume_from_images_seen)
        if resume_from_images_seen is not None:
            _drop_later_lines(log, _log_position, resume_from_images_seen)
            _drop_later_lines(stats, _stats_position, resume_from_images_seen)
        mode = "w" if resume_from_images_seen is None else "a"
        self._log, self._stats = _Lines(log, mode), _Lines(stats, mode)


def append_measured(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append objects to a metrics.jsonl, to which a training and `stylepipe evaluate` may write at once.

    Numbers that are not finite become null, and half a line that a killed process has left is ended first.
    """
    with locked(path.parent), open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        for line in lines:
            results = {name: value if math.isfinite(value) else None for name, value in line["results"].items()}
            file.write(json.dumps({**line, "results": results}, allow_nan=False).encode() + b"\n")


def _log_position(line: str) -> int:
    """Read the images seen from a line of log.txt; raise a ValueError for a damaged one."""
    return round(float(line.partition("|")[0]) * 1000)


def _stats_position(line: str) -> int:
    """Read the images seen from a line of stats.jsonl or metrics.jsonl; raise a ValueError for a damaged one."""
    return int(parse_json(line)["images_seen"] or 0)  # networks from elsewhere do not say


def _drop_later_lines(path: Path, position: Callable[[str], int], images_seen: int) -> None:
    """Keep the whole lines up to images_seen: a killed process may have left later ones, and half of one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and position(line) <= images_seen:
                kept.append(line)
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
