"""Networks and schedule of a training, from resolved settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stylepipe.config import Config, NetworkKind, filled, largest_divisor
from stylepipe.config_checks import at_level, by_level
from stylepipe.networks import dcgan, progan, r3gan, stylegan, stylegan2
from stylepipe.presets import with_batch_gpu
from stylepipe.presets.defaults import STYLED
from stylepipe.training.growth import FixedResolution, GrowthSchedule, Level, Schedule

HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_GENERATORS: Mapping[NetworkKind, Any] = {
    "stylegan2": stylegan2.Generator,
    "stylegan": stylegan.Generator,
    "progan": progan.Generator,
    "r3gan": r3gan.Generator,
    "dcgan": dcgan.Generator,
}
_DISCRIMINATORS: Mapping[NetworkKind, Any] = {
    "stylegan2": stylegan2.Discriminator,
    "stylegan": stylegan.Discriminator,
    "progan": progan.Discriminator,
    "r3gan": r3gan.Discriminator,
    "dcgan": dcgan.Discriminator,
}


def build_networks(config: Config, c_dim: int, device: torch.device) -> tuple[Any, Any]:
    """Build the generator and the discriminator, initialised from the seed, the same on every device."""
    kind: NetworkKind = filled(config.network.kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        G: nn.Module = _GENERATORS[kind](config.res, **_of_both(config, c_dim), **_of_generator(config))
        D: nn.Module = _DISCRIMINATORS[kind](config.res, **_of_both(config, c_dim), **_of_discriminator(config))
    if device.type != "cpu":  # drawn on the CPU, so that every device starts from the same weights
        G.to(device), D.to(device)
    return G, D


def schedule_of(config: Config, world_size: int) -> Schedule:
    """Return what the training looks like at every point of the image counter, on so many processes.

    Where images are smaller than the full ones, a device takes more of them at a time, as many times as their side
    is shorter.
    """
    growth, full = config.growth, config.res
    assert isinstance(config.batch_gpu, int)
    start = filled(growth.start_res)
    if start == full:
        return FixedResolution(full, filled(config.batch_size), config.batch_gpu)
    batches = by_level("--growth.batch-sizes", growth.batch_sizes, whole=True)
    rates = by_level("--growth.lr-multipliers", growth.lr_multipliers)
    levels = []
    for res in (2**k for k in range(start.bit_length() - 1, full.bit_length())):
        batch_size = int(at_level(batches, res, filled(config.batch_size)))
        batch_gpu = largest_divisor(batch_size // world_size, config.batch_gpu * (full // res))
        levels.append(Level(res, batch_size, batch_gpu, at_level(rates, res, 1.0)))
    stable, fade = round(filled(growth.stable_kimg) * 1000), round(filled(growth.fade_kimg) * 1000)
    return GrowthSchedule(tuple(levels), stable, fade)


def alone(config: Config, batch_gpu: int) -> Config:
    """Return settings of one micro-batch a step: to measure what it takes."""
    growth = replace(config.growth, batch_sizes=None)
    return with_batch_gpu(replace(config, batch_size=batch_gpu, growth=growth), batch_gpu)


def _of_both(config: Config, c_dim: int) -> dict[str, Any]:
    network, half = config.network, HALF_TYPES.get(config.precision)
    return {
        "c_dim": c_dim,
        "channel_base": filled(network.channel_base),
        "channel_max": filled(network.channel_max),
        "conv_clamp": network.conv_clamp,
        "half_levels": network.half_levels if half else 0,
        "half_dtype": half,
    }


def _of_generator(config: Config) -> dict[str, Any]:
    network = config.network
    options: dict[str, Any] = {"z_dim": network.z_dim}
    if network.kind in STYLED:
        options |= {name: getattr(network, name) for name in ("w_dim", "mapping_layers", "class_w_avg")}
    if network.kind == "stylegan2":
        options["architecture"] = network.g_architecture
    return options | ({"norm": network.norm} if network.kind == "dcgan" else {})


def _of_discriminator(config: Config) -> dict[str, Any]:
    network = config.network
    options: dict[str, Any] = {
        "conditioning": network.d_conditioning,
        "last_layer": network.d_last_layer,
        "mbstd_group_size": network.mbstd_group_size,
        "mbstd_channels": network.mbstd_channels,
        "mbdisc_kernels": network.mbdisc_kernels,
        "spectral_norm": network.spectral_norm,
    }
    if network.kind == "stylegan2":
        options |= {"architecture": network.d_architecture, "grows": filled(config.growth.start_res) < config.res}
    return options | ({"norm": "batch" if network.norm == "batch" else "none"} if network.kind == "dcgan" else {})
