"""Draws that make happen what a test wants."""

from __future__ import annotations

import torch
from torch import Tensor

from stylepipe.augment.ada import AdaPipeline
from stylepipe.augment.columns import CHANCES, NORMALS, UNIFORMS

ALWAYS, NEVER = torch.tensor(1.0), torch.tensor(0.0)


def chosen(n: int, happens: tuple[str, ...], **values: float) -> tuple[Tensor, Tensor]:
    """Return (uniform, normal) of n images with which, at p in (0, 1], just `happens` does.

    `values` are those of its uniform and normal columns; where both have one of that name, of the uniform.
    """
    assert set(happens) <= set(CHANCES), happens
    assert set(values) <= {*UNIFORMS, *NORMALS}, values
    # A uniform number of 1 never happens, which no real draw is.
    row = [0.0 if name in happens else 1.0 for name in CHANCES] + [values.get(name, 0.5) for name in UNIFORMS]
    return torch.tensor([row] * n), torch.tensor([[values.get(name, 0.0) for name in NORMALS]] * n)


def quantile(n: int, q: float) -> tuple[Tensor, Tensor]:
    """Return (uniform, normal) of n images that stand at the quantile q, everything happening.

    Normal numbers are erfinv(2q - 1), without the square root of 2, and the second rotation is by 0.
    """
    uniform, _ = chosen(n, tuple(CHANCES), **(dict.fromkeys(UNIFORMS, q) | {"rotate_after": 0.5}))
    return uniform, torch.full((n, len(NORMALS)), float(torch.erfinv(torch.tensor(2 * q - 1))))


def random(pipeline: AdaPipeline, n: int) -> tuple[Tensor, Tensor]:
    """Return (uniform, normal) of n images as a training has them."""
    return torch.rand(n, pipeline.num_uniform), torch.randn(n, pipeline.num_normal)


def smooth_images(n: int, res: int) -> Tensor:
    """Return [n, 3, res, res] in [-1, 1] of low frequencies and without symmetry, which resampling hardly blurs."""
    y, x = torch.meshgrid(torch.arange(res) / res, torch.arange(res) / res, indexing="ij")
    phase = torch.arange(3.0 * n).reshape(n, 3, 1, 1)
    return (2.1 * x + 0.7 + phase).sin() * 0.6 + (1.3 * y * (1 + x) + phase).cos() * 0.4
