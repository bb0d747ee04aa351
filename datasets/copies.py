"""Leaving out copies while preparing, and remembering in a file what was stored, to go on from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from stylepipe.datasets.dedupe import Duplicates, Fingerprint
from stylepipe.datasets.manifest import Skipped

ROW = 32 + 32 + 768  # bytes of digest, hash and thumbnail


class Copies:
    """Finds copies of images that are stored already. Used as a context manager.

    Args:
        path: the file: a row of `ROW` bytes for each image stored.
        stored: the names of those that were stored before.
    """

    def __init__(self, path: Path, stored: Sequence[str]) -> None:
        self._path, self._duplicates = path, Duplicates()
        self._file = open(path, "a+b")  # noqa: SIM115 - closed with this
        self._file.truncate(len(stored) * ROW)
        self._file.seek(0)
        for name in stored:
            self._duplicates.find(_from_row(self._file.read(ROW)), name)

    def copied(self, name: str, fingerprint: Fingerprint) -> Skipped | None:
        """Return of what an image is a copy, or None and remember it."""
        found = self._duplicates.find(fingerprint, name)
        if found is None:
            self._file.write(_to_row(fingerprint))
            return None
        how_close = "the same pixels" if found.exact else f"{found.levels:.1f} levels apart"
        return Skipped(name, "duplicate", f"of {found.of}: {how_close}")

    def mark(self) -> int:
        """Bring all rows to the disk; return their size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._path.stat().st_size

    def finish(self) -> None:
        """Forget them; the file goes."""
        self._file.close()
        self._path.unlink()

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def _to_row(fingerprint: Fingerprint) -> bytes:
    return fingerprint.digest + fingerprint.hash.astype("<u2").tobytes() + fingerprint.thumbnail.tobytes()


def _from_row(row: bytes) -> Fingerprint:
    digest, hash_, thumbnail = row[:32], row[32:64], row[64:]
    return Fingerprint(
        digest,
        np.frombuffer(hash_, "<u2").astype(np.uint16),
        np.frombuffer(thumbnail, np.uint8).reshape(16, 16, 3),
    )
