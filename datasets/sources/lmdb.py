"""Photographs in an LMDB: each value that is an image file, under its key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stylepipe.datasets.manifest import Skipped
from stylepipe.datasets.photos import printable
from stylepipe.datasets.sources import MAX_FILE_BYTES
from stylepipe.datasets.sources.lmdb_pages import Entry, entries
from stylepipe.errors import UserError

DATA_FILE = "data.mdb"
_OF_RESOLUTION = re.compile(r"([0-9]{1,9})-[0-9]+")  # keys of databases that hold every image at several resolutions


class LmdbSource:
    """The values of an LMDB; see `stylepipe.datasets.sources.Source`.

    Where all keys but `length` are RESOLUTION-NUMBER, as StyleGAN code writes them, those of the highest resolution
    are the images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        try:
            places = entries(path / DATA_FILE)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise UserError(f"{path}: is no LMDB that can be read ({error}); copy it again") from error
        names = {os.fsdecode(key): place for key, place in places.items() if key != b"length"}
        resolutions = [match and int(match[1]) for match in map(_OF_RESOLUTION.fullmatch, names)]
        smaller: list[str] = []
        if names and all(resolutions):
            highest = max(resolution for resolution in resolutions if resolution)
            smaller = [key for key, resolution in zip(names, resolutions, strict=True) if resolution != highest]
        self._places: dict[str, Entry] = {name: names[name] for name in names.keys() - set(smaller)}
        self.files = tuple(sorted(self._places, key=os.fsencode))
        self.skipped = tuple(Skipped(printable(key), "smaller copy") for key in smaller)

    def read(self, name: str) -> bytes:
        place = self._places[name]
        if place.size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        if self._descriptor is None:
            self._descriptor = os.open(self.path / DATA_FILE, os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._descriptor, place.size, place.offset)
        if len(data) != place.size:
            raise ValueError(f"the database ends after {len(data):,} of its {place.size:,} bytes")
        return data

    def stamps(self) -> Iterator[bytes]:
        status = os.stat(self.path / DATA_FILE)
        yield b"\0%d\0%d" % (status.st_size, status.st_mtime_ns)

    def label_of(self, name: str) -> None:
        del name

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        if (descriptor := self.__dict__.get("_descriptor")) is not None:
            os.close(descriptor)
