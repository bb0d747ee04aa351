"""Photographs in a folder, searched recursively."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from stylepipe.datasets.manifest import Skipped
from stylepipe.datasets.photos import printable
from stylepipe.datasets.sources import MAX_FILE_BYTES


class FolderSource:
    """Every file below a folder, through symbolic links too; see `stylepipe.datasets.sources.Source`.

    Any file may be an image, whatever its name. Hidden ones (`.DS_Store`, AppleDouble's `._*`), special files, loops of
    links and folders that cannot be listed are `skipped`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = list(_walk(path, "", ()))
        self.files = tuple(sorted((item for item in found if isinstance(item, str)), key=os.fsencode))
        self.skipped = tuple(item for item in found if isinstance(item, Skipped))

    def read(self, name: str) -> bytes:
        path = self.path / name
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()

    def stamps(self) -> Iterator[bytes]:
        for name in self.files:
            try:
                status = os.stat(self.path / name)
            except OSError:  # gone since it was listed: preparing will tell
                continue
            yield b"\0%s\0%d\0%d" % (os.fsencode(name), status.st_size, status.st_mtime_ns)

    def label_of(self, name: str) -> None:
        del name


def _walk(root: Path, below: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str | Skipped]:
    """Yield the relative name of every file below root/below, or why an entry is left out."""
    try:
        here = os.stat(root / below)
        entries = list(os.scandir(root / below))
    except OSError as error:
        yield Skipped(printable(below), "unreadable", error.strerror or str(error))
        return
    if (here.st_dev, here.st_ino) in ancestors:
        yield Skipped(printable(below), "loop", "a symbolic link to a folder that holds it")
        return
    for entry in entries:
        name = os.path.join(below, entry.name)
        if entry.name.startswith("."):
            yield Skipped(printable(name), "hidden")
            continue
        try:
            mode = entry.stat().st_mode  # follows links
        except OSError as error:
            yield Skipped(printable(name), "unreadable", error.strerror or str(error))
            continue
        if stat.S_ISDIR(mode):
            yield from _walk(root, name, (*ancestors, (here.st_dev, here.st_ino)))
        elif stat.S_ISREG(mode):
            yield name
        else:
            yield Skipped(printable(name), "not a file")
