"""Where files go, and writing them so that a reader never sees half of one, and one process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

CACHE_VARIABLE = "STYLEPIPE_CACHE"

log = logging.getLogger(__name__)

_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be read by setting it; at import no other thread makes files


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that becomes `path` when the block ends well.

    The block writes a file or makes a folder at the temporary path. On success it is flushed to
    disk and renamed; on any exception (a full disk, Ctrl-C) it is removed, and what stood at
    `path` before is untouched. A folder may not exist at `path` already.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush_entry(path.parent)
    except BaseException:
        _remove(temporary)
        raise


@contextmanager
def locked(path: Path, *, wait: bool = True, needed: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock that ends with this process, however it ends; yield whether it is held.

    Args:
        path: a folder, or a file, which is made if need be.
        wait: for another process that holds it; else that yields False.
        needed: raise OSError where the file system has no locks, as some network file systems have none. Else that is
            warned of, and counts as held.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError as error:
            if needed:
                raise
            log.warning("%s cannot be locked (%s); see that only one process uses it", path, error.strerror)
        yield held
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Force a file, or every file below a folder, to the disk."""
    entries = [path, *path.rglob("*")] if path.is_dir() else [path]
    for entry in entries:
        if entry.is_file():
            entry.chmod(0o666 & ~_UMASK)  # some libraries write files that nobody else may read
        flush_entry(entry)


def flush_entry(path: Path) -> None:
    """Force one file, or the names in one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def silence(stream: TextIO) -> None:
    """Have all that is written to a stream from now on, and what is left in its buffer, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Return where prepared data is kept: STYLEPIPE_CACHE, else stylepipe/ in XDG_CACHE_HOME, else in ~/.cache."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stylepipe"
