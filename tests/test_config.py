"""Options: every wrong one is answered by name, value and remedy."""

import dataclasses

import pytest

from stylepipe.config import Config, LossConfig, NetworkConfig, from_mapping, largest_divisor, overlay
from stylepipe.config_checks import validate
from stylepipe.errors import UserError


def test_defaults_are_valid():
    validate(Config())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Config(res=100), "--res 100: expected a power of two from 8 to 1024; try 128"),
        (Config(res=4), "try 8"),
        (Config(res=2048), "try 1024"),
        (Config(kimg=0), "--kimg 0"),
        (Config(batch_size=-4), "--batch-size -4"),
        (Config(batch_gpu=0), "--batch-gpu 0"),
        (Config(seed=-1), "--seed -1"),
        (Config(loss=LossConfig(style_mixing=1.5)), "--loss.style-mixing 1.5"),
        (Config(network=NetworkConfig(channel_base=128)), "--network.channel-base 128"),
        (Config(kimg=float("nan")), "--kimg nan"),
    ],
)
def test_a_value_no_run_could_use_is_named(config, named):
    with pytest.raises(UserError) as error:
        validate(config)
    assert named in str(error.value)


def test_overlay_fills_only_what_is_open():
    merged = overlay(Config(kimg=3, network=NetworkConfig(channel_base=64)), Config(kimg=7.0))
    assert merged.kimg == 7.0
    assert merged.network.channel_base == 64


def test_mapping_and_dataclass_are_each_others_inverse():
    config = Config(res=64, batch_gpu="auto", network=NetworkConfig(channel_base=512), data="faces")
    assert from_mapping(Config, dataclasses.asdict(config), "file") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kimgs": 3}, "file: unknown option 'kimgs'; did you mean 'kimg'?"),
        ({"network": {"chanel_base": 3}}, "file, section network: unknown option 'chanel_base'; did you mean 'channel"),
        ({"res": "big"}, "file: res is 'big'; expected int"),
        ({"res": True}, "file: res is True"),
        ({"tracker": "mlflow"}, "expected wandb | tensorboard | none"),
        ({"network": 3}, "network is 3; expected a section"),
    ],
)
def test_a_wrong_mapping_is_answered_with_the_nearest_right_one(values, message):
    with pytest.raises(UserError) as error:
        from_mapping(Config, values, "file")
    assert message in str(error.value)


def test_whole_numbers_are_taken_for_fractions():
    assert from_mapping(Config, {"kimg": 3}, "file").kimg == 3.0


def test_largest_divisor():
    assert [largest_divisor(12, limit) for limit in (1, 4, 5, 6, 100)] == [1, 4, 4, 6, 12]
