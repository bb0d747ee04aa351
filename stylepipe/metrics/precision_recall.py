"""How many generated images look real, and how many real ones could have been generated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stylepipe.metrics.checks import checked_pair
from stylepipe.metrics.neighbors import ROWS, on_grid, squared_distances, squared_radii


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1.

    Attributes:
        precision: of generated samples within the manifold of real ones.
        recall: of real samples within the manifold of generated ones.
    """

    precision: float
    recall: float


def precision_recall(real: Tensor, fake: Tensor, *, neighbors: int = 3, rows: int = ROWS) -> PrecisionRecall:
    """Compare manifolds: unions of balls about all samples (Kynkäänniemi et al. 2019, arXiv:1904.06991, Eq. 1 and 2).

    A ball reaches to the `neighbors`-th nearest other sample of the same set, and has its border.

    Args:
        real: [N, dim] of any float type.
        fake: [M, dim] of any float type; calculated on its device. Compare numbers of equal N and M only.
        neighbors: k of the paper, which has 3.
        rows: how many rows of the matrix of distances there are at once; the result does not depend on it.

    Raises:
        UserError: not more than `neighbors` samples, features that are not finite, or of different dimensions.
    """
    assert neighbors > 0, neighbors
    real, fake = checked_pair(real, fake, at_least=(neighbors + 1,) * 2, reason=f"{neighbors} neighbors of each")
    real, fake = on_grid(real, fake)
    real_radii, fake_radii = squared_radii(real, neighbors, rows), squared_radii(fake, neighbors, rows)
    looks_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    could_be_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for block, distances in squared_distances(fake, real, rows):
        looks_real[block] = (distances <= real_radii).any(dim=1)
        could_be_fake |= (distances <= fake_radii[block, None]).any(dim=0)
    return PrecisionRecall(float(looks_real.double().mean()), float(could_be_fake.double().mean()))
