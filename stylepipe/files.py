"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        _flush_entry(path.parent)
    except BaseException:
        _remove(temporary)
        raise


def flush(path: Path) -> None:
    """Force a file, or every file below a folder, to the disk."""
    entries = [path, *path.rglob("*")] if path.is_dir() else [path]
    for entry in entries:
        if entry.is_file():
            entry.chmod(0o666 & ~_UMASK)  # some libraries write files that nobody else may read
        _flush_entry(entry)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
