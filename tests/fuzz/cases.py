"""One case: files that may hold anything are read; they are used or refused in one sentence, soon, in little memory."""

from __future__ import annotations

import faulthandler
import io
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from damage import Files
from targets import PICTURE, Target

from stylepipe.errors import UserError

MAX_SECONDS = 10
MAX_MEMORY = 256 << 20  # bytes that one case may take at once
MAX_ADDRESSES = 4 << 30  # bytes that a case may ask for, used or not
MAX_MESSAGE = 1000  # characters beside the path
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "pickle.", "socket.connect")


@dataclass(frozen=True)
class Case:
    """What became of a case.

    Attributes:
        message: with what it was refused; None if it was not.
        wrong: what should not have happened; empty if nothing.
        memory: bytes that it took at once.
    """

    message: str | None
    wrong: str
    seconds: float
    memory: int


class Reading:
    """Reads cases of a target in a folder of its own, one after the other.

    Attributes:
        valid: files that are as they should be.
    """

    def __init__(self, target: Target, folder: Path) -> None:
        self._target, self.place, self._out = target, folder / "case", folder / "out"
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        target.make(self.place)
        paths = sorted(path for path in self.place.rglob("*") if path.is_file())
        self.valid: Files = {str(path.relative_to(self.place)): path.read_bytes() for path in paths}
        self._put(self.valid)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            target.read(self.place, self._out)  # it can be read; and what is imported late is imported

    def read(self, files: Files) -> Case:
        """Read files."""
        self._put(files)
        watch = _watch()
        start, memory = time.monotonic(), _Memory()
        message, wrong = None, ""
        try:
            quiet = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
            with watch.over(self.place.parent), _few_addresses(), _in_time(), quiet[0], quiet[1]:
                self._target.read(self.place, self._out)
        except UserError as error:
            message = str(error)
            wrong = unclear(message, self.place)
        except _TooSlowError:
            wrong = f"took more than {MAX_SECONDS} s\n{traceback.format_exc()}"
        except Exception:
            wrong = traceback.format_exc()
        taken = memory.taken()
        if taken > MAX_MEMORY:
            wrong = f"took {taken >> 20:,} MiB\n{wrong}"
        if watch.events:
            wrong = f"did what nothing that is read may cause: {watch.events}\n{wrong}"
        return Case(message, wrong, time.monotonic() - start, taken)

    def _put(self, files: Files) -> None:
        """Have these files in the folder, and nothing else, and nothing in that of results."""
        shutil.rmtree(self.place)
        shutil.rmtree(self._out, ignore_errors=True)
        self._out.mkdir()
        for name, content in files.items():
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def unclear(message: str, place: Path) -> str:
    """Return what is wrong with a message: nothing if it is one sentence that names the file or the option."""
    if not message.isprintable():
        return f"control characters in the message: {message[:MAX_MESSAGE]!r}"
    if str(place) not in message and not message.startswith((PICTURE, "--config ", "--landmarks ")):
        return f"the message names no file: {message[:MAX_MESSAGE]}"
    if len(message.replace(str(place), "")) > MAX_MESSAGE:
        return f"a message of {len(message):,} characters: {message[:MAX_MESSAGE]}"
    return ""


class _TooSlowError(BaseException):
    """A case takes too long; not for `except Exception`."""


class _Memory:
    """Finds out how much more memory the process had at once since then."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        self._before = self._peak()

    def taken(self) -> int:
        return self._peak() - self._before

    def _peak(self) -> int:
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


class _Watch:
    """Notes what nothing that is read may cause: programs, pickles, connections, files written elsewhere."""

    def __init__(self) -> None:
        self._folder: str | None = None
        self.events: list[str] = []
        sys.addaudithook(self._see)  # it stays for ever, and is silent outside of `over`

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Watch, while only below this folder files may be written."""
        self.events, self._folder = [], os.path.realpath(folder)
        try:
            yield
        finally:
            self._folder = None

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if self._folder is not None and (event.startswith(_FORBIDDEN) or (event == "open" and self._elsewhere(*args))):
            self.events.append(f"{event} {args}"[:200])

    def _elsewhere(self, path: object, mode: object, flags: object) -> bool:
        assert self._folder is not None
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes or not isinstance(path, (str, bytes)):
            return False
        return not os.path.realpath(os.fsdecode(path)).startswith((f"{self._folder}/", os.devnull))


@cache
def _watch() -> _Watch:
    return _Watch()


@contextmanager
def _in_time() -> Iterator[None]:
    """End what takes too long; where it cannot be ended, the process."""

    def end(*_: object) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    faulthandler.dump_traceback_later(3 * MAX_SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _few_addresses() -> Iterator[None]:
    """Have it fail to ask for much more memory than there is use for."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_ADDRESSES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
