"""A training small enough for tests, with every phase due and every augmentation on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from stylepipe.config import AugmentConfig, Config, LossConfig, NetworkConfig
from stylepipe.datasets.reader import Batch
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training.engine import Engine

TINY = Config(
    res=16,
    batch_size=8,
    batch_gpu=4,
    network=NetworkConfig(z_dim=16, w_dim=16, channel_base=128, channel_max=16, mapping_layers=2),
    loss=LossConfig(r1_interval=2, pl_interval=2, r1_gamma=5.0),
    augment="ada",
    aug=AugmentConfig(pipe="bgcfnc", p=0.5, interval=2, speed_kimg=0.1),
)


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """Give a function that makes an engine on the CPU from TINY and changes of it."""

    def make(rank: int = 0, world_size: int = 1, c_dim: int = 0, **changes: object) -> Engine:
        config = with_precision(resolve(dataclasses.replace(TINY, **changes), world_size), "fp32")
        labels = torch.eye(c_dim)
        device = torch.device("cpu")
        recipe = GANRecipe(config, device, c_dim, lambda rows: labels[rows], c_dim or 1, world_size=world_size)
        return Engine(
            recipe,
            optim=config.optim,
            ema=config.ema,
            rank=rank,
            world_size=world_size,
        )

    return make


@pytest.fixture
def batch_at() -> Callable[[int], Batch]:
    """Give a function that makes the global batch of eight 16 px images that begins at a position."""

    def batch(start: int, count: int = 8, c_dim: int = 0) -> Batch:
        positions = torch.arange(start, start + count)
        images = torch.stack(
            [
                torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(int(p)))
                for p in positions
            ]
        )
        labels = torch.eye(c_dim)[positions % c_dim] if c_dim else torch.zeros(count, 0)
        return Batch(images, labels, positions)

    return batch
