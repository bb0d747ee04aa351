"""The probability follows overfitting as the paper says: speed, target, interval, bounds, state."""

from __future__ import annotations

import math

import pytest
import torch

from stylepipe.augment.controller import AdaptiveProbability, cosine_rise

CPU = torch.device("cpu")


def controller(start: float = 0.0, interval: int = 4, images_per_unit: float = 500_000) -> AdaptiveProbability:
    return AdaptiveProbability(start, 0.6, interval, images_per_unit, CPU)


def test_p_takes_the_stated_images_from_0_to_1() -> None:
    ada = controller(images_per_unit=64_000)
    for step in range(999):
        ada.follow(torch.tensor(0.9), 64)
        assert math.isclose(float(ada.p), (step + 1) // 4 * 4 * 64 / 64_000, rel_tol=1e-4)  # 250 sums of float32
    for _ in range(50):
        ada.follow(torch.tensor(0.9), 64)
    assert float(ada.p) == 1  # and no further


def test_p_falls_below_the_target_and_stops_at_0() -> None:
    ada = controller(start=0.01, interval=1, images_per_unit=1000)
    ada.follow(torch.tensor(0.59), 8)
    assert float(ada.p) == pytest.approx(0.002)
    ada.follow(torch.tensor(0.59), 8)
    assert float(ada.p) == 0


def test_the_mean_over_the_interval_decides() -> None:
    ada = controller(start=0.5, images_per_unit=400)
    for sign in (1.0, 1.0, 0.4, 0.2):  # mean 0.65
        assert float(ada.p) == 0.5
        ada.follow(torch.tensor(sign), 10)
    assert float(ada.p) == pytest.approx(0.6)
    for sign in (0.0, 0.0, 1.0, 1.0):  # the interval before is forgotten: mean 0.5
        ada.follow(torch.tensor(sign), 10)
    assert float(ada.p) == pytest.approx(0.5)


def test_a_step_that_failed_leaves_p_a_number() -> None:
    ada = controller(start=0.5, interval=1, images_per_unit=100)
    ada.follow(torch.tensor(math.nan), 10)
    assert float(ada.p) == 0.5
    ada.follow(torch.tensor(1.0), 10)
    assert float(ada.p) == pytest.approx(0.6)


def test_the_state_is_all_there_is() -> None:
    signs = torch.rand(13, generator=torch.Generator().manual_seed(0))
    through, first, second = controller(0.3), controller(0.3), controller()
    for sign in signs:
        through.follow(sign, 1000)
    for sign in signs[:6]:
        first.follow(sign, 1000)
    for name, tensor in first.state.items():
        second.state[name].copy_(tensor)
    for sign in signs[6:]:
        second.follow(sign, 1000)
    assert torch.equal(second.p, through.p)


def test_a_schedule_rises_along_half_a_cosine() -> None:
    assert [round(cosine_rise(seen, 1000, 0.3), 6) for seen in (0, 250, 500, 1000, 9999)] == [
        0,
        round(0.15 * (1 - math.sqrt(0.5)), 6),
        0.15,
        0.3,
        0.3,
    ]
