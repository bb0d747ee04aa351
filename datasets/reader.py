"""Batches for training: the images at each position, decoded by threads, in order, for ever.

Threads, not processes: decoders work without holding Python's lock, so threads decode side by side, straight into the
batch that goes to the device. Processes would each import torch, copy every batch through shared memory and again into
page-locked memory, and draw the permutation of every epoch for themselves.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from stylepipe.datasets.order import Int64Array, Order, WindowOrder, flips, rank_positions
from stylepipe.datasets.shards import ShardDataset
from stylepipe.datasets.store import RemoteError
from stylepipe.errors import UserError

_ATTEMPTS = 10  # images that cannot be read one after the other: then it is no matter of single ones
_TASK_PIXELS = 1 << 18  # pixels that a thread decodes at a time: small images are not worth a hand-over each
_TASKS_AHEAD = 2  # per thread, besides those of the batch that is next
_CLOSED_EVERY_S = 0.01
_CPU = torch.device("cpu")
_TOLD_EVERY_S = 1.0

T = TypeVar("T")


class Batch(NamedTuple):
    """One rank's share of a global batch: n = batch_size / world_size."""

    images: Tensor
    """[n, R, R, 3] uint8, NHWC, as they are stored; page-locked for a CUDA device."""
    labels: Tensor
    """[n, c_dim] float32, of classes one-hot; c_dim = 0 without labels."""
    positions: Tensor
    """[n] int64: the images' places in the order of the run."""
    mirrored: Tensor | None = None
    """[n] bool: which images are to be flipped left to right, cheaper on the device; None: none of any batch."""
    bad: tuple[str, ...] = ()
    """What could not be read and was replaced by another image, one message each."""

    def shown_on(self, device: torch.device) -> Tensor:
        """Return the images on a device, flipped where they are to be, [n, R, R, 3] uint8; does not wait for it."""
        images = self.images.to(device, non_blocking=True)
        if self.mirrored is None:
            return images
        mirrored = self.mirrored.to(device, non_blocking=True)
        return torch.where(mirrored[:, None, None, None], images.flip(2), images)


@dataclass(eq=False, kw_only=True)
class BatchReader:
    """What readers of prepared data and of streams are told alike.

    Args:
        batch_size: images of a global batch, over all ranks.
        rank: this process's number, below world_size.
        world_size: number of processes that share each global batch.
        mirror: have half of the images flipped left to right, drawn from the position.
        start: the first position: images seen so far.
        skip_bad: where an image cannot be read, put another in its place, drawn from the position, and do not raise.
        workers: threads that decode, ahead of what is asked for; 0 decodes in the thread that asks for a batch.
        device: where batches go.
        waiting: is called about once a second while workers have no batch ready, with the seconds so far; what it
            raises ends the iteration.

    Raises:
        UserError: an indivisible batch size; in iterating: an image or a shard that cannot be read.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    mirror: bool = False
    start: int = 0
    skip_bad: bool = False
    workers: int = 0
    device: torch.device = _CPU
    waiting: Callable[[float], None] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise UserError(f"--batch-size {self.batch_size}: expected a multiple of {self.world_size} (processes)")
        assert 0 <= self.rank < self.world_size
        assert self.start >= 0
        assert self.workers >= 0

    def positions(self, first: int) -> Int64Array:
        """Return this rank's share of the global batch that begins at position `first`, [n] int64."""
        return rank_positions(first, self.batch_size, self.rank, self.world_size)

    def empty(self, side: int) -> Tensor:
        """Return room for a share of images, [n, side, side, 3] uint8; page-locked for a CUDA device."""
        shape = (self.batch_size // self.world_size, side, side, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def mirrored(self, positions: Int64Array, seed: int) -> Tensor | None:
        """Return `Batch.mirrored`."""
        return self.handed_over(torch.from_numpy(flips(positions, seed))) if self.mirror else None

    def handed_over(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the host as a batch has it."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


@dataclass(eq=False)
class Reader(BatchReader):
    """An endless iterable of batches; a pure function of dataset, order and position (see order.py).

    Each iteration begins at `start` and yields, for every global batch, the positions start + rank, start + rank +
    world_size, ... The number of workers changes the speed only. It is not to be passed to `accelerator.prepare`.

    Args:
        dataset: an open dataset.
        order: of its images.
    """

    dataset: ShardDataset
    order: Order

    def __iter__(self) -> Generator[Batch, None, None]:
        window = self._announce(self.start, None)
        firsts = count(self.start, self.batch_size)
        with closing(self._decoded(firsts) if self.workers else self._decoded_here(firsts)) as shares:
            for share in shares:
                yield share.batch()
                # Told when a window is handed over, not when it is begun: what is decoded ahead is of this one or the
                # next, but for windows of a few images.
                window = self._announce(share.first + self.batch_size, window)

    def _decoded_here(self, firsts: Iterator[int]) -> Generator[_Share, None, None]:
        try:
            for first in firsts:
                share = _Share(self, first, self._empty(), _Stop())
                share.decode(range(len(share.ids)))
                yield share
        finally:
            self.dataset.close()

    def _decoded(self, firsts: Iterator[int]) -> Generator[_Share, None, None]:
        stop = _Stop()
        # Bare pixels are all Python and no decoder: a second thread makes it slower (docs/performance.md).
        threads = 1 if self.dataset.manifest.image_format == "ppm" else self.workers
        pool = ThreadPoolExecutor(threads, "decoding")
        in_share = self.batch_size // self.world_size
        in_task = max(1, min(_TASK_PIXELS // self.dataset.resolution**2, in_share))
        parts = [range(in_share)[start : start + in_task] for start in range(0, in_share, in_task)]

        def begun(first: int, images: Tensor) -> tuple[_Share, list[Future[None]]]:
            share = _Share(self, first, images, stop)
            return share, [pool.submit(share.decode, part) for part in parts]

        ahead = 2 + _TASKS_AHEAD * threads // len(parts)
        # Memory is asked for by this thread: it has the process's device, and an allocator that keeps what is freed.
        under_way = deque(pool.submit(begun, first, self._empty()) for first in islice(firsts, ahead))
        tasks: list[Future[None]] = []
        try:
            while True:
                share, tasks = self._result(under_way.popleft())
                for task in tasks:
                    self._result(task)
                yield share
                under_way.append(pool.submit(begun, next(firsts), self._empty()))
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for begin in under_way:
                if not begin.cancelled() and begin.exception() is None:
                    tasks += begin.result()[1]
            while not all(task.done() for task in tasks):
                self.dataset.close()  # ends the downloads that threads wait for
                time.sleep(_CLOSED_EVERY_S)
            pool.shutdown()
            self.dataset.close()

    def _result(self, task: Future[T]) -> T:
        patient(partial(_see_done, task), TimeoutError, self.waiting)
        return task.result()

    def _empty(self) -> Tensor:
        return self.empty(self.dataset.resolution)

    def _announce(self, position: int, before: int | None) -> int | None:
        """Have the window of a position and the next one brought, where `before` is another; return that window."""
        if not isinstance(self.order, WindowOrder):
            return None
        window = self.order.window_at(position)
        for number in range(window if before is None else before + 2, window + 2):
            self.dataset.prefetch(self.order.ranges(number))
        return window


def patient(take: Callable[[float], T], nothing: type[Exception], waiting: Callable[[float], None] | None) -> T:
    """Return what `take` gives within the seconds it is passed; tell `waiting` each time it raises `nothing`."""
    since = time.monotonic()
    while True:
        try:
            return take(_TOLD_EVERY_S)
        except nothing:
            if waiting is not None:
                waiting(time.monotonic() - since)


def _see_done(task: Future[Any], timeout_s: float) -> None:
    if not wait([task], timeout_s).done:
        raise TimeoutError


class _Stop(threading.Event):
    """Tells threads to begin nothing more, and why if there is a failure that all of them would meet."""

    cause: RemoteError | None = None


class _Share:
    """One rank's share of the global batch at position `first`, to be decoded part by part in any thread."""

    def __init__(self, reader: Reader, first: int, images: Tensor, stop: _Stop) -> None:
        self.first = first
        self._reader = reader
        self._images = images
        self._stop = stop
        self._positions = reader.positions(first)
        self.ids = reader.order.ids(self._positions)
        self._bad: list[list[str]] = [[] for _ in self.ids]

    def decode(self, part: range) -> None:
        """Decode some of its images; raise UserError."""
        dataset, pixels = self._reader.dataset, self._images.numpy()
        for index in part:
            if self._stop.is_set():
                if self._stop.cause is not None:
                    raise self._stop.cause
                return
            try:
                dataset.read_into(int(self.ids[index]), pixels[index])
            except RemoteError as error:  # no fault of the image; others would wait for the same server in vain
                self._stop.cause = error
                self._stop.set()
                raise
            except UserError as error:
                if not self._reader.skip_bad:
                    raise
                self._replace(index, str(error))

    def batch(self) -> Batch:
        """Return what has been decoded."""
        reader = self._reader
        labels = reader.handed_over(torch.from_numpy(reader.dataset.labels(self.ids)))
        mirrored = reader.mirrored(self._positions, reader.order.seed)
        bad = tuple(text for texts in self._bad for text in texts)
        return Batch(self._images, labels, torch.from_numpy(self._positions), mirrored, bad)

    def _replace(self, index: int, error: str) -> None:
        """Put the first image that can be read in the place of one that cannot; `ids` then says which."""
        reader, bad = self._reader, self._bad[index]
        bad.append(error)
        for attempt in range(_ATTEMPTS - 1):
            self.ids[index] = reader.order.substitutes(self._positions[index : index + 1], attempt)[0]
            try:
                reader.dataset.read_into(int(self.ids[index]), self._images.numpy()[index])
                return
            except RemoteError:
                raise
            except UserError as another:
                bad.append(str(another))
        raise UserError(f"{reader.dataset.path}: {_ATTEMPTS} images in a row cannot be read, the last: {bad[-1]}")
