"""The inception score against the paper's formula and torch-fidelity."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.metrics.inception_score import inception_score
from stylepipe.metrics.shuffle import permutation

ROUNDING = 1e-12
"""Relative, of float64."""


def papers(logits: Tensor) -> float:
    """Return exp(E_x KL(p(y|x) || p(y))) from probabilities."""
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    return float(np.exp(np.mean(np.sum(p * np.log(p / p.mean(axis=0)), axis=1))))


def test_score_is_the_papers():
    logits = 3 * torch.randn(50, 7, dtype=torch.float64)
    assert inception_score(logits, splits=1) == (pytest.approx(papers(logits), rel=ROUNDING), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_score_is_torch_fidelitys(fidelity: ModuleType, dtype: torch.dtype):
    logits = 3 * torch.randn(200, 100, dtype=dtype)
    # One split does not depend on the order, which is random in both.
    theirs = fidelity.metric_isc.isc_features_to_metric(logits, splits=1)
    ours = inception_score(logits, splits=1)
    assert ours.mean == pytest.approx(theirs[fidelity.KEY_METRIC_ISC_MEAN], rel=ROUNDING)


def test_splits_are_torch_fidelitys(fidelity: ModuleType):
    logits = 3 * torch.randn(103, 10)  # not a multiple of the splits
    theirs = fidelity.metric_isc.isc_features_to_metric(logits[permutation(103, seed=5)], splits=10, shuffle=False)
    expected = (theirs[fidelity.KEY_METRIC_ISC_MEAN], theirs[fidelity.KEY_METRIC_ISC_STD])
    assert inception_score(logits, seed=5) == pytest.approx(expected, rel=1e-10)


def test_mean_and_deviation_are_those_of_the_splits():
    logits = 3 * torch.randn(12, 5, dtype=torch.float64)
    scores = [papers(part) for part in logits[permutation(12, seed=7)].split(3)]
    assert inception_score(logits, splits=4, seed=7) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-10)


def test_sure_and_various_images_score_the_number_of_classes():
    sure = 1000 * torch.eye(6).repeat(10, 1)
    assert inception_score(sure, splits=1).mean == pytest.approx(6, rel=ROUNDING)
    twice = torch.vstack([sure[:1].repeat(30, 1), sure[1:2].repeat(30, 1)])
    assert inception_score(twice, splits=1).mean == pytest.approx(2, rel=ROUNDING)


@pytest.mark.parametrize("logits", [torch.zeros(20, 6), 1000 * torch.eye(6)[:1].repeat(20, 1), torch.randn(20, 1)])
def test_unsure_or_equal_images_score_one(logits: Tensor):
    assert inception_score(logits) == pytest.approx((1, 0), abs=ROUNDING)


def test_a_common_shift_of_logits_means_nothing():
    logits = 3 * torch.randn(50, 7, dtype=torch.float64)
    moved = logits + 10 * torch.randn(50, 1, dtype=torch.float64)
    assert inception_score(moved) == pytest.approx(inception_score(logits), rel=1e-10)


def test_order_matters_only_for_who_shares_a_split():
    logits = 3 * torch.randn(50, 7, dtype=torch.float64)
    whole = inception_score(logits, splits=1)
    assert inception_score(logits.flip(0), splits=1, seed=9) == pytest.approx(whole, rel=ROUNDING)
    assert inception_score(logits.repeat(3, 1), splits=1) == pytest.approx(whole, rel=ROUNDING)
    assert inception_score(logits, seed=1) == inception_score(logits.requires_grad_(), seed=1)
    assert inception_score(logits, seed=1) != inception_score(logits, seed=2)


def test_classes_beyond_the_range_of_float64_count_nothing():
    logits = torch.tensor([[0.0, 0.0, -5000.0], [2.0, -1.0, -6000.0]])
    assert inception_score(logits, splits=1).mean == pytest.approx(papers(logits[:, :2]), rel=ROUNDING)


def test_unusable_logits_are_named():
    logits = torch.randn(10, 4)
    with pytest.raises(UserError, match=r"fake features: of 9 images; expected at least 10 \(one of each split\)"):
        inception_score(logits[:9])
    assert inception_score(logits) == (1, 0)  # each split has one image, equal to its mean
    logits[3] = -math.inf
    with pytest.raises(UserError, match="fake features: not finite in 1 of 10 images"):
        inception_score(logits)
