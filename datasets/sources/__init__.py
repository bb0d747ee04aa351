"""Where photographs come from: a folder, an archive, WebDataset shards or an LMDB, all read alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from stylepipe.datasets.manifest import Skipped

MAX_FILE_BYTES = 1 << 29  # of one photograph: more is refused before it is read


class Source(Protocol):
    """Files by name. It can be pickled, and opens what it needs where it is read.

    Attributes:
        path: what was named.
        files: the names of all files that may be images, sorted by their bytes; sub-folders are parted by "/".
        skipped: what is left out unread, and why.
    """

    path: Path
    files: tuple[str, ...]
    skipped: tuple[Skipped, ...]

    def read(self, name: str) -> bytes:
        """Return a file; raise OSError where it cannot be read, and ValueError where the archive is damaged there."""
        ...

    def stamps(self) -> Iterator[bytes]:
        """Yield what tells this state of the source from a later one: names, sizes and times."""
        ...

    def label_of(self, name: str) -> bytes | None:
        """Return the text of the label that lies beside an image, as .cls or .json does in WebDataset shards."""
        ...
