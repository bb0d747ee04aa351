"""Averages of any length after the training: the profile, the update, the sum of stored ones, and exact resuming."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from no_host_sync import NoHostSync
from torch import nn

from stylepipe.config import Config, EMAConfig, GrowthConfig
from stylepipe.errors import UserError
from stylepipe.presets import resolve
from stylepipe.training.arena import Arena
from stylepipe.training.power_ema import (
    MAX_SIGMA_REL,
    MIN_SIGMA_REL,
    SIGMA_RELS,
    PowerEMA,
    averages_file,
    averages_files,
    gamma_of,
    inner_product,
    power_decay,
    profile_weights,
    remove_later_averages,
    sigma_rel_of,
)

LENGTHS = (0.01, 0.02, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.28)
POWER_NAMES = {"G.power_0.050", "G.power_0.100", "G.power_start"}


def profile(times: np.ndarray, end: float, gamma: float) -> np.ndarray:
    """p(t) = (gamma + 1) t^gamma / T^(gamma + 1) up to T, and 0 after."""
    return np.where(times <= end, (gamma + 1) * (times / end) ** gamma / end, 0.0)


def integral(values: np.ndarray, times: np.ndarray) -> float:
    return float(np.trapezoid(values, times))


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_gamma_and_length_are_two_names_of_one_thing(sigma_rel):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)


def test_the_papers_values_and_the_limit():
    """sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94 (section 3.1); gamma = 0 is the plain mean."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert sigma_rel_of(0) == pytest.approx(12**-0.5)
    assert gamma_of(MAX_SIGMA_REL) > 0
    assert gamma_of(MIN_SIGMA_REL) < 100


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_the_length_is_the_profiles_standard_deviation(sigma_rel):
    end, gamma = 7.0, gamma_of(sigma_rel)
    times = np.linspace(0, end, 400_001)
    p = profile(times, end, gamma)
    mean = integral(p * times, times)
    assert integral(p, times) == pytest.approx(1, abs=1e-6)
    assert mean == pytest.approx(end * (gamma + 1) / (gamma + 2), rel=1e-6)
    assert integral(p * (times - mean) ** 2, times) ** 0.5 / end == pytest.approx(sigma_rel, rel=1e-5)


@pytest.mark.parametrize(("a", "b"), [((3.0, 0.05), (5.0, 0.1)), ((5.0, 0.05), (3.0, 0.1)), ((4.0, 0.1), (4.0, 0.2))])
def test_inner_products_are_the_integrals(a, b):
    times = np.linspace(0, min(a[0], b[0]), 200_001)  # the product is 0 from the earlier end on
    profiles = [profile(times, end, gamma_of(sigma_rel)) for end, sigma_rel in (a, b)]
    (t_a, gamma_a), (t_b, gamma_b) = [(end, gamma_of(sigma_rel)) for end, sigma_rel in (a, b)]
    expected = integral(profiles[0] * profiles[1], times)
    assert float(inner_product(t_a, gamma_a, t_b, gamma_b)) == pytest.approx(expected, rel=1e-6)
    assert float(inner_product(t_b, gamma_b, t_a, gamma_a)) == pytest.approx(expected, rel=1e-6)


class Weights(nn.Module):
    """Nothing but weights, and a buffer that training changes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(count))
        self.register_buffer("mean", torch.zeros(()))


def trajectory(steps: int, count: int) -> Iterator[np.ndarray]:
    """Yield weights [count] float64 that start at random, drift, and jitter as those of a training do."""
    rng = np.random.default_rng(0)
    first, end, turn = rng.standard_normal((3, count))
    for step in range(1, steps + 1):
        t = step / steps
        smooth = end + first * np.exp(-8 * t) + 0.3 * turn * np.sin(5 * t)
        yield smooth + 0.1 * rng.standard_normal(count)


def share(time: int, batch: int, end: int, gamma: float) -> float:
    """How much the profile that ends at `end` has between the images of the step that ends at `time`."""
    return (time / end) ** (gamma + 1) - ((time - batch) / end) ** (gamma + 1)


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_an_average_is_the_weighted_sum_of_all_weights(sigma_rel):
    """Whatever the batches: those of growing trainings differ."""
    module = Weights(40)
    arena = Arena(module)
    average = PowerEMA(copy.deepcopy(module), arena, sigma_rel)
    batches = [4] * 100 + [16] * 100 + [8] * 100
    end, seen = sum(batches), 0
    expected = np.zeros(40)
    for batch, values in zip(batches, trajectory(300, 40), strict=True):
        seen += batch
        with torch.no_grad():
            module.values.copy_(torch.from_numpy(values))
        average.update(seen, batch, arena.windows(arena.trained))
        expected += values * share(seen, batch, end, gamma_of(sigma_rel))
        if seen == batch:
            assert torch.equal(average.params, arena.params), "the first step takes the weights whole"
    # Each of 300 updates rounds to float32, of which some dozens are remembered.
    assert np.allclose(average.average.values.detach().double(), expected, rtol=0, atol=2e-6)


def test_the_update_is_that_of_ema_pytorch():
    """Whose clock begins at 2: the first weights count as those of two steps."""
    theirs_of = pytest.importorskip("ema_pytorch").KarrasEMA
    module = Weights(40)
    arena = Arena(module)
    ours = PowerEMA(copy.deepcopy(module), arena, 0.05)
    theirs = theirs_of(module, sigma_rel=0.05, update_every=1)
    seen = 0
    for values in trajectory(200, 40):
        with torch.no_grad():
            module.values.copy_(torch.from_numpy(values))
        for _ in range(2 if seen == 0 else 1):
            seen += 1
            ours.update(seen, 1, arena.windows(arena.trained))
        theirs.update()
    assert torch.allclose(ours.average.values, theirs.ema_model.values, rtol=0, atol=1e-6)


def test_an_update_waits_for_nothing():
    module = Weights(40)
    arena = Arena(module)
    average = PowerEMA(copy.deepcopy(module), arena, 0.1)
    with NoHostSync():
        average.update(8, 8, arena.windows(arena.trained))


def test_an_average_has_the_buffers_of_the_one_it_is_made_of():
    averaged = Weights(3)
    average = PowerEMA(averaged, Arena(Weights(3)), 0.1).average
    averaged.mean.fill_(7)
    assert average.mean == 7


STEPS, BATCH, FILES = 4096, 8, 32
TARGETS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.1, 0.12, 0.15, 0.2, 0.25)


@pytest.fixture(scope="module")
def tracked() -> tuple[dict[tuple[int, float], np.ndarray], np.ndarray]:
    """Averages of a trajectory by (time, length): of each length followed directly, float64; and its last weights."""
    found, running = {}, {length: np.zeros(64) for length in TARGETS}
    values = np.zeros(64)
    for step, values in enumerate(trajectory(STEPS, 64), start=1):
        for length, average in running.items():
            beta = power_decay(step * BATCH, BATCH, gamma_of(length))
            average *= beta
            average += values * (1 - beta)
            if step % (STEPS // FILES) == 0:
                found[step * BATCH, length] = average.copy()
    return found, values


def rebuilt(tracked: dict[tuple[int, float], np.ndarray], end: int, length: float) -> tuple[np.ndarray, float]:
    """The average of a length from those of SIGMA_RELS up to a time, as they are stored: in float32."""
    stored = [(time, sigma) for time, sigma in tracked if sigma in SIGMA_RELS and time <= end]
    weights, error = profile_weights(*zip(*stored, strict=True), end, length)
    values = np.stack([tracked[key].astype(np.float32) for key in stored]).astype(np.float64)
    return weights @ values, error


@pytest.mark.parametrize("end", [1, FILES // 2, FILES])
@pytest.mark.parametrize("length", SIGMA_RELS)
def test_a_stored_average_is_its_own_sum(tracked, length, end):
    end *= STEPS * BATCH // FILES
    values, error = rebuilt(tracked[0], end, length)
    assert error < 1e-7  # the root of what float64 leaves of a difference
    assert np.array_equal(values.astype(np.float32), tracked[0][end, length].astype(np.float32))


@pytest.mark.parametrize(
    ("length", "of_weights", "of_profile"),
    [
        (0.02, 7e-3, 0.05),
        (0.03, 2e-3, 0.015),
        (0.04, 4e-4, 4e-3),
        (0.06, 1e-4, 1.2e-3),
        (0.07, 1e-4, 1.2e-3),
        (0.12, 6e-5, 1.2e-3),
        (0.15, 1e-4, 3e-3),
        (0.2, 1.6e-3, 8e-3),
        (0.25, 0.022, 0.04),
    ],
)
def test_other_lengths_are_as_if_they_had_been_followed(tracked, length, of_weights, of_profile):
    """Errors of weights are shares of what averaging changes in the last ones; each bound is twice what was found."""
    end = STEPS * BATCH
    values, error = rebuilt(tracked[0], end, length)
    followed = tracked[0][end, length]
    assert np.linalg.norm(values - followed) / np.linalg.norm(followed - tracked[1]) < of_weights
    assert error < of_profile
    nearest = min(np.linalg.norm(tracked[0][end, sigma] - followed) for sigma in SIGMA_RELS)
    assert np.linalg.norm(values - followed) < nearest / 10, "no stored average is as near"


def test_what_training_leaves_alone_stays_as_it_is():
    """Few averages cannot make a long one; but its weights add up."""
    times = [time for time in (1, 2, 3, 4) for _ in SIGMA_RELS]
    weights, error = profile_weights(times, SIGMA_RELS * 4, 4, 0.25)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert 0.1 < error < 0.5


def copy_of(engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.state().items()}


def train(engine, batch_at, until: int):
    while engine.images_seen < until:
        engine.step(batch_at(engine.images_seen))
    return engine


def averages_of(engine) -> list[torch.Tensor]:
    return [power.params for power in engine.power_averages["G"]]


def test_an_engine_follows_the_generator(make_engine, batch_at):
    engine, seen = make_engine(), []
    for step in range(4):
        engine.step(batch_at(8 * step))
        seen.append(engine.arenas["G"].params.detach().double().clone())
    for power in engine.power_averages["G"]:
        expected = sum(values * share(8 * step, 8, 32, power.gamma) for step, values in enumerate(seen, start=1))
        assert torch.allclose(power.params.double(), expected, rtol=2e-7, atol=1e-6)  # float32
        G, G_ema = power.average, engine.recipe.G_ema
        assert G.mapping.w_avg.data_ptr() == G_ema.mapping.w_avg.data_ptr()


def test_a_whole_step_with_averages_waits_for_nothing(make_engine, batch_at):
    engine, batch = make_engine(), batch_at(0)
    assert len(averages_of(engine)) == len(SIGMA_RELS)
    with NoHostSync():
        engine.step(batch)


def test_resuming_is_exact(make_engine, batch_at):
    straight = train(make_engine(), batch_at, 40)
    second = make_engine()
    second.load_state(copy_of(train(make_engine(), batch_at, 16)), images_seen=16)
    train(second, batch_at, 40)
    assert straight.state().keys() >= POWER_NAMES
    for ours, theirs in zip(averages_of(second), averages_of(straight), strict=True):
        assert torch.equal(ours, theirs)
    assert second.state()["G.power_start"] == 0


def test_without_them_nothing_is_kept(make_engine, batch_at):
    engine = train(make_engine(ema=EMAConfig(posthoc_kimg=0)), batch_at, 8)
    assert not engine.power_averages
    assert not engine.state().keys() & POWER_NAMES
    other = make_engine()
    train(other, batch_at, 8)
    engine.load_state(copy_of(other), images_seen=8)


def test_a_state_without_averages_lets_them_begin_there(make_engine, batch_at):
    """With a clock of their own, which states hold from then on."""
    before = train(make_engine(ema=EMAConfig(posthoc_kimg=0)), batch_at, 16)
    engine = make_engine()
    engine.load_state(copy_of(before), images_seen=16)
    assert engine.state()["G.power_start"] == 16
    seen = []
    for step in range(2, 5):
        engine.step(batch_at(8 * step))
        seen.append(engine.arenas["G"].params.detach().double().clone())
    for power in engine.power_averages["G"]:
        expected = sum(values * share(8 * step, 8, 24, power.gamma) for step, values in enumerate(seen, start=1))
        assert torch.allclose(power.params.double(), expected, rtol=2e-7, atol=1e-6)  # float32
    again = make_engine()
    again.load_state(copy_of(engine), images_seen=40)
    assert {power.start for power in again.power_averages["G"]} == {16}


def test_levels_that_have_not_grown_yet_stay_as_they_are(make_engine, batch_at):
    growth = GrowthConfig(start_res=8, stable_kimg=0.016, fade_kimg=0.008)
    engine = make_engine(growth=growth)
    first = {name: p.detach().clone() for name, p in engine.recipe.G.named_parameters()}

    def moved(block: str) -> list[bool]:
        averages = [power.average for power in engine.power_averages["G"]]
        pairs = [(G.get_parameter(name), old) for G in averages for name, old in first.items() if block in name]
        return [not torch.equal(*pair) for pair in pairs]

    def step() -> None:
        batch = batch_at(engine.images_seen)
        side = engine.recipe.schedule.at(engine.images_seen).resolution
        batch.images.resize_(8, side, side, 3)
        engine.step(batch)

    while engine.images_seen < 16:
        step()
    assert not any(moved("b16"))
    assert any(moved("b8"))
    while engine.images_seen < 40:
        step()
    assert any(moved("b16"))


def test_files_are_found_by_their_names(tmp_path):
    names = ("000000.008.safetensors", "000001.000.safetensors", "1234567.000.safetensors")
    (tmp_path / "ema").mkdir()
    for name in (*names, "diverged-000000.016.safetensors", ".000000.024.safetensors.1.tmp", "network.safetensors"):
        (tmp_path / "ema" / name).touch()
    assert [path.name for path in averages_files(tmp_path)] == list(names)
    assert averages_file(tmp_path, 1000) == tmp_path / "ema" / names[1]
    remove_later_averages(tmp_path, 8)
    left = {path.name for path in (tmp_path / "ema").iterdir()}
    assert left == {names[0], "diverged-000000.016.safetensors", "network.safetensors"}
    assert averages_files(tmp_path / "nowhere") == []


def test_a_run_stores_32_by_default():
    assert resolve(Config(res=64, kimg=64), 1).ema.posthoc_kimg == 2
    assert resolve(Config(res=64, kimg=5), 1).ema.posthoc_kimg == 1, "of a short training one in 1 kimg"
    assert resolve(Config(res=64, ema=EMAConfig(posthoc_kimg=0)), 1).ema.posthoc_kimg == 0
    config = resolve(Config(res=64, kimg=64), 1)
    assert resolve(config, 1) == config


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e10])
def test_an_impossible_interval_is_refused(value):
    with pytest.raises(UserError, match=r"--ema.posthoc-kimg"):
        resolve(Config(res=64, ema=EMAConfig(posthoc_kimg=value)), 1)
