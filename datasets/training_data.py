"""What training reads: a prepared dataset, or a stream."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from stylepipe.datasets.reader import Batch, Reader
from stylepipe.datasets.shards import ShardDataset
from stylepipe.datasets.streaming import StreamedDataset, StreamReader

TrainingData = ShardDataset | StreamedDataset


def batches_of(
    data: TrainingData, resolution: int, *, window_shards: int, seed: int, **options: Any
) -> Generator[Batch, None, None]:
    """Return the batches of a run at one resolution.

    Args:
        data: of the run's full resolution.
        resolution: of the images.
        window_shards: see `ShardDataset.order`; a stream has none.
        seed: of order and mirroring.
        options: those of `BatchReader`.
    """
    if isinstance(data, StreamedDataset):
        return StreamReader(data.level(resolution), seed=seed, **options).__iter__()
    return Reader(data.level(resolution), data.order(window_shards, seed), **options).__iter__()
