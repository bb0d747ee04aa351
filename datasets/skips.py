"""What was left out while preparing: counted, and remembered in a file to go on from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from stylepipe.datasets.appended import Appended
from stylepipe.datasets.manifest import Skipped
from stylepipe.errors import UserError

BAD = ("unreadable", "damaged archive")


class Skips:
    """The files that are skipped. Used as a context manager.

    Args:
        path: a file of lines.
        mark: of the lines to go on from (see `Appended`); None to begin.
        source: of the photographs, for a message.
        before: what was left out before any file was read; it is not in the file.
        most: give up when more than this cannot be read; None for no limit.

    Attributes:
        names: of the files that were skipped in reading, as they are told.

    Raises:
        UserError: too many cannot be read.
    """

    def __init__(
        self, path: Path, mark: Mapping[str, Any] | None, source: Path, before: Iterable[Skipped], most: int | None
    ) -> None:
        self._file, self._source, self._most, self._bad = Appended(path, mark), source, most, 0
        self._before = list(before)
        read = self._read()
        self.names = {skipped.file for skipped in read}
        for skipped in (*self._before, *read):
            self._count(skipped)

    def add(self, skipped: Skipped) -> None:
        """Note one more; raise UserError where it is one too many."""
        self._file.write(json.dumps(asdict(skipped)).encode() + b"\n")
        self._count(skipped)

    def mark(self) -> Mapping[str, Any]:
        """Bring all lines to the disk; return what goes on from them."""
        return self._file.mark()

    def finish(self) -> list[Skipped]:
        """Return all that was left out; the file goes."""
        skipped = [*self._before, *self._read()]
        self._file.remove()
        return skipped

    def __enter__(self) -> Skips:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _count(self, skipped: Skipped) -> None:
        self._bad += skipped.reason in BAD
        if self._most is not None and self._bad > self._most:
            raise UserError(
                f"--max-bad {self._most}: {self._source} has more files that cannot be read, the last one found is "
                f"{skipped.file} ({skipped.detail}); mend or remove them, or allow more"
            )

    def _read(self) -> list[Skipped]:
        return [Skipped(**json.loads(line)) for line in self._file.read().splitlines()]
