"""The grid of real images that a run shows beside its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stylepipe.datasets.shards import ShardDataset


def real_images(dataset: ShardDataset, columns: int, rows: int, classes_of_rows: Sequence[int]) -> NDArray[np.uint8]:
    """Return the first images of the data for a grid, [N, R, R, 3] uint8; with classes, each row's are of its class.

    A class with fewer images than its rows have places leaves the rest black.
    """
    if not classes_of_rows:
        return dataset.read(range(min(columns * rows, len(dataset))))
    images = np.zeros((len(classes_of_rows), columns, dataset.resolution, dataset.resolution, 3), dtype=np.uint8)
    for row, number in enumerate(classes_of_rows):
        first = columns * classes_of_rows[:row].count(number)
        ids = dataset.of_class(number)[first : first + columns]
        images[row, : len(ids)] = dataset.read(ids)
    return images.reshape(-1, *images.shape[2:])
