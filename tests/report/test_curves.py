"""Curves that are thinned without losing what matters, and their groups."""

from __future__ import annotations

import numpy as np
import pytest

from stylepipe.report.curves import grouped, latest, thinned, trained_seconds
from stylepipe.report.run import Curve


def curve(y: list[float] | np.ndarray) -> Curve:
    return Curve(np.arange(1, len(y) + 1) * 100, np.asarray(y, dtype=np.float64))


def test_a_short_curve_stays_as_it_is() -> None:
    assert thinned(curve([1, np.nan, 0.123456789])) == {"x": [100, 200, 300], "y": [1, None, 0.12346]}


def test_the_extremes_of_a_long_curve_stay() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=25_000)
    y[12_345], y[777], y[0], y[-1] = 90, -90, 5, 6
    thin = thinned(curve(y), 600)
    assert len(thin["x"]) <= 600
    assert thin["x"] == sorted(set(thin["x"]))
    kept = dict(zip(thin["x"], thin["y"], strict=True))
    assert (kept[1_234_600], kept[77_800], kept[100], kept[2_500_000]) == (90, -90, 5, 6)
    assert all(np.isclose(y[x // 100 - 1], value, rtol=1e-4) for x, value in kept.items())
    # The envelope: of every stretch of 100 lines the extremes are there.
    for start in range(0, 25_000, 1000):
        part = [value for x, value in kept.items() if start < x // 100 <= start + 1000]
        assert max(part) == pytest.approx(y[start : start + 1000].max(), rel=1e-4)
        assert min(part) == pytest.approx(y[start : start + 1000].min(), rel=1e-4)


def test_smoothing_has_means_not_extremes() -> None:
    y = np.where(np.arange(10_000) % 10, 0.0, 10.0)  # mean 1, halfway between the extremes is 5
    thin = thinned(curve(y), 600)
    assert np.mean(thin["my"]) == pytest.approx(1, abs=0.01)
    assert len(thin["mx"]) == len(thin["my"]) < 300


def test_a_short_gap_in_a_long_curve_stays() -> None:
    y = np.ones(25_000)
    y[9_000] = np.nan
    y[20_000:21_000] = np.nan
    thin = thinned(curve(y), 600)
    assert len(thin["x"]) <= 600
    gaps = [x for x, value in zip(thin["x"], thin["y"], strict=True) if value is None]
    assert 900_100 in gaps
    assert len(gaps) > 5


def test_nothing_finite() -> None:
    thin = thinned(curve(np.full(5000, np.nan)), 100)
    assert set(thin["y"]) == set(thin["my"]) == {None}


def test_groups() -> None:
    keys = [
        *("Loss/G/adversarial", "Loss/D/r1", "Logits/real", "Logits/real_sign", "Gradient/G/main/norm"),
        *("Gradient/G/main/skipped", "Timing/sec_per_kimg", "New/thing", "alone", "Progress/kimg", "world_size"),
    ]
    groups = {group.title: group.keys for group in grouped(keys)}
    assert groups["Losses"] == ["Loss/G/adversarial", "Loss/D/r1"]
    assert groups["Logits"] == ["Logits/real"]
    assert groups["Signs of logits"] == ["Logits/real_sign"]
    assert groups["Gradient norms"] == ["Gradient/G/main/norm"]
    assert (groups["New"], groups["Other"]) == (["New/thing"], ["alone"])
    assert sum(map(len, groups.values())) == len(keys) - 2, "but for the clock, none is lost"
    assert next(iter(groups)) == "Losses"


def test_time_of_training() -> None:
    assert trained_seconds(Curve(np.array([1000, 3000]), np.array([10.0, 20.0]))) == 50
    assert trained_seconds(Curve(np.array([9000, 10000]), np.array([10.0, 20.0]))) == 30, "it goes on from 8 kimg"
    assert latest(curve([1, 2, np.nan])) == 2
    assert latest(curve([np.nan])) is latest(None) is trained_seconds(None) is None
