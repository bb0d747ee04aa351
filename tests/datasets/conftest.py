"""Small photographs and datasets for the tests of the data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stylepipe.datasets import order
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.shards import ShardDataset, open_dataset

sys.path.append(str(Path(__file__).parent))  # for helpers of several files; pytest's importlib mode leaves it out


def save_photo(path: Path, size: tuple[int, int] = (40, 50), seed: int = 0) -> None:
    """Write a smooth random picture of this width and height, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Give a folder of 23 photographs of several formats and sizes in two sub-folders, all at least 33 px."""
    folder = tmp_path / "photos"
    for i in range(23):
        suffix = (".png", ".jpg", ".webp", ".bmp")[i % 4]
        save_photo(folder / ("cats", "dogs")[i % 2] / f"{i:03d}{suffix}", (33 + i, 60 - i), seed=i)
    return folder


@pytest.fixture
def in_stored_order() -> Callable[[Sequence[Any]], list[Any]]:
    """Give a function that puts what belongs to images, in the order of their names' bytes, into that of the shards."""
    return lambda items: [items[index] for index in order.image_ids(np.arange(len(items)), len(items), seed=0)]


@pytest.fixture
def prepared(photos: Path, tmp_path: Path) -> Path:
    """Give the folder of a prepared dataset of 23 labelled images of 16 px in several shards."""
    prepare(
        photos, tmp_path / "prepared", Preparation(16, labels=True, shard_mb=8192 / 2**20), workers=1, progress=False
    )
    return tmp_path / "prepared"


@pytest.fixture
def dataset(prepared: Path) -> ShardDataset:
    """Open `prepared`."""
    return open_dataset(prepared)
