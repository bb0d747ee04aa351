"""Photographs streamed from plain WebDataset shards as they are, for more of them than can be prepared.

Each thread of each process draws shards at random, again and again, and shuffles their photographs in a buffer. Nothing
is indexed, copied or promised: within an epoch's length some photographs come twice and others not at all, and what a
run shows depends on its number of processes and threads. One that goes on draws anew from where it stands. A tar that
was cut between two members looks whole here. Prepared data (`stylepipe prepare`) has none of these faults.
"""

from __future__ import annotations

import io
import queue
import random
import tarfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from webdataset.filters import shuffle
from webdataset.shardlists import expand_urls

from stylepipe.datasets import store as stores
from stylepipe.datasets.fetching import RetryPolicy, patiently
from stylepipe.datasets.levels import box_averages
from stylepipe.datasets.photos import SkippedPhotoError, read_square
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.reader import Batch, BatchReader, patient
from stylepipe.datasets.sources.tars import stream_tar
from stylepipe.datasets.store import RemoteError, Store, open_store, redacted
from stylepipe.errors import UserError
from stylepipe.parsing import one_line

_PREFIX = "stream:"
_PREVIEWED = 32  # photographs
_BUFFERED = 256  # photographs that a thread shuffles, as files
_DECODED_AHEAD = 8  # images of each thread
_MOST_REFUSED = 1000  # photographs in a row that give no image, or
_MOST_BROKEN = 10  # shards: then it is no matter of single ones

T = TypeVar("T")
File: TypeAlias = tuple[str, bytes]  # its address, for messages, and what it holds


def is_stream(data: str | Path | None) -> bool:
    """Tell whether `--data` names shards to be streamed."""
    return str(data).startswith(_PREFIX)


class StreamedDataset:
    """Photographs in shards, as squares of one resolution: the centre of each, smaller ones left out.

    Args:
        data: `stream:` and the shards: local paths or http(s)://, s3://, gs://, hf:// addresses, with {0000..0099} for
            a series and, of paths, with * and ?.
        resolution: of the photographs' squares, in pixels.
        level: box-averaged to this one; default: not at all.
        skip_bad: a look at the data leaves out what cannot be read.

    Attributes:
        name: of the data, for run directories.
        shards: their addresses.

    Raises:
        UserError: no shard is named, or a path is not there.
    """

    classes: tuple[str, ...] | None = None
    c_dim = 0
    waits = True
    previewed = range(_PREVIEWED)

    def __init__(self, data: str, resolution: int, level: int | None = None, skip_bad: bool = False) -> None:
        self._data, self._how, self._skip_bad = data, Preparation(resolution), skip_bad
        self.resolution = level or resolution
        self.shards: list[str] = []
        for address in expand_urls(data.removeprefix(_PREFIX)):
            if address.startswith("pipe:") or ("://" in address and "*" in address):
                raise UserError(
                    f"--data {redacted(data)}: streams are read from paths, with * and {{000..099}}, or from "
                    f"http(s)://, s3://, gs:// and hf:// addresses, with {{000..099}}"
                )
            pattern = f"{address}/*.tar" if Path(address).is_dir() else address
            found = [address] if "://" in address else sorted(glob(pattern))
            if not found:
                raise UserError(
                    f"--data {data}: no such file: {address}; expected tar files, as faces-{{000..099}}.tar"
                )
            self.shards += found
        self.name = PurePosixPath(self.shards[0].partition("?")[0]).parent.name or "stream"

    @property
    def summary(self) -> str:
        """What it holds, in words."""
        return f"a stream of {len(self.shards)} shard{'s'[: len(self.shards) > 1]}"

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from other data, for the states of a run."""
        return {"name": self.name, "stream": redacted(self._data)}

    def level(self, resolution: int) -> StreamedDataset:
        """Return the same photographs at a smaller resolution."""
        return StreamedDataset(self._data, self._how.res, resolution, self._skip_bad)

    def read(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return some of the first images, those that `previewed` allows: [n, R, R, 3] uint8."""
        left_out: list[str] = []
        squares = self.squares(iter(self.shards), self._skip_bad, left_out=left_out)
        first = list(islice(squares, max(ids, default=-1) + 1))
        if len(first) <= max(ids, default=-1):
            raise UserError(
                f"--data {redacted(self._data)}: gives {len(first)} images of {self._how.res} px; expected "
                f"{_PREVIEWED} at least: name more shards, or prepare them (stylepipe prepare)"
                + (f"; left out, for instance: {one_line(left_out[-1])}" if left_out else "")
            )
        return np.stack([first[number].pixels for number in ids])

    def squares(
        self,
        shards: Iterator[str],
        skip_bad: bool,
        shuffled: Callable[[Iterator[File]], Iterator[File]] = iter,
        left_out: list[str] | None = None,
    ) -> Generator[Square, None, None]:
        """Yield the images of the photographs in shards.

        Args:
            shards: addresses, one after the other.
            skip_bad: leave out what cannot be read, and say so with the next image.
            shuffled: changes the order of the photographs' files.
            left_out: is told of everything that gives no image.

        Raises:
            UserError: a shard or a photograph cannot be read, or none is large enough.
        """
        bad: list[str] = []
        refused = 0
        for where, data in shuffled(_files(shards, bad if skip_bad else None)):
            try:
                pixels = np.asarray(read_square(data, self._how).image)
            except SkippedPhotoError as error:
                refused += 1
                message = f"{where}: {error.reason}{error.detail and f' ({error.detail})'}"
                if error.reason == "unreadable" and not skip_bad:
                    raise UserError(f"{message}; --on-bad skip leaves it out") from error
                if refused == _MOST_REFUSED:
                    text = f"--data {self._data}: {refused:,} photographs in a row left out, the last: {message}"
                    raise UserError(text) from error
                if error.reason == "unreadable":
                    bad.append(message)
                if left_out is not None:
                    left_out.append(message)
                continue
            refused = 0
            if self.resolution != len(pixels):
                pixels = next(level for level in box_averages(pixels) if len(level) == self.resolution)
            yield Square(pixels, tuple(bad))
            bad.clear()
        if left_out is not None:
            left_out += bad


class Square(NamedTuple):
    """An image [R, R, 3] uint8, and what could not be read before it, one message each."""

    pixels: npt.NDArray[np.uint8]
    bad: tuple[str, ...]


@dataclass(eq=False)
class StreamReader(BatchReader):
    """An endless iterable of batches of a stream.

    With the same arguments it gives the same batches, `start` being one of them.

    Args:
        dataset: the stream.
        seed: of what is drawn of it, and of the mirroring.
    """

    dataset: StreamedDataset
    seed: int

    def __iter__(self) -> Generator[Batch, None, None]:
        sources: list[Generator[Square, None, None]] = [self._squares(n) for n in range(max(1, self.workers))]
        if self.workers:
            sources = [_in_thread(source, self.waiting) for source in sources]
        turn = 0
        try:
            for first in count(self.start, self.batch_size):
                positions = self.positions(first)
                squares = [next(sources[(turn + index) % len(sources)]) for index in range(len(positions))]
                turn += len(positions)
                yield self._batch(squares, positions)
        finally:
            for source in sources:
                source.close()

    def _squares(self, worker: int) -> Generator[Square, None, None]:
        draw = random.Random(f"{self.seed}/{self.rank}/{worker}/{self.start}")
        shards = iter(lambda: draw.choice(self.dataset.shards), None)
        return self.dataset.squares(shards, self.skip_bad, shuffle(_BUFFERED, rng=draw))

    def _batch(self, squares: Sequence[Square], positions: npt.NDArray[np.int64]) -> Batch:
        images = self.empty(self.dataset.resolution)
        np.stack([square.pixels for square in squares], out=images.numpy())
        bad = tuple(text for square in squares for text in square.bad)
        mirrored = self.mirrored(positions, self.seed)
        return Batch(images, torch.zeros(len(squares), 0), torch.from_numpy(positions), mirrored, bad)


def _files(shards: Iterator[str], bad: list[str] | None) -> Iterator[File]:
    """Yield the image files of shards, each with its address; with `bad`, note there what cannot be read."""
    broken = 0
    for address in shards:
        message = f"{redacted(address)}: holds no images"
        try:
            with closing(_opened(address)) as stream:
                for name, data in stream_tar(stream):
                    if PurePosixPath(name).suffix.lower() in Image.registered_extensions():
                        broken, message = 0, ""
                        yield f"{redacted(address)}: {one_line(name)}", data
        except (OSError, tarfile.TarError, RemoteError) as error:
            found = f"{redacted(address)}: cannot be read ({one_line(error)})"
            message = str(error) if isinstance(error, RemoteError) else found
            if bad is None:
                raise UserError(f"{message}; --on-bad skip goes on with other shards") from error
            bad.append(message)
        broken += bool(message)
        if broken == _MOST_BROKEN:
            raise UserError(f"{broken} shards in a row gave no image, the last: {message}")


def _opened(address: str) -> io.BufferedReader:
    if "://" not in address:
        return open(address, "rb")
    path, question, query = address.partition("?")
    folder, _, name = path.rpartition("/")
    return io.BufferedReader(_RemoteFile(folder + question + query, name), stores.RANGE_BYTES)


@lru_cache
def _store_at(location: str) -> Store:
    return open_store(location)


class _RemoteFile(io.RawIOBase):
    """A file of a store from its beginning to its end, whatever the line does in between."""

    def __init__(self, location: str, name: str) -> None:
        self._store, self._name, self._policy = _store_at(location), name, RetryPolicy()
        self._at = 0
        size = patiently(lambda: self._store.size(name), self._policy)
        if size is None:
            raise RemoteError(f"{self._store.url(name)}: the server does not say how large it is", retry=False)
        self._size = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = self._read(end) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, end: int) -> bytes:
        return patiently(lambda: self._store.read(self._name, self._at, end), self._policy)


def _in_thread(source: Generator[T, None, None], waiting: Callable[[float], None] | None) -> Generator[T, None, None]:
    """Yield what a generator yields, some of it ahead, in a thread that ends with this one; see `Reader.waiting`."""
    made: queue.Queue[T | BaseException] = queue.Queue(_DECODED_AHEAD)
    stopped = threading.Event()

    def hand_over(item: T | BaseException) -> None:
        while not stopped.is_set():
            try:
                made.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def run() -> None:
        try:
            for item in source:
                hand_over(item)
                if stopped.is_set():
                    return
        except BaseException as error:
            hand_over(error)

    # A daemon: nothing is lost with it, and it may wait for a server.
    threading.Thread(target=run, name="streaming", daemon=True).start()
    try:
        while True:
            item = patient(lambda timeout: made.get(timeout=timeout), queue.Empty, waiting)
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
