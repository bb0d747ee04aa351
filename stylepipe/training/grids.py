"""The real images that a run shows beside its own, and compares its own with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stylepipe.datasets.shards import ShardDataset
from stylepipe.datasets.store import RemoteError
from stylepipe.datasets.streaming import StreamedDataset
from stylepipe.datasets.training_data import TrainingData
from stylepipe.errors import UserError


def real_images(
    dataset: TrainingData, columns: int, rows: int, classes_of_rows: Sequence[int], skip_bad: bool = False
) -> NDArray[np.uint8]:
    """Return the first images of the data for a grid, [N, R, R, 3] uint8; with classes, each row's are of its class.

    They are of `dataset.previewed`. A class with fewer of them than its rows have places leaves the rest black, and so
    does an image that cannot be read, with `skip_bad`.
    """
    if not classes_of_rows:
        return read_images(dataset, dataset.previewed[: columns * rows], skip_bad)
    assert isinstance(dataset, ShardDataset)  # streams have no classes
    images = np.zeros((len(classes_of_rows), columns, dataset.resolution, dataset.resolution, 3), dtype=np.uint8)
    for row, number in enumerate(classes_of_rows):
        first = columns * classes_of_rows[:row].count(number)
        ids = dataset.of_class(number)
        ids = ids[ids < dataset.previewed.stop][first : first + columns]
        images[row, : len(ids)] = read_images(dataset, ids, skip_bad)
    return images.reshape(-1, *images.shape[2:])


def read_images(dataset: TrainingData, ids: Sequence[int] | NDArray[np.int64], skip_bad: bool) -> NDArray[np.uint8]:
    """Return images [n, R, R, 3] uint8; with `skip_bad`, those that cannot be read are black."""
    if not skip_bad or isinstance(dataset, StreamedDataset):  # a stream has left them out
        return dataset.read(ids)
    images = np.zeros((len(ids), dataset.resolution, dataset.resolution, 3), dtype=np.uint8)
    for place, sample in enumerate(ids):
        try:
            images[place] = dataset.read([int(sample)])[0]
        except RemoteError:
            raise
        except UserError:
            continue
    return images
