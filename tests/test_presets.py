"""Presets: the published table, and batch sizes on any number of devices."""

import dataclasses

import pytest

from stylepipe.config import Config, EMAConfig, NetworkConfig
from stylepipe.errors import UserError
from stylepipe.presets import PRESETS, resolve, with_precision

# Karras et al. 2020 (arXiv:1912.04958, arXiv:2006.06676), 8 GPUs:
# batch, mbstd group, channel_base, lr, gamma, EMA kimg, mapping layers
PUBLISHED = {
    ("stylegan2", 1024): (32, 4, 32768, 0.002, 10, 10, 8),
    ("paper1024", 1024): (32, 4, 32768, 0.002, 2, 10, 8),
    ("paper256", 256): (64, 8, 16384, 0.0025, 1, 20, 8),
    ("auto", 1024): (32, 4, 32768, 0.002, 0.0002 * 1024**2 / 32, 10, 2),
    ("auto", 256): (64, 4, 16384, 0.0025, 0.0002 * 256**2 / 64, 20, 2),
}


@pytest.mark.parametrize(("preset", "res"), PUBLISHED)
def test_presets_are_the_published_settings(preset, res):
    config = resolve(Config(res=res, preset=preset), world_size=8)
    found = (
        config.batch_size,
        config.network.mbstd_group_size,
        config.network.channel_base,
        config.optim.g_lr,
        config.loss.r1_gamma,
        config.ema.kimg,
        config.network.mapping_layers,
    )
    assert found == PUBLISHED[preset, res]
    assert config.kimg == 25_000
    assert config.batch_gpu == config.batch_size // 8


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("res", [8, 64, 256, 1024])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_every_preset_resolves_on_any_number_of_devices(preset, res, world_size):
    config = resolve(Config(res=res, preset=preset), world_size)
    assert (config.batch_size / world_size) % config.batch_gpu == 0
    assert None not in (config.kimg, config.loss.r1_gamma, config.ema.rampup, config.optim.d_lr)


def test_config_f_is_the_default_from_512_pixels_on():
    assert [resolve(Config(res=res), 1).preset for res in (256, 512, 1024)] == ["auto", "stylegan2", "stylegan2"]


def test_the_batch_of_a_published_preset_does_not_depend_on_the_devices():
    assert {resolve(Config(res=1024), n).batch_size for n in (1, 2, 4, 8)} == {32}


def test_auto_divides_on_three_devices():
    config = resolve(Config(res=64), 3)
    assert config.batch_size % 3 == 0


def test_auto_follows_the_batch_size_in_effect():
    small, large = (resolve(Config(res=64, batch_size=n), 1) for n in (2, 32))
    assert small.loss.r1_gamma == 16 * large.loss.r1_gamma
    assert small.ema.kimg * 16 == large.ema.kimg


def test_what_the_user_says_wins():
    config = resolve(Config(res=64, kimg=5, network=NetworkConfig(channel_base=4096), ema=EMAConfig(kimg=1)), 1)
    assert (config.kimg, config.network.channel_base, config.ema.kimg) == (5, 4096, 1)
    assert config.network.channel_max == 512


def test_a_small_device_takes_fewer_images_at_a_time_unless_told():
    assert resolve(Config(res=1024), 1, batch_gpu_limit=2).batch_gpu == 2
    assert resolve(Config(res=1024), 1, batch_gpu_limit=64).batch_gpu == 4
    assert resolve(Config(res=1024, batch_gpu=8), 1, batch_gpu_limit=2).batch_gpu == 8


def test_resolving_twice_changes_nothing():
    config = resolve(Config(res=64, batch_size=6), 2)
    assert resolve(config, 2) == config
    assert dataclasses.asdict(config) == dataclasses.asdict(resolve(config, 2))


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (Config(batch_size=30), 8, "--batch-size 30: expected a multiple of the 8 processes; try 24 or 32"),
        (Config(batch_size=3), 8, "try 8 or 16"),
        (Config(batch_size=32, batch_gpu=3), 2, "--batch-gpu 3: expected a divisor of 16"),
        (Config(preset="stylgan2"), 1, "--preset stylgan2: unknown preset; did you mean 'stylegan2'?"),
        (Config(preset="x"), 1, "known are stylegan2, paper1024, paper256, auto"),
    ],
)
def test_what_does_not_fit_is_answered_with_what_would(config, world_size, message):
    with pytest.raises(UserError) as error:
        resolve(config, world_size)
    assert message in str(error.value)


def test_half_precision_brings_its_clamp_unless_one_is_set():
    config = resolve(Config(res=64), 1)
    assert with_precision(config, "fp32").network.conv_clamp is None
    assert with_precision(config, "fp16").network.conv_clamp == 256
    own = dataclasses.replace(config, network=dataclasses.replace(config.network, conv_clamp=64.0))
    assert with_precision(own, "bf16").network.conv_clamp == 64
