"""Precision and recall against the paper's sets and torch-fidelity."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.metrics.precision_recall import precision_recall


def squared_distances(x: Tensor, y: Tensor) -> np.ndarray:
    return np.square(x.double().numpy()[:, None] - y.double().numpy()).sum(axis=2)


def share_within(points: Tensor, manifold: Tensor, k: int) -> float:
    """Return the share of points within the balls about those of `manifold`, as Eq. 1 and 2 of the paper write it."""
    own = squared_distances(manifold, manifold)
    np.fill_diagonal(own, np.inf)
    radii = np.sort(own, axis=1)[:, k - 1]
    return float((squared_distances(points, manifold) <= radii).any(axis=1).mean())


@pytest.mark.parametrize("k", [1, 3, 9])
def test_shares_are_the_papers(k: int):
    real, fake = torch.randn(60, 8), torch.randn(40, 8) * 1.2 + 0.5
    expected = (share_within(fake, real, k), share_within(real, fake, k))
    assert 0 < min(expected) < max(expected) < 1
    assert precision_recall(real, fake, neighbors=k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ties_are_within(k: int):
    # Points of a coarse lattice: most distances occur many times, and many points too.
    real, fake = torch.randint(0, 4, (50, 3)).float(), torch.randint(0, 6, (40, 3)).float()
    expected = (share_within(fake, real, k), share_within(real, fake, k))
    assert precision_recall(real, fake, neighbors=k, rows=16) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("save_cpu_ram", [False, True])
def test_shares_are_torch_fidelitys(fidelity: ModuleType, dtype: torch.dtype, save_cpu_ram: bool):
    real, fake = torch.randn(300, 16, dtype=dtype), torch.randn(250, 16, dtype=dtype) * 1.1 + 0.2
    theirs = fidelity.metric_prc.prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=save_cpu_ram, verbose=False
    )
    expected = (theirs[fidelity.KEY_METRIC_PRECISION], theirs[fidelity.KEY_METRIC_RECALL])
    assert 0.2 < min(expected) < max(expected) < 0.98
    assert precision_recall(real, fake) == pytest.approx(expected, rel=1e-6)  # their mean is one of float32


def test_points_on_a_line():
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[-1.0], [5.0], [5.5], [9.0]])
    # About real: [-1, 1], [0, 2], [1, 5]. About fake: [-7, 5], [4.5, 5.5], [5, 6], [5.5, 12.5].
    assert precision_recall(real, fake, neighbors=1) == (2 / 4, 3 / 3)


def test_a_set_is_within_itself_and_far_from_others():
    x = torch.randn(30, 5)
    assert precision_recall(x, x[torch.randperm(30)]) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_one_image_many_times_is_precise_and_recalls_nothing():
    real = torch.randn(30, 5)
    assert precision_recall(real, real[:1].repeat(20, 1)) == (1, 1 / 30)  # itself, at distance 0 of a ball of radius 0
    assert precision_recall(real, real.mean(0, keepdim=True).repeat(20, 1) + 1e-3).recall == 0


def test_copies_are_found_where_norms_are_large():
    # By |x|^2 + |y|^2 - 2 <x, y> in float32, these would be 10^3 apart or imaginary.
    spread = torch.randn(40, 512) + 3000
    real = spread.repeat(4, 1)  # so that three neighbors of each are copies, and radii are 0
    assert precision_recall(real, spread) == (1, 1)
    assert precision_recall(real, spread + 2**-8).precision == 0


def test_neither_order_nor_blocks_nor_place_matter():
    real, fake = torch.randn(60, 4), torch.randn(40, 4) * 1.5
    expected = precision_recall(real, fake)
    assert precision_recall(real[torch.randperm(60)], fake[torch.randperm(40)]) == expected
    for rows in (1, 13, 1000):
        assert precision_recall(real, fake, rows=rows) == expected
    for moved in ((real + 64, fake + 64), (real * 2**20, fake * 2**20), (real.double(), fake.double())):
        assert precision_recall(*moved) == expected
    assert precision_recall(real.requires_grad_(), fake) == expected


def test_exchanged_sets_exchange_precision_and_recall():
    real, fake = torch.randn(60, 4), torch.randn(40, 4) * 1.5
    assert precision_recall(fake, real) == precision_recall(real, fake)[::-1]


def test_unusable_features_are_named():
    good, broken = torch.randn(10, 4), torch.randn(10, 4)
    broken[2, 3] = math.nan
    with pytest.raises(UserError, match="fake features: not finite in 1 of 10 images"):
        precision_recall(good, broken)
    with pytest.raises(UserError, match=r"fake features: of 3 images; expected at least 4 \(3 neighbors of each\)"):
        precision_recall(good, good[:3])
    with pytest.raises(UserError, match="real features: of 10 images; expected at least 11"):
        precision_recall(good, good, neighbors=10)
    assert precision_recall(good, good, neighbors=9) == (1, 1)
