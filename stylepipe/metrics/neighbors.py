"""Distances to neighbors, without rounding and a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import frexp, ldexp

import torch
from torch import Tensor

ROWS = 1024  # of the matrix of distances at once: 0.4 GB with 50,000 columns


def on_grid(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets moved and scaled alike, and rounded to whole numbers, so that distances have no rounding at all.

    Inner products, and thus squared distances, of whole numbers are exact in float64 while below 2^53. So a point is at
    distance 0 of its copy, equal distances are equal, and neither the order of samples nor the size of blocks nor the
    device can turn a comparison; with matrix products, which take a twentieth of the time of differences.

    The numbers are as large as that allows: a step is 2^-24 of the farthest point's distance from the center or less,
    as it is of float32, and moves distances by about half a step. A power of 2 scales, which leaves features of few
    digits exact. One image that is a thousand times farther away than all others costs three digits.

    Args:
        real: [N, dim] of any float type, finite.
        fake: [M, dim] of any float type, finite, on the same device.

    Returns:
        [N, dim] and [M, dim] float64.
    """
    # The middle of each dimension's range: unlike a mean, it does not depend on the order of samples.
    low = torch.minimum(real.amin(dim=0), fake.amin(dim=0)).double()
    high = torch.maximum(real.amax(dim=0), fake.amax(dim=0)).double()
    center = (low + high) / 2
    real, fake = (x.to(torch.float64, copy=True).sub_(center) for x in (real, fake))
    farthest = max(float(torch.linalg.vector_norm(x, dim=1).max()) for x in (real, fake))
    # To |x| <= 2^25, so that all of |x|^2 + |y|^2 + 2 |<x, y>| is 2^52 at most, and a little for rounding up.
    scale = ldexp(1.0, 25 - frexp(farthest)[1])
    return real.mul_(scale).round_(), fake.mul_(scale).round_()


def squared_distances(x: Tensor, y: Tensor, rows: int = ROWS) -> Iterator[tuple[slice, Tensor]]:
    """Give all squared distances in blocks: which of x, and theirs to y; slice and [n, M] float64.

    Args:
        x: [N, dim] float64, from `on_grid`.
        y: [M, dim] float64, from the same grid.
        rows: of x in a block.
    """
    y_squares = _squares(y)
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        distances = torch.addmm(y_squares, block, y.T, alpha=-2).add_(_squares(block)[:, None])
        yield slice(start, start + len(block)), distances


def squared_radii(x: Tensor, neighbors: int, rows: int = ROWS) -> Tensor:
    """Return each point's squared distance to its `neighbors`-th nearest other one, [N] float64; N > neighbors.

    x: [N, dim] float64, from `on_grid`.
    """
    # A point itself is at distance 0, so that it is always the first.
    nearest = [distances.kthvalue(neighbors + 1, dim=1).values for _, distances in squared_distances(x, x, rows)]
    return torch.cat(nearest)


def _squares(x: Tensor) -> Tensor:
    return torch.einsum("nd,nd->n", x, x)
