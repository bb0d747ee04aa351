"""The folder where compiled kernels are kept, shared by all processes of a machine.

An entry is a file: what the compiler made, then the 32 bytes of its SHA-256, which neither the driver nor the loader
of shared objects minds. A truncated or corrupt entry is thereby noticed, and made again. Entries appear by renaming,
so that no process reads half of one; the lock only spares processes from compiling the same thing at the same time.
Nothing here fails because of the folder: where it cannot be used, each process compiles for itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stylepipe.files import atomic_path

FOLDER_VARIABLE = "STYLEPIPE_KERNEL_CACHE"

LOCK_TIMEOUT_S = 300.0
"""After this wait a process compiles without the lock; no unit takes a tenth of it."""
LOCK_QUIET_S = 5.0
"""After this wait a process says whom it waits for."""

_DIGEST_BYTES = hashlib.sha256().digest_size
_LOCKS = "locks"

_log = logging.getLogger(__name__)

# As build.py names them: unit, scalar type, target, hash; compiler and version; kind of file.
_ENTRY_NAME = re.compile(r".+-b?float(16|32|64)-\w+-[0-9a-f]{16}\..+\.(cubin|ptx|so)")
_warned: set[Path] = set()


def warn(message: str) -> None:
    """Issue a RuntimeWarning: the default way to say that the cache cannot be used."""
    warnings.warn(message, RuntimeWarning)


Report = Callable[[str], object]


def cache_folder() -> Path:
    """Return the folder of compiled kernels, which need not exist.

    It is $STYLEPIPE_KERNEL_CACHE, else $TORCH_EXTENSIONS_DIR/stylepipe, else stylepipe/kernels in the user's cache
    folder ($XDG_CACHE_HOME, or ~/.cache).
    """
    if own := os.environ.get(FOLDER_VARIABLE):
        return Path(own).expanduser()
    if extensions := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(extensions).expanduser() / "stylepipe"
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "stylepipe" / "kernels"


def read_entry(path: Path) -> bytes | None:
    """Return what an entry holds; None where it is missing, unreadable or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    payload, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        _log.warning("%s is damaged; compiling it again", path)
        return None
    return payload


def write_entry(path: Path, payload: bytes) -> None:
    """Write an entry, whole or not at all; raise OSError where that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(payload + hashlib.sha256(payload).digest())


def keep_entry(path: Path, payload: bytes, report: Report = warn) -> bool:
    """Write an entry and tell whether that went well; where not, report it, once for a folder."""
    try:
        write_entry(path, payload)
    except OSError as error:
        _report_unusable(path.parent, error, report)
        return False
    return True


@contextmanager
def entry_lock(folder: Path, name: str, report: Report = warn, *, timeout_s: float | None = None) -> Iterator[None]:
    """Hold the lock `name` of the folder, or go on without it where it cannot be had; waits for LOCK_TIMEOUT_S if not
    told otherwise.

    The kernel of the operating system holds it for the process, so that it goes when the process dies, however it dies.
    """
    lock = FileLock(folder / _LOCKS / f"{name}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, name, report, LOCK_TIMEOUT_S if timeout_s is None else timeout_s)
    except (OSError, NotImplementedError) as error:  # a file system without locks gives either
        _report_unusable(folder, error, report)
    try:
        yield
    finally:
        lock.release()


def remove_entries(folder: Path) -> tuple[int, int]:
    """Remove all that the folder holds of ours, left-overs of killed builds included; return files and bytes.

    Locks stay: who waits for one that is removed would then hold a file that no other process sees.
    """
    entries = [*list_entries(folder), *(path for path in folder.glob(".*.tmp") if path.is_file())]
    sizes = [path.stat().st_size for path in entries]
    for path in entries:
        path.unlink(missing_ok=True)
    return len(entries), sum(sizes)


def list_entries(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted by name; other people's files beside them are none."""
    return sorted(path for path in folder.glob("[!.]*") if path.is_file() and _ENTRY_NAME.fullmatch(path.name))


def _acquire(lock: FileLock, name: str, report: Report, timeout_s: float) -> None:
    """Acquire the lock and leave our process's number beside it, or give up after that time."""
    path = Path(lock.lock_file)
    try:
        try:
            lock.acquire(timeout=LOCK_QUIET_S)
        except Timeout:
            _log.warning(
                "waiting for %s, which compiles %s (lock %s), for %.0f s at the most",
                _holder(path),
                name,
                path,
                timeout_s,
            )
            lock.acquire(timeout=timeout_s - LOCK_QUIET_S)
    except Timeout:
        report(
            f"{_holder(path)} has held the lock {path} for more than {timeout_s:.0f} s; compiling {name} without "
            "it. If that process hangs, end it"
        )
        return
    _holder_file(path).write_text(f"{os.getpid()} {socket.gethostname()}\n")


def _holder_file(path: Path) -> Path:
    """Return the file beside a lock that tells its holder; who waits for the lock itself may empty that."""
    return path.with_suffix(".holder")


def _holder(path: Path) -> str:
    """Name the process that left its number beside a lock."""
    try:
        pid, host = _holder_file(path).read_text().split()
    except (OSError, ValueError):  # it has yet to write it
        return "another process"
    return f"process {pid}" if host == socket.gethostname() else f"process {pid} on {host}"


def _report_unusable(folder: Path, error: Exception, report: Report) -> None:
    if folder not in _warned:
        _warned.add(folder)
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        report(
            f"compiled kernels cannot be kept in {folder} ({reason}): every process compiles its own, at every start. "
            f"Name a folder that can be written in {FOLDER_VARIABLE}"
        )
