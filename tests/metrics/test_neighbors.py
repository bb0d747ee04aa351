"""Distances without rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stylepipe.metrics.neighbors import on_grid, squared_distances, squared_radii


def all_distances(x: Tensor, y: Tensor, rows: int = 1024) -> Tensor:
    return torch.cat([distances for _, distances in squared_distances(x, y, rows)])


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 2047, 2048, 2049])
def test_distances_of_the_farthest_corners_are_exact(dim: int):
    # Opposite corners, which have the largest sums, and odd points between.
    x = torch.stack([torch.ones(dim), -torch.ones(dim), torch.linspace(-1, 1, dim), torch.rand(dim)]).float()
    a, b = on_grid(x, x[:2] * 0.999)
    assert a.dtype == torch.float64
    whole = [[int(v) for v in row] for row in a.tolist()]
    exact = [[sum((p - q) ** 2 for p, q in zip(v, w, strict=True)) for w in whole] for v in whole]
    assert all_distances(a, a).tolist() == exact
    assert (b == b.round()).all()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_grid_is_as_fine_as_float32(offset: float):
    real, fake = torch.randn(40, 2048) + offset, 1.3 * torch.randn(30, 2048) + offset
    a, b = on_grid(real, fake)
    found = all_distances(b, a).sqrt()
    expected = torch.cdist(fake.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    ratio = found / expected  # the unit is arbitrary
    assert float(ratio.max() / ratio.min()) - 1 < 1e-7  # float32 has 2^-24 = 6e-8


def test_whole_numbers_stay_what_they_are():
    real, fake = torch.randint(-9, 10, (20, 6)), torch.randint(-9, 10, (10, 6))
    a, b = on_grid(real.half(), fake.half())
    exact = (fake[:, None] - real).square().sum(dim=2)
    unit = all_distances(b, a).max() / exact.max()
    assert torch.equal(all_distances(b, a), exact * unit)


def test_distances_depend_on_no_block_and_no_order():
    a, b = on_grid(torch.randn(50, 100), torch.randn(23, 100))
    at_once = all_distances(b, a)
    for rows in (1, 7, 23):
        assert torch.equal(all_distances(b, a, rows), at_once)
    order = torch.randperm(50)
    assert torch.equal(all_distances(b, a[order]), at_once[:, order])
    assert torch.equal(all_distances(a, b), at_once.T)
    assert (all_distances(a, a).diagonal() == 0).all()


def test_a_radius_reaches_to_another_sample():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    on, _ = on_grid(x, x)
    unit = all_distances(on, on)[0, 1]
    assert (squared_radii(on, 1) / unit).tolist() == [1, 1, 4, 16]
    assert (squared_radii(on, 2, rows=3) / unit).tolist() == [9, 4, 9, 36]
    assert (squared_radii(on, 3) / unit).tolist() == [49, 36, 16, 49]


def test_a_copy_of_a_sample_is_its_neighbor():
    x = torch.randn(5, 3).repeat(2, 1)
    on, _ = on_grid(x, x)
    assert (squared_radii(on, 1) == 0).all()
    assert (squared_radii(on, 2) > 0).all()


def test_points_without_extent_are_at_no_distance():
    on, other = on_grid(torch.full((4, 3), 2.5), torch.full((2, 3), 2.5))
    assert (all_distances(on, other) == 0).all()
