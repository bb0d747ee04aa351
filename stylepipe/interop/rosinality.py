"""StyleGAN2 in the form of the best-known PyTorch port, rosinality's (MIT licence): import and export.

A checkpoint there is a dictionary of state dicts: `g_ema`, and `g` and `d` where training goes on from it. The weights
are ours under other names; the resampling filters, repeated there in every layer, are constants here. Unconditional,
three colours, G with RGB skips, residual D.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stylepipe.errors import UserError
from stylepipe.files import atomic_path
from stylepipe.interop.imported import Imported, channel_settings
from stylepipe.interop.nvidia import build_filled
from stylepipe.interop.plain_data import RefusedError, shown
from stylepipe.interop.rosinality_names import (
    Place,
    discriminator_filters,
    discriminator_places,
    generator_filters,
    generator_places,
    resolutions_above_4,
)
from stylepipe.interop.stored_tensors import StoredTensor, read_arrays
from stylepipe.kernels import setup_filter
from stylepipe.networks.layers import RESAMPLE_TAPS
from stylepipe.networks.stylegan2 import Discriminator, Generator

NUM_LATENTS = 10_000
"""Latents of which w_avg is the mean where a checkpoint does not have it."""
_SEED = 0
_MAX_RES = 4096
_UP_GAIN = 4  # of upsampling by 2 in both directions: there it is in the filter
_CHANNEL_MAX = 512  # the widths that its code knows are those of channel_base 16384, 32768, ...
_CHANNEL_BASE = 16384
_MBSTD_GROUP = 4  # fixed in its discriminator
_W_AVG = "mapping.w_avg"


def import_rosinality(content: Mapping[str, Any]) -> Imported:
    """Build our networks from a checkpoint.

    Args:
        content: as `read_foreign` gives it, with g_ema; g, d and latent_avg may be missing, optimizers are ignored.

    Raises:
        RefusedError: a weight is missing, unknown or of another shape.
        UserError: the weights do not fit one another.
    """
    states = {name: _state(name, content[name]) for name in ("g_ema", "g", "d") if content.get(name) is not None}
    if "g_ema" not in states:
        raise RefusedError("no averaged generator g_ema in it")
    notes: list[str] = []
    latent_avg = content.get("latent_avg")
    if latent_avg is not None and not isinstance(latent_avg, StoredTensor):
        raise RefusedError("damaged: latent_avg is no tensor")
    w_avg = None if latent_avg is None else latent_avg.array()
    G_ema = _generator("g_ema", states["g_ema"], w_avg, notes)
    if w_avg is None:
        G_ema.mapping.w_avg.copy_(_mean_w(G_ema))
        notes.append(f"no latent_avg in the file: w_avg is the mean of {NUM_LATENTS:,} latents drawn from seed {_SEED}")
    beside: dict[str, nn.Module] = {}
    if "g" in states:
        beside["G"] = _generator("g", states["g"], G_ema.mapping.w_avg.numpy(), notes)
    if "d" in states:
        beside["D"] = _discriminator("d", states["d"])
    said = {key: content[key] for key in ("license", "derived_from") if isinstance(content.get(key), str)}
    return Imported("rosinality's StyleGAN2", G_ema, beside, notes=notes, **said)


def export_rosinality(
    path: str | Path,
    G_ema: Generator,
    beside: Mapping[str, nn.Module],
    *,
    license: str | None = None,
    derived_from: str | None = None,
) -> list[str]:
    """Write a checkpoint with g_ema and latent_avg, and g and d where `beside` has G and D.

    Args:
        path: by custom `.pt`; written whole or not at all.
        G_ema: unconditional, architecture skip, three colours; on any device.
        beside: G and D, which may be missing.
        license, derived_from: what the file shall say; a later import takes it from there.

    Returns:
        What the user should know, a line each: where that code would not rebuild these networks as they are.

    Raises:
        UserError: that form has no place for such a generator, or the file cannot be written.
    """
    content: dict[str, Any] = {"g_ema": _generator_state(G_ema), "latent_avg": _plain(G_ema.mapping.w_avg)}
    notes = _differences(G_ema)
    G, D = beside.get("G"), beside.get("D")
    if isinstance(G, Generator):
        content["g"] = _generator_state(G)
    if isinstance(D, Discriminator):
        wrong = [f"{key} {D.config[key]}" for key, value in _D_FORM.items() if D.config[key] != value]
        if wrong:
            notes.append(f"the discriminator is left out: that form has no place for its {' and '.join(wrong)}")
        else:
            content["d"] = _discriminator_state(D)
            if D.config["mbstd_group_size"] != _MBSTD_GROUP:
                notes.append(
                    f"mbstd_group_size {D.config['mbstd_group_size']} becomes {_MBSTD_GROUP}, fixed in that code"
                )
    said = {"license": license, "derived_from": derived_from}
    content |= {key: value for key, value in said.items() if value is not None}
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return notes


_G_FORM = {"architecture": "skip", "c_dim": 0, "img_channels": 3}
_D_FORM = {"architecture": "resnet", "c_dim": 0, "img_channels": 3, "mbstd_channels": 1}


def _state(name: str, value: Any) -> dict[str, StoredTensor]:
    if not isinstance(value, dict) or not all(isinstance(tensor, StoredTensor) for tensor in value.values()):
        raise RefusedError(f"{name} is no dictionary of tensors; expected a state dict")
    if not all(isinstance(key, str) for key in value):
        raise RefusedError(f"{name} has keys that are no names; expected a state dict")
    return value


def _generator(name: str, state: Mapping[str, StoredTensor], w_avg: np.ndarray | None, notes: list[str]) -> Generator:
    levels = _count(state, "to_rgbs.{}.bias")
    mapping_layers = _count(state, "style.{}.weight", first=1)
    res = _res(name, levels)
    places = generator_places(res, mapping_layers)
    noise = {ours: place for ours, place in places.items() if ours.endswith(".noise_const")}
    drawn: dict[str, np.ndarray] = {}
    if not any(place.name in state for place in noise.values()):  # checkpoints of 2019 and 2020
        drawn = _drawn_noise(list(noise))
        notes.append(f"no noise buffers in {name}: drawn from seed {_SEED}")
    places = {ours: place for ours, place in places.items() if ours not in drawn}
    arrays = _renamed(name, state, places, generator_filters(res), _UP_GAIN) | drawn
    widths = {4: arrays["synthesis.b4.const"].shape[0]}
    widths |= {r: arrays[f"synthesis.b{r}.conv1.bias"].size for r in resolutions_above_4(res)}
    channel_base, channel_max = channel_settings(widths)
    w_dim, z_dim = _matrix(name, arrays, "mapping.fc0.weight")
    arrays[_W_AVG] = np.zeros(w_dim, np.float32) if w_avg is None else w_avg
    config: dict[str, Any] = {
        "channel_base": channel_base,
        "channel_max": channel_max,
        "mapping_layers": mapping_layers,
    }
    named = {f"{name}: {ours}": array for ours, array in arrays.items()}
    return build_filled(lambda: Generator(res, z_dim=z_dim, w_dim=w_dim, **config), f"{name}: ", named)


def _discriminator(name: str, state: Mapping[str, StoredTensor]) -> Discriminator:
    res = _res(name, _count(state, "convs.{}.skip.1.weight", first=1))
    arrays = _renamed(name, state, discriminator_places(res), discriminator_filters(res), 1)
    widths = {4: arrays["b4.conv.bias"].size}
    widths |= {r: arrays[f"b{r}.conv0.bias"].size for r in resolutions_above_4(res)}
    channel_base, channel_max = channel_settings(widths)
    named = {f"{name}: {ours}": array for ours, array in arrays.items()}
    return build_filled(
        lambda: Discriminator(res, channel_base=channel_base, channel_max=channel_max, mbstd_group_size=_MBSTD_GROUP),
        f"{name}: ",
        named,
    )


def _count(state: Mapping[str, StoredTensor], pattern: str, first: int = 0) -> int:
    """Return how many names of a numbered kind there are, without a gap."""
    number = first
    while pattern.format(number) in state:
        number += 1
    return number - first


def _res(name: str, levels: int) -> int:
    res = 4 << min(levels, _MAX_RES)
    if res > _MAX_RES:
        raise RefusedError(f"{name} has {levels} levels above 4 px; expected at most those up to {_MAX_RES} px")
    return res


def _matrix(name: str, arrays: Mapping[str, np.ndarray], ours: str) -> tuple[int, int]:
    if ours not in arrays or arrays[ours].ndim != 2:
        raise RefusedError(f"{name} has no mapping network style.1; expected a StyleGAN2 generator")
    rows, columns = arrays[ours].shape
    return rows, columns


def _renamed(
    name: str, state: Mapping[str, StoredTensor], places: Mapping[str, Place], filters: list[str], filter_gain: float
) -> dict[str, np.ndarray]:
    """Return the arrays by our names and in our number of dimensions; every tensor of the state must have its place."""
    ours = setup_filter(RESAMPLE_TAPS, gain=filter_gain, separable=False).numpy()
    known = {place.name for place in places.values()} | set(filters)
    unknown = sorted(state.keys() - known)
    missing = sorted(known - state.keys())
    if unknown or missing:
        problem = f"no {missing[0]} in {name}" if missing else f"{name}.{shown(unknown[0])} has no place"
        raise RefusedError(f"{problem}; expected an unconditional StyleGAN2 with RGB skips and a residual D")
    theirs = read_arrays(state)
    for key in filters:
        found = theirs[key]
        if found.shape != ours.shape or not np.allclose(found, ours, rtol=1e-6):
            raise RefusedError(f"{name}.{key}: another filter than {list(RESAMPLE_TAPS)}, the only one supported")
    arrays = {}
    for own, place in places.items():
        array = theirs[place.name]
        shape = array.shape[place.lead : array.ndim - place.trail]
        if array.shape != (1,) * place.lead + shape + (1,) * place.trail:
            raise RefusedError(f"{name}.{place.name} has another shape, {list(array.shape)}")
        arrays[own] = array.reshape(shape)
    return arrays


def _drawn_noise(names: list[str]) -> dict[str, np.ndarray]:
    """Draw what each image's constant noise would be, [r, r] standard normal for a name with `.b<r>.`."""
    random = np.random.Generator(np.random.Philox(key=_SEED))
    sizes = [int(name.split(".")[1].removeprefix("b")) for name in names]
    return {name: random.standard_normal((r, r), dtype=np.float32) for name, r in zip(names, sizes, strict=True)}


@torch.inference_mode()
def _mean_w(G: Generator) -> Tensor:
    """Return the mean w [w_dim] of latents of a fixed seed."""
    random = np.random.Generator(np.random.Philox(key=_SEED))
    z = torch.from_numpy(random.standard_normal((NUM_LATENTS, G.z_dim), dtype=np.float32))
    w: Tensor = G.mapping(z)[:, 0]
    return w.double().mean(dim=0).float()


def _generator_state(G: Generator) -> OrderedDict[str, Tensor]:
    wrong = [f"{key} {G.config[key]}" for key, value in _G_FORM.items() if G.config[key] != value]
    if wrong:
        raise UserError(
            f"a generator with {' and '.join(wrong)}: rosinality's form has no place for it; expected "
            + ", ".join(f"{key} {value}" for key, value in _G_FORM.items())
        )
    res = G.config["res"]
    places = generator_places(res, G.config["mapping_layers"])
    return _placed(G, places, generator_filters(res), _UP_GAIN)


def _discriminator_state(D: Discriminator) -> OrderedDict[str, Tensor]:
    res = D.config["res"]
    return _placed(D, discriminator_places(res), discriminator_filters(res), 1)


def _placed(
    network: nn.Module, places: Mapping[str, Place], filters: list[str], filter_gain: float
) -> OrderedDict[str, Tensor]:
    own = {key: tensor for key, tensor in network.state_dict().items() if key != _W_AVG}
    assert own.keys() == places.keys(), sorted(own.keys() ^ places.keys())
    state = OrderedDict()
    for key, (name, lead, trail) in places.items():
        state[name] = _plain(own[key]).reshape((1,) * lead + own[key].shape + (1,) * trail)
    for name in filters:
        state[name] = setup_filter(RESAMPLE_TAPS, gain=filter_gain, separable=False)
    return state


def _plain(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that owns its memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _differences(G: Generator) -> list[str]:
    """Say what rosinality's code would make of the generator otherwise."""
    notes = []
    config = G.config
    base, widest = config["channel_base"], config["channel_max"]
    multiplier, rest = divmod(base, _CHANNEL_BASE)
    if config["res"] > 4 and (rest or multiplier < 1 or widest != _CHANNEL_MAX):
        notes.append(
            f"channel_base {base} and channel_max {widest}: that code knows the widths of channel_base 16384 and "
            "32768 (channel_multiplier 1 and 2) with channel_max 512; change its table to load this file"
        )
    if config["z_dim"] != config["w_dim"]:
        notes.append(f"z_dim {config['z_dim']} and w_dim {config['w_dim']}: that code has one size for both")
    if config["conv_clamp"] is not None:
        notes.append(f"conv_clamp {config['conv_clamp']} is left out: that code does not clamp activations")
    return notes
