"""Open shards, read at any place by several threads at once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

from stylepipe.datasets.manifest import FileRecord

_SHARE_OF_DESCRIPTORS = 4  # the dataset takes one of so many; networks, sockets and libraries need some as well
_MOST_OPEN = 4096  # more gain nothing
_UNLIMITED = 1 << 20


class ShardFile:
    """An open shard, closed when nothing refers to it any more: whoever reads it need not fear that another closes it.

    Args:
        descriptor: of the open file; it is this object's from here on.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read(self, size: int, offset: int) -> bytes:
        """Return bytes of it, fewer where the file ends; raise OSError."""
        return os.pread(self.descriptor, size, offset)

    def __del__(self) -> None:
        os.close(self.descriptor)


class Shards(Protocol):
    """Where the shards of a dataset come from; may be used by several threads."""

    def open(self, shard: int) -> ShardFile:
        """Return an open shard, whatever has to be done for that. Raise OSError or UserError where it cannot be had."""
        ...

    def prefetch(self, shards: Collection[int]) -> None:
        """Announce that these will be asked for after those that were announced before."""
        ...

    def renew(self, shard: int, damaged: ShardFile) -> bool:
        """Have a shard brought again of which this file is damaged; return False where that would not help."""
        ...

    def close(self) -> None:
        """Let go of all; using it opens them again."""
        ...


class LocalShards:
    """Shards in a folder; those that were read last are kept open.

    Args:
        folder: where they are.
        records: their names.
        limit: how many are kept open at a time; default: a share of what the process may open.
    """

    def __init__(self, folder: Path, records: Sequence[FileRecord], limit: int | None = None) -> None:
        self._folder = folder
        self._records = records
        self._limit = limit or min(max(open_files_limit() // _SHARE_OF_DESCRIPTORS, 1), _MOST_OPEN)
        self._lock = threading.Lock()
        self._open: OrderedDict[int, ShardFile] = OrderedDict()  # the least recently asked for first

    def open(self, shard: int) -> ShardFile:
        """See `Shards.open`; raise OSError."""
        with self._lock:
            file = self._open.get(shard)
            if file is None:
                while len(self._open) >= self._limit:
                    self._open.popitem(last=False)
                file = ShardFile(os.open(self._folder / self._records[shard].file, os.O_RDONLY | os.O_CLOEXEC))
                self._open[shard] = file
            else:
                self._open.move_to_end(shard)
            return file

    def prefetch(self, shards: Collection[int]) -> None:
        """Do nothing: they are here."""

    def renew(self, shard: int, damaged: ShardFile) -> bool:
        """Return False: there is no other."""
        del shard, damaged
        return False

    def close(self) -> None:
        """See `Shards.close`."""
        with self._lock:
            self._open.clear()


def open_files_limit() -> int:
    """Return how many files this process may have open at a time."""
    limit = os.sysconf("SC_OPEN_MAX")
    return limit if limit > 0 else _UNLIMITED
