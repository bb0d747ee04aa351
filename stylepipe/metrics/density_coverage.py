"""Precision and recall that single outliers cannot lift."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stylepipe.metrics.checks import checked_pair
from stylepipe.metrics.neighbors import ROWS, on_grid, squared_distances, squared_radii


class DensityCoverage(NamedTuple):
    """What is expected of equal distributions is known.

    Attributes:
        density: in how many balls about real samples a generated one is, over `neighbors`; 0 or more, and 1 of equal
            distributions.
        coverage: the share of balls about real samples with a generated one in them, from 0 to 1; near 1 - 2^-neighbors
            of equal distributions and equally many, large sets.
    """

    density: float
    coverage: float


def density_coverage(real: Tensor, fake: Tensor, *, neighbors: int = 5, rows: int = ROWS) -> DensityCoverage:
    """Count generated samples in balls about real ones (Naeem et al. 2020, arXiv:2002.09797, section 3).

    A ball reaches to the `neighbors`-th nearest other real sample, and has no border, as in the authors' code: a copy
    of the real set has density 1. (With borders, as `precision_recall` has them, it would be 1 + 1 / neighbors.)
    A real sample of which there are more than `neighbors` copies has thus an empty ball, which nothing covers.

    Args:
        real: [N, dim] of any float type.
        fake: [M, dim] of any float type; calculated on its device. Compare coverage of equal N and M only.
        neighbors: k of the paper, which has 5.
        rows: how many rows of the matrix of distances there are at once; the result does not depend on it.

    Raises:
        UserError: not more than `neighbors` real samples, no generated ones, features that are not finite, or of
            different dimensions.
    """
    assert neighbors > 0, neighbors
    real, fake = checked_pair(real, fake, at_least=(neighbors + 1, 1), reason=f"{neighbors} neighbors of each real one")
    real, fake = on_grid(real, fake)
    radii = squared_radii(real, neighbors, rows)
    inside = torch.zeros((), dtype=torch.int64, device=fake.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, distances in squared_distances(fake, real, rows):
        within = distances < radii
        inside += within.sum()
        covered |= within.any(dim=0)
    return DensityCoverage(int(inside) / (neighbors * len(fake)), float(covered.double().mean()))
