"""Counting and measuring what training costs."""

import dataclasses

import pytest
import torch

from stylepipe.config import Config, LossConfig, NetworkConfig
from stylepipe.errors import UserError
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import trial
from stylepipe.training import probe
from stylepipe.training.engine import Engine
from stylepipe.training.estimate import estimate, flops_per_image, format_duration
from stylepipe.training.timing import amortised, random_batch, time_phases

META = torch.device("meta")
TINY = Config(res=16, batch_size=8, network=NetworkConfig(z_dim=16, w_dim=16, channel_base=128, mapping_layers=2))


def test_config_f_takes_two_petaflops_per_kimg():
    """The work of StyleGAN2-F at 1024 px as it was counted independently: 1.99 PFLOP per thousand images."""
    config = with_precision(resolve(Config(res=1024, preset="stylegan2"), 1), "fp32")
    recipe = trial(config, 0, META, 4)
    per_kimg = flops_per_image(recipe, estimate(recipe, 0, 4), 4) * 1000
    assert per_kimg == pytest.approx(1.99e15, rel=0.01)


def test_the_memory_of_activations_grows_with_the_micro_batch():
    config = resolve(TINY, 1)
    one, two, four = (estimate(trial(config, 0, META, n), 0, n).memory_bytes for n in (4, 8, 16))
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    assert one > 0


def test_kept_activations_are_counted_right():
    """Twice the images add what they keep: for D's convolutions at 16 and 8 px at least, and at most a few copies."""
    config = resolve(dataclasses.replace(TINY, loss=LossConfig(pl_weight=0, r1_gamma=0)), 1)
    eight, sixteen = (estimate(trial(config, 0, META, n), 0, n).memory_bytes for n in (8, 16))
    # G's main phase keeps the inputs and outputs of each convolution in G and D: floats per image, by hand.
    channels = {r: min(128 // r, 512) for r in (4, 8, 16)}
    G = sum(channels[r] * r * r * (1 if r == 4 else 2) for r in channels)
    D = sum(channels[r] * r * r * (2 if r > 4 else 1) for r in channels)
    assert 1 < (sixteen - eight) / (8 * 4 * (G + D)) < 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45, "45 s"), (600, "10 min"), (3 * 3600, "3 h"), (12 * 86400, "12 days"), (3 * 31_536_000, "3 years")],
)
def test_durations_are_told_as_people_do(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("c_dim", [0, 3])
def test_auto_takes_the_largest_micro_batch_that_fits(monkeypatch, c_dim):
    config = resolve(TINY, 1)

    def build(device, batch_gpu):
        return trial(config, c_dim, device, batch_gpu)

    def stages(batch_gpu):
        return build(META, batch_gpu).schedule.stages()

    def choose(free_bytes):
        monkeypatch.setattr(probe, "free_memory", lambda device: free_bytes)
        return probe.largest_batch_gpu(build, stages, config, c_dim, 8, torch.device("cpu"))

    need = {n: estimate(build(META, n), c_dim, n).memory_bytes for n in (1, 2, 4, 8)}
    assert choose(10**12) == 8
    assert choose(need[4] / probe.HEADROOM + 1) == 4
    assert choose(need[1] / probe.HEADROOM + 1) == 1
    with pytest.raises(UserError, match="not even one 16 px image fits"):
        choose(1000)


def test_phases_are_timed_and_amortised():
    config = with_precision(resolve(TINY, 1), "fp32")
    recipe = trial(config, 0, torch.device("cpu"), 8)
    engine = Engine(recipe, optim=config.optim, ema=config.ema)
    runs = []
    seconds = time_phases(
        engine, *random_batch(engine, engine.recipe.schedule.final(), 0), repeats=2, done=lambda: runs.append(1)
    )
    assert len(runs) == 3 * 4
    assert all(value > 0 for value in seconds.values())
    ones = dict.fromkeys(seconds, 1.0)
    assert amortised(engine, ones) == pytest.approx(1 + 1 / 4 + 1 + 1 / 16)
