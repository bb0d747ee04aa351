"""Leaving out copies while preparing, and remembering in a file what was stored, to go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from stylepipe.datasets.appended import Appended
from stylepipe.datasets.dedupe import Duplicates, Fingerprint
from stylepipe.datasets.manifest import Skipped

ROW = 32 + 32 + 768  # bytes of digest, hash and thumbnail


class Copies:
    """Finds copies of images that are stored already. Used as a context manager.

    Args:
        path: the file: a row of `ROW` bytes for each image stored.
        mark: of the rows to go on from (see `Appended`); None to begin.
        stored: the names of the images of those rows.
    """

    def __init__(self, path: Path, mark: Mapping[str, Any] | None, stored: Sequence[str]) -> None:
        self._file, self._duplicates = Appended(path, mark), Duplicates()
        with open(path, "rb") as rows:
            for name in stored:
                self._duplicates.find(_from_row(rows.read(ROW)), name)

    def copied(self, name: str, fingerprint: Fingerprint) -> Skipped | None:
        """Return of what an image is a copy, or None and remember it."""
        found = self._duplicates.find(fingerprint, name)
        if found is None:
            self._file.write(_to_row(fingerprint))
            return None
        how_close = "the same pixels" if found.exact else f"{found.levels:.1f} levels apart"
        return Skipped(name, "duplicate", f"of {found.of}: {how_close}")

    def mark(self) -> Mapping[str, Any]:
        """Bring all rows to the disk; return what goes on from them."""
        return self._file.mark()

    def finish(self) -> None:
        """Forget them; the file goes."""
        self._file.remove()

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
