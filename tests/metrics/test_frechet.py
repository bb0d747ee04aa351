"""The Fréchet distance against closed forms, scipy and torch-fidelity; moments against NumPy."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.metrics.frechet import Moments, frechet_distance

ROUNDING = 1e-11
"""Relative, of float64 after some hundred operations: far below what a wrong formula makes, such as N for N - 1."""


def moments_of(features: Tensor) -> Moments:
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments


def distance(real: Tensor, fake: Tensor) -> float:
    return frechet_distance(moments_of(real), moments_of(fake))


def correlated(count: int, dim: int, mean: float = 0.0) -> Tensor:
    """Draw samples with covariances and unequal deviations, [count, dim] float64."""
    mix = torch.randn(dim, dim, dtype=torch.float64) / dim**0.5 + torch.diag(torch.linspace(0.1, 2, dim).double())
    return torch.randn(count, dim, dtype=torch.float64) @ mix + mean


def gaussian(mean: list[float], covariance: list[list[float]], count: int = 50) -> Tensor:
    """Draw samples whose own mean and covariance (over N - 1) are those given, [count, dim] float64."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    spread = torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)) @ white
    return spread.T + torch.tensor(mean, dtype=torch.float64)


def test_distance_of_independent_gaussians_is_that_of_means_and_deviations():
    real = gaussian([1.0, 2.0, 3.0], [[4.0, 0, 0], [0, 9.0, 0], [0, 0, 1.0]])
    fake = gaussian([1.0, 0.0, 4.0], [[1.0, 0, 0], [0, 16.0, 0], [0, 0, 1.0]], count=70)
    assert distance(real, fake) == pytest.approx((0 + 4 + 1) + (2 - 1) ** 2 + (3 - 4) ** 2 + 0, rel=ROUNDING)


def test_distance_of_gaussians_that_share_no_axes():
    a, b = np.array([[2.0, 1.2], [1.2, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    # Of 2 x 2, by Cayley and Hamilton: tr(M^(1/2)) = (tr M + 2 (det M)^(1/2))^(1/2).
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = 0.25 + np.trace(a + b) - 2 * root
    real, fake = gaussian([0.0, 0.5], a.tolist()), gaussian([0.0, 0.0], b.tolist())
    assert distance(real, fake) == pytest.approx(expected, rel=ROUNDING)


def test_distance_is_that_of_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    real, fake = correlated(200, 16), correlated(150, 16, mean=0.3)
    s_r, s_f = np.cov(real.numpy(), rowvar=False), np.cov(fake.numpy(), rowvar=False)
    root = linalg.sqrtm(s_r @ s_f).real
    expected = float((real.mean(0) - fake.mean(0)).square().sum()) + np.trace(s_r + s_f - 2 * root)
    assert distance(real, fake) == pytest.approx(expected, rel=1e-9)  # of roots of a matrix that is not normal


@pytest.mark.parametrize(("count", "dim"), [(400, 48), (40, 96)])
def test_distance_is_torch_fidelitys(fidelity: ModuleType, count: int, dim: int):
    real, fake = correlated(count, dim), correlated(count, dim, mean=0.3)
    fid = fidelity.metric_fid
    statistics = [fid.fid_features_to_statistics(features) for features in (real, fake)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)[fidelity.KEY_METRIC_FID]
    # Of the singular covariances, theirs has roots of rounding, 1e-8 each.
    assert distance(real, fake) == pytest.approx(expected, rel=ROUNDING if count > dim else 1e-6)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (20, 30), (10, 100)])
def test_fewer_samples_than_dimensions_cost_no_accuracy(n: int, m: int):
    real, fake = correlated(n, 64), correlated(m, 64, mean=0.3)
    # Centered samples are a factor of their covariance: no root of a matrix is in this.
    x, y = ((f - f.mean(0)).numpy() / math.sqrt(len(f) - 1) for f in (real, fake))
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = float((real.mean(0) - fake.mean(0)).square().sum()) + np.square(x).sum() + np.square(y).sum() - 2 * root
    assert distance(real, fake) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(("count", "dim"), [(300, 24), (20, 64), (2, 3)])
def test_a_set_is_at_no_distance_of_itself(count: int, dim: int):
    features = correlated(count, dim, mean=5.0)
    shuffled = features[torch.randperm(count)]
    variance = float(features.var(dim=0).sum())
    for other in (features, shuffled):
        assert 0 <= distance(features, other) <= 1e-12 * variance


def test_constant_features_do_no_harm():
    real, fake = correlated(100, 8), correlated(100, 8)
    expected = distance(real, fake)
    constant = torch.full((100, 3), 7.25, dtype=torch.float64)
    assert distance(torch.hstack([constant, real]), torch.hstack([constant, fake])) == pytest.approx(expected, rel=1e-9)
    assert distance(constant, constant - 2) == pytest.approx(3 * 4, rel=ROUNDING)


def test_distance_counts_a_shift_squared_and_a_common_one_not_at_all():
    real, fake = correlated(100, 8), correlated(100, 8)
    fake = fake - fake.mean(0) + real.mean(0)
    at_rest = distance(real, fake)
    assert distance(real + 50, fake + 50) == pytest.approx(at_rest, rel=1e-9)  # (50 / deviation)^2 roundings
    assert distance(real, fake + 3) == pytest.approx(at_rest + 8 * 9, rel=ROUNDING)


def test_distance_does_not_depend_on_which_set_is_which():
    real, fake = moments_of(correlated(30, 16)), moments_of(correlated(12, 16))
    assert frechet_distance(real, fake) == pytest.approx(frechet_distance(fake, real), rel=ROUNDING)


def test_samples_given_twice_change_the_covariance_by_its_denominator():
    features = correlated(10, 4)
    shrinking = math.sqrt(2 * (10 - 1) / (2 * 10 - 1))  # of the deviation
    expected = float(features.var(dim=0).sum()) * (1 - shrinking) ** 2
    assert distance(features, features.repeat(2, 1)) == pytest.approx(expected, rel=1e-9)  # 1e-3 of what is subtracted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_moments_are_numpys(dtype: torch.dtype):
    features = correlated(60, 5, mean=1.0).to(dtype).requires_grad_()
    moments = moments_of(features)
    exact = features.detach().double().numpy()
    assert moments.count == 60
    np.testing.assert_allclose(moments.mean.numpy(), exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(exact, rowvar=False), rtol=1e-11, atol=1e-13)
    assert moments.mean.dtype == moments.covariance.dtype == moments.state.dtype == torch.float64
    assert not moments.state.requires_grad


def test_features_far_from_zero_keep_their_covariance():
    features = (torch.randn(5000, 3) + 1000).float()
    moments = Moments(3)
    for batch in features.split(64):
        moments.add(batch)
    # What cancels is 10^6 of what remains: each of the 79 batches may round sums of products by 2^-53 of themselves,
    # and those of features, whose products are taken away, by as much. How far it does is up to the CPU's kernels.
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(moments.covariance.numpy(), expected, rtol=0, atol=2 * 79 * 2**-53 * 1000**2)


def test_moments_of_parts_are_those_of_the_whole():
    features = correlated(101, 6, mean=2.0)
    whole = moments_of(features)
    streamed = Moments(6)
    for batch in features.split(7):
        streamed.add(batch)
    streamed.add(features[:0])
    first, second = moments_of(features[:40]), moments_of(features[40:])
    reduced = Moments.from_state(first.state + second.state)  # what an all-reduce makes
    first.merge(second)
    for parts in (streamed, first, reduced):
        assert parts.count == 101
        torch.testing.assert_close(parts.state, whole.state, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(parts.covariance, whole.covariance, rtol=ROUNDING, atol=1e-13)


def test_stored_moments_go_on_by_themselves():
    moments = moments_of(correlated(10, 4))
    restored = Moments.from_state(moments.state)
    assert restored.dim == 4
    torch.testing.assert_close(restored.covariance, moments.covariance, rtol=0, atol=0)
    restored.add(torch.ones(1, 4))
    assert (moments.count, restored.count) == (10, 11)


@pytest.mark.parametrize("state", [torch.zeros(0), torch.zeros(1), torch.zeros(8), torch.zeros(1, 7)])
def test_numbers_that_are_no_moments_are_refused(state: Tensor):
    with pytest.raises(UserError, match=r"moments of features: found numbers of shape \[.*expected 1 \+ dim \+ dim\^2"):
        Moments.from_state(state)


@pytest.mark.parametrize("count", [0, 1])
def test_one_sample_is_too_few(count: int):
    few, many = moments_of(torch.zeros(count, 4)), moments_of(correlated(5, 4))
    with pytest.raises(UserError, match=rf"fake features: of {count} images; expected at least 2"):
        frechet_distance(many, few)
    with pytest.raises(UserError, match=rf"real features: of {count} images"):
        frechet_distance(few, many)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_named(value: float):
    features = correlated(10, 4)
    broken = features.clone()
    broken[3, 1] = broken[4, 2] = value
    with pytest.raises(UserError, match="fake features: not finite in 2 of 4 dimensions"):
        distance(features, broken)
    with pytest.raises(UserError, match="real features: not finite in 2 of 4 dimensions"):
        distance(broken, features)


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(UserError, match="real features: 5 dimensions; expected 4"):
        distance(correlated(9, 5), correlated(9, 4))
