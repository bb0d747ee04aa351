"""StyleGAN2 networks from the weights of the official checkpoints.

Parameters keep the official names, so that loading is a copy; what differs is checked and left out: the official files
repeat the resampling filter in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from stylepipe.errors import UserError
from stylepipe.kernels import setup_filter
from stylepipe.networks.layers import RESAMPLE_TAPS
from stylepipe.networks.stylegan2 import Discriminator, Generator

Network = TypeVar("Network", bound=nn.Module)

_CONFIG_KEYS = {
    "res",
    "channel_base",
    "channel_max",
    "z_dim",
    "w_dim",
    "c_dim",
    "mapping_layers",
    "g_architecture",
    "d_architecture",
    "mbstd_group",
    "conv_clamp",
}
_FILTER = "resample_filter"


def networks_from_state(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[Generator, Discriminator]:
    """Build G and D in float32 and fill them with `arrays`.

    Args:
        config: res, channel_base, channel_max, z_dim, w_dim, c_dim, mapping_layers, g_architecture, d_architecture,
            mbstd_group and conv_clamp.
        arrays: the weights, under `G.` and `D.` followed by the official names; other names are ignored.

    Raises:
        UserError: a key of the config or an array is missing, unknown or of another shape, or the networks were
            trained with another resampling filter.
    """
    if set(config) != _CONFIG_KEYS:
        missing, unknown = sorted(_CONFIG_KEYS - set(config)), sorted(set(config) - _CONFIG_KEYS)
        raise UserError(f"network config: missing {missing}, unknown {unknown}; expected {sorted(_CONFIG_KEYS)}")
    common = {key: config[key] for key in ("c_dim", "channel_base", "channel_max", "conv_clamp")}
    G = build_filled(
        lambda: Generator(
            config["res"],
            z_dim=config["z_dim"],
            w_dim=config["w_dim"],
            mapping_layers=config["mapping_layers"],
            architecture=config["g_architecture"],
            **common,
        ),
        "G.",
        arrays,
    )
    D = build_filled(
        lambda: Discriminator(
            config["res"],
            architecture=config["d_architecture"],
            mbstd_group_size=config["mbstd_group"],
            **common,
        ),
        "D.",
        arrays,
    )
    return G, D


def build_filled(make: Callable[[], Network], prefix: str, arrays: Mapping[str, np.ndarray]) -> Network:
    """Build a network and fill it with the arrays under `prefix`, all of which must be used.

    They are compared with the network's shapes first, so that a file cannot make us take more memory than it holds.
    The caller's random generator stays as it is.

    Args:
        make: builds the network, with weights that are replaced.
        prefix: in front of the official names, such as `G.`.
        arrays: the weights; names without the prefix are ignored.

    Raises:
        UserError: as `networks_from_state`.
    """
    with torch.device("meta"):
        expected = make().state_dict()
    state: dict[str, torch.Tensor] = {}
    for name, array in arrays.items():
        if not name.startswith(prefix):
            continue
        key = name.removeprefix(prefix)
        if key.rpartition(".")[2] == _FILTER:
            _check_filter(name, array)
            continue
        if key not in expected:
            raise UserError(f"array {name}: unknown to a network of this config; is the config that of the weights?")
        if array.shape != expected[key].shape:
            raise UserError(f"array {name}: shape {list(array.shape)}, expected {list(expected[key].shape)}")
        state[key] = torch.from_numpy(np.array(array, dtype=np.float32))
    missing = sorted(expected.keys() - state.keys())
    if missing:
        named = ", ".join(prefix + key for key in missing[:3])
        raise UserError(f"arrays missing: {named}{' and more' if len(missing) > 3 else ''} ({len(missing)} in all)")
    with torch.random.fork_rng(devices=[]):
        network = make()
    network.load_state_dict(state)
    return network


def _check_filter(name: str, array: np.ndarray) -> None:
    ours = setup_filter(RESAMPLE_TAPS, separable=False).numpy()
    if array.shape != ours.shape or not np.allclose(array, ours, rtol=1e-6):
        raise UserError(f"array {name}: another filter than {list(RESAMPLE_TAPS)}, the only one supported")
