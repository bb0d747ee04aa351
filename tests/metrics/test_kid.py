"""The kernel distance against the paper's sums and torch-fidelity."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.metrics.kid import kernel_distance
from stylepipe.metrics.shuffle import permutation

ROUNDING = 1e-10
"""Relative: the three means are some hundred times their sum."""


def samples(count: int, dim: int = 8, mean: float = 0.0) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64) + mean


def squared_discrepancy(x: Tensor, y: Tensor) -> float:
    """Return the unbiased estimate as Gretton et al. 2012 write it, pair by pair."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_distance_of_all_samples_is_the_papers_sum_over_pairs():
    real, fake = samples(12), samples(12, mean=0.5)
    mean, std = kernel_distance(real, fake, subsets=1)
    assert mean == pytest.approx(squared_discrepancy(real, fake), rel=ROUNDING)
    assert std == 0


def test_distance_is_torch_fidelitys(fidelity: ModuleType):
    real, fake = samples(200, dim=64), samples(200, dim=64, mean=0.3)
    # One subset of all samples does not depend on their order, which is random in both.
    theirs = fidelity.metric_kid.kid_features_to_metric(
        real, fake, kid_subsets=1, kid_subset_size=200, rng_seed=0, verbose=False
    )
    ours = kernel_distance(real, fake, subsets=1, subset_size=200)
    assert ours.mean == pytest.approx(theirs[fidelity.KEY_METRIC_KID_MEAN], rel=ROUNDING)


def test_mean_and_deviation_are_those_of_the_subsets():
    real, fake = samples(20), samples(15, mean=0.5)
    subsets = [
        squared_discrepancy(real[permutation(20, 3, 2 * i)[:6]], fake[permutation(15, 3, 2 * i + 1)[:6]])
        for i in range(4)
    ]
    ours = kernel_distance(real, fake, subsets=4, subset_size=6, seed=3)
    assert ours == pytest.approx((np.mean(subsets), np.std(subsets)), rel=ROUNDING)


def test_subsets_follow_from_the_seed():
    real, fake = samples(30), samples(30, mean=0.5)
    first, again, other = (kernel_distance(real, fake, subsets=5, subset_size=10, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.std > 0


def test_seeds_mean_the_same_for_ever():
    # Whoever changes what a seed means must change these numbers knowingly.
    assert permutation(8, seed=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, seed=0, number=1).tolist() != permutation(8, seed=0).tolist()
    assert sorted(permutation(100, seed=-1).tolist()) == list(range(100))


def test_order_and_common_subset_size_do_not_matter():
    real, fake = samples(20), samples(14, mean=0.5)
    limited = kernel_distance(real[:14], fake, subsets=1)
    assert kernel_distance(real[:14].flip(0), fake.roll(5, 0), subsets=1) == pytest.approx(limited, rel=ROUNDING)
    # 14 of 20 real samples are in every subset, each time others.
    assert kernel_distance(real, fake, subsets=3, subset_size=1000).std > 0
    assert kernel_distance(real, fake, subsets=3, subset_size=1000) == kernel_distance(
        real, fake, subsets=3, subset_size=14
    )


def test_the_estimate_is_as_often_above_the_distance_as_below():
    # Of one distribution, it is 0 on average, for however few samples; with its diagonals it would be above 1.
    found = [kernel_distance(samples(5, dim=2), samples(5, dim=2), subsets=1).mean for _ in range(2000)]
    assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(2000)
    assert np.mean(np.array(found) < 0) > 0.3


def test_a_set_against_itself_lacks_its_diagonal():
    x = samples(12)
    kernel = (x @ x.T / 8 + 1) ** 3
    off = (kernel.sum() - kernel.diagonal().sum()) / (12 * 11)
    assert kernel_distance(x, x, subsets=1).mean == pytest.approx(float(2 * off - 2 * kernel.mean()), rel=ROUNDING)


def test_a_set_of_one_point_many_times_is_at_no_distance_of_itself():
    x = torch.ones(10, 4)
    assert kernel_distance(x, x, subsets=3, subset_size=5) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_are_taken_as_they_are_and_calculated_in_float64(dtype: torch.dtype):
    real, fake = samples(12).to(dtype).requires_grad_(), samples(12, mean=0.5).to(dtype)
    expected = squared_discrepancy(real.detach().double(), fake.double())
    assert kernel_distance(real, fake, subsets=1).mean == pytest.approx(expected, rel=ROUNDING)


def test_unusable_features_are_named():
    good, broken = samples(10), samples(10)
    broken[2, 3] = broken[2, 4] = math.nan
    with pytest.raises(UserError, match="fake features: not finite in 1 of 10 images"):
        kernel_distance(good, broken)
    with pytest.raises(UserError, match="real features: of 1 images; expected at least 2"):
        kernel_distance(good[:1], good)
    with pytest.raises(UserError, match="real features: 8 dimensions; expected 4"):
        kernel_distance(good, good[:, :4])
