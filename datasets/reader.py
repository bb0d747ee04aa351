"""Batches for training: the images at each position, decoded by worker processes, in order, for ever."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stylepipe.datasets import order
from stylepipe.datasets.processes import follow_parent, signals_held
from stylepipe.datasets.shards import ShardDataset
from stylepipe.errors import UserError

_ATTEMPTS = 10  # images that cannot be read one after the other: then it is no matter of single ones
_PREFETCH = 2  # batches under way per worker
_SHARED_MEMORY = Path("/dev/shm")  # where worker processes hand their batches over


class Batch(NamedTuple):
    """One rank's share of a global batch: n = batch_size / world_size."""

    images: Tensor
    """[n, R, R, 3] uint8, NHWC, already mirrored where the position says so."""
    labels: Tensor
    """[n, c_dim] float32, of classes one-hot; c_dim = 0 without labels."""
    positions: Tensor
    """[n] int64: the images' places in the order of the run."""
    bad: tuple[str, ...] = ()
    """What could not be read and was replaced by another image, one message each."""


class Reader:
    """An endless iterable of batches; a pure function of dataset, seed and position (see order.py).

    Each iteration begins at `start` and yields, for every global batch, the positions start + rank, start + rank +
    world_size, ... The number of workers changes the speed only. It is not to be passed to `accelerator.prepare`.

    Args:
        dataset: an open dataset.
        batch_size: images of a global batch, over all ranks.
        rank: this process's number, below world_size.
        world_size: number of processes that share each global batch.
        seed: of the order and the mirroring.
        mirror: flip half of the images left to right, drawn from the position.
        start: the first position: images seen so far.
        skip_bad: where an image cannot be read, put another in its place, drawn from the position, and do not raise.
        num_workers: processes that decode; 0 decodes in this one, when a batch is asked for.
        pin_memory: hand batches over in page-locked memory, for asynchronous copies to a CUDA device.

    Raises:
        UserError: an indivisible batch size, too little shared memory; in iterating: a bad sample, a dead worker.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        mirror: bool = False,
        start: int = 0,
        skip_bad: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"--batch-size {batch_size}: expected a multiple of {world_size} (processes)")
        assert 0 <= rank < world_size
        assert start >= 0
        assert num_workers >= 0
        self.dataset = dataset
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.mirror = mirror
        self.start = start
        self.skip_bad = skip_bad
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        if num_workers:
            _check_shared_memory(num_workers * _PREFETCH * (batch_size // world_size) * 3 * dataset.resolution**2)

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[Batch | _Mistake] = DataLoader(
            _Positions(self.dataset, self.seed, self.mirror, self.skip_bad),
            batch_sampler=_RankBatches(self.start, self.batch_size, self.rank, self.world_size),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            prefetch_factor=_PREFETCH if self.num_workers else None,
            worker_init_fn=_start_worker if self.num_workers else None,
            multiprocessing_context=_worker_context() if self.num_workers else None,
            generator=torch.Generator(),  # the loader draws a seed: not from the training's generator
        )
        try:
            for batch in loader:
                if isinstance(batch, _Mistake):
                    raise UserError(batch.message)
                yield batch
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # The last three: a worker died while handing a batch over.
            if not self.num_workers or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                raise
            raise UserError(
                f"a process that reads data was killed ({_first_line(error)}), most likely for want of memory; "
                f"use fewer than {self.num_workers} workers, or give the container more memory and {_SHARED_MEMORY}"
            ) from error


@dataclass(frozen=True)
class _Mistake:
    """A UserError on its way from a worker; raised there, torch would wrap it in a traceback."""

    message: str


class _Positions(Dataset[Batch]):
    """The run as a map from positions to samples; a whole batch is decoded at once."""

    def __init__(self, dataset: ShardDataset, seed: int, mirror: bool, skip_bad: bool) -> None:
        self._dataset = dataset
        self._seed = seed
        self._mirror = mirror
        self._skip_bad = skip_bad

    def __getitems__(self, positions: Sequence[int]) -> Batch | _Mistake:
        where = np.asarray(positions, dtype=np.int64)
        ids = order.image_ids(where, len(self._dataset), self._seed)
        bad: list[str] = []
        try:
            images = self._dataset.read(ids)
        except UserError as error:
            if not self._skip_bad:
                return _Mistake(str(error))
            try:
                images = np.concatenate([self._read_some(where, ids, index, bad) for index in range(len(where))])
            except UserError as last:
                return _Mistake(str(last))
        if self._mirror:
            flipped = order.flips(where, self._seed)
            images[flipped] = images[flipped, :, ::-1]
        labels = torch.from_numpy(self._dataset.labels(ids))
        return Batch(torch.from_numpy(images), labels, torch.from_numpy(where), tuple(bad))

    def _read_some(
        self, where: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], index: int, bad: list[str]
    ) -> npt.NDArray[np.uint8]:
        """Return the image of a position, [1, R, R, 3]: the first that can be read; `ids` then says which."""
        for attempt in range(_ATTEMPTS):
            try:
                return self._dataset.read(ids[index : index + 1])
            except UserError as error:
                bad.append(str(error))
                place = where[index : index + 1]
                ids[index] = order.substitutes(place, attempt, len(self._dataset), self._seed)[0]
        raise UserError(f"{self._dataset.path}: {_ATTEMPTS} images in a row cannot be read, the last: {bad[-1]}")


class _RankBatches:
    """Yields the positions of one rank's share of every global batch, for ever."""

    def __init__(self, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self._first = start
        self._share = (batch_size, rank, world_size)

    def __iter__(self) -> Iterator[list[int]]:
        first = self._first
        while True:
            yield order.rank_positions(first, *self._share).tolist()
            first += self._share[0]


def _as_it_is(batch: Any) -> Any:
    return batch


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _start_worker(_: int) -> None:
    follow_parent()


def _worker_context() -> multiprocessing.context.ForkServerContext:
    """Return the way to start workers: forked from a clean server process that has imported what they need.

    A fork of the training process itself would copy its threads' locks and its CUDA and InfiniBand state. The server is
    started with SIGTERM blocked: else one to all processes of a job would end it, and the workers with it, before the
    training has finished its step.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with signals_held():
        forkserver.ensure_running()
    return context


def _check_shared_memory(needed: int) -> None:
    """Raise UserError where shared memory cannot hold `needed` bytes; a worker would die there without a word."""
    if not _SHARED_MEMORY.is_dir():
        return
    status = os.statvfs(_SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise UserError(
            f"{_SHARED_MEMORY} has {free / 2**20:,.0f} MiB free, and the data workers need {needed / 2**20:,.0f} MiB; "
            "start the container with more (docker run --shm-size=8g), or use fewer workers (--workers 0 needs none)"
        )
