"""Photographs in an LMDB: each value that is an image file, under its key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stylepipe.datasets.manifest import Skipped
from stylepipe.datasets.photos import printable
from stylepipe.errors import UserError

DATA_FILE = "data.mdb"
_OF_RESOLUTION = re.compile(r"(\d+)-\d+")  # keys of databases that hold every image at several resolutions


class LmdbSource:
    """The values of an LMDB; see `stylepipe.datasets.sources.Source`. It is opened for reading, without a lock.

    Where all keys but `length` are RESOLUTION-NUMBER, as StyleGAN code writes them, those of the highest resolution
    are the images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._environment: Any = None
        with self._open().begin() as transaction:
            keys = [os.fsdecode(bytes(key)) for key in transaction.cursor().iternext(values=False)]
        keys = [key for key in keys if key != "length"]
        resolutions = [match and int(match[1]) for match in map(_OF_RESOLUTION.fullmatch, keys)]
        smaller: list[str] = []
        if keys and all(resolutions):
            highest = max(resolution for resolution in resolutions if resolution)
            smaller = [key for key, resolution in zip(keys, resolutions, strict=True) if resolution != highest]
        kept = set(keys).difference(smaller)
        self.files = tuple(sorted(kept, key=os.fsencode))
        self.skipped = tuple(Skipped(printable(key), "smaller copy") for key in smaller)

    def read(self, name: str) -> bytes:
        with self._open().begin() as transaction:
            value = transaction.get(os.fsencode(name))
        if value is None:
            raise ValueError("the database has no such key any more")
        return bytes(value)

    def stamps(self) -> Iterator[bytes]:
        status = os.stat(self.path / DATA_FILE)
        yield b"\0%d\0%d" % (status.st_size, status.st_mtime_ns)

    def label_of(self, name: str) -> None:
        del name

    def _open(self) -> Any:
        if self._environment is None:
            try:
                import lmdb
            except ImportError as error:
                raise UserError(f"{self.path}: is an LMDB; pip install 'stylepipe[lmdb]' to read it") from error
            try:
                self._environment = lmdb.open(str(self.path), readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise UserError(f"{self.path}: is no LMDB that can be read ({error}); copy it again") from error
        return self._environment

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": None}
