"""Density and coverage against the paper's sums and expectations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.metrics.density_coverage import density_coverage


def papers(real: Tensor, fake: Tensor, k: int) -> tuple[float, float]:
    """Return density and coverage as section 3 of the paper writes them, with balls that lack their border."""
    x, y = real.double().numpy(), fake.double().numpy()
    n, m = len(x), len(y)
    radii = [np.sort([np.square(x[i] - x[j]).sum() for j in range(n) if j != i])[k - 1] for i in range(n)]
    within = [[np.square(y[j] - x[i]).sum() < radii[i] for j in range(m)] for i in range(n)]
    density = sum(within[i][j] for j in range(m) for i in range(n)) / (k * m)
    coverage = sum(any(within[i]) for i in range(n)) / n
    return density, coverage


@pytest.mark.parametrize("k", [1, 5])
def test_numbers_are_the_papers(k: int):
    real, fake = torch.randn(60, 4), torch.randn(40, 4) * 1.2 + 0.4
    expected = papers(real, fake, k)
    assert expected[0] != 1
    assert 0 < expected[1] < 1
    assert density_coverage(real, fake, neighbors=k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_borders_are_outside(k: int):
    # Points of a coarse lattice: most distances occur many times, and many points too.
    real, fake = torch.randint(0, 4, (50, 3)).float(), torch.randint(0, 6, (40, 3)).float()
    assert density_coverage(real, fake, neighbors=k, rows=16) == pytest.approx(papers(real, fake, k))


def test_points_on_a_line():
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [1.5], [1.75], [5.0]])
    # About real, without borders: (-1, 1), (0, 2), (1, 5). In them: 1, 3 and 2 samples.
    assert density_coverage(real, fake, neighbors=1) == (6 / 4, 1)
    assert density_coverage(real, fake[3:], neighbors=1) == (0, 0)


def test_a_copy_of_the_real_set_has_one_of_both():
    x = torch.randn(40, 6)
    assert density_coverage(x, x[torch.randperm(40)]) == (1, 1)
    assert density_coverage(x, x + 100) == (0, 0)


def test_equal_distributions_have_the_expected_numbers():
    n, m, k = 30, 20, 5
    found = np.array([density_coverage(torch.randn(n, 3), torch.randn(m, 3), neighbors=k) for _ in range(400)])
    # A ball has no generated sample where the k nearest of all others, N - 1 real and M generated, are real.
    empty = math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    deviation = found.std(axis=0) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - [1, 1 - empty]) < 4 * deviation)


def test_one_outlier_makes_no_density():
    real = torch.vstack([torch.randn(99, 4) / 10, torch.full((1, 4), 50.0)])
    lost = torch.full((40, 4), 20.0)  # in the ball of the outlier only
    assert density_coverage(real, lost) == (1 / 5, 1 / 100)


def test_one_image_many_times_covers_next_to_nothing():
    real = torch.randn(200, 6)
    assert density_coverage(real, real[:1].repeat(50, 1)).coverage < 0.2


def test_an_image_more_often_than_neighbors_has_an_empty_ball():
    real = torch.vstack([torch.zeros(6, 2), torch.randn(30, 2) + 100])
    assert density_coverage(real, real, neighbors=5).coverage == 30 / 36
    assert density_coverage(real, real, neighbors=6).coverage == 1


def test_neither_order_nor_blocks_nor_place_matter():
    real, fake = torch.randn(60, 4), torch.randn(40, 4) * 1.5
    expected = density_coverage(real, fake)
    assert density_coverage(real[torch.randperm(60)], fake[torch.randperm(40)]) == expected
    for rows in (1, 13, 1000):
        assert density_coverage(real, fake, rows=rows) == expected
    for moved in ((real + 64, fake + 64), (real * 2**20, fake * 2**20), (real.double(), fake.double())):
        assert density_coverage(*moved) == expected
    assert density_coverage(real.requires_grad_(), fake) == expected


def test_unusable_features_are_named():
    good, broken = torch.randn(10, 4), torch.randn(10, 4)
    broken[2, 3] = math.inf
    with pytest.raises(UserError, match="real features: not finite in 1 of 10 images"):
        density_coverage(broken, good)
    with pytest.raises(UserError, match=r"real features: of 5 images; expected at least 6 \(5 neighbors"):
        density_coverage(good[:5], good)
    with pytest.raises(UserError, match="fake features: of 0 images; expected at least 1"):
        density_coverage(good, good[:0])
    assert density_coverage(good, good[:1]).coverage > 0
