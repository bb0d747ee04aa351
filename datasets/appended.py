"""A file that is only ever appended to, and what of it can be gone on from after a kill."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PIECE = 1 << 20


class Appended:
    """Appends to a file, and knows the CRC-32 of all that it holds.

    Args:
        path: of the file.
        mark: what `mark` has said of it, and `is_sound` confirmed; what is behind that is cut off. None begins anew.
    """

    def __init__(self, path: Path, mark: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._size: int = 0 if mark is None else mark["bytes"]
        self._crc: int = 0 if mark is None else mark["crc32"]
        self._file = open(path, "ab")  # noqa: SIM115 - closed with this
        self._file.truncate(self._size)

    def write(self, data: bytes) -> None:
        """Append."""
        self._file.write(data)
        self._size += len(data)
        self._crc = zlib.crc32(data, self._crc)

    def mark(self) -> dict[str, int]:
        """Bring all to the disk; return what tells it from anything else."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._size, "crc32": self._crc}

    def read(self) -> bytes:
        """Return all that it holds."""
        self._file.flush()
        return self._path.read_bytes()

    def close(self) -> None:
        """Close it; it stays, to be gone on from."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete it."""
        self._file.close()
        self._path.unlink()


def is_sound(path: Path, mark: Mapping[str, Any]) -> bool:
    """Tell whether a file still begins with what a mark was made of."""
    left, crc = mark["bytes"], 0
    try:
        with open(path, "rb") as file:
            while left > 0 and (data := file.read(min(left, _PIECE))):
                left -= len(data)
                crc = zlib.crc32(data, crc)
    except OSError:
        return False
    return left == 0 and crc == mark["crc32"]
