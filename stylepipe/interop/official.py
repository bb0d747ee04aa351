"""StyleGAN2 networks from NVIDIA's network files: those of StyleGAN2-ADA, and StyleGAN2's of StyleGAN3's code.

Such a file is a pickled dictionary with G, D and G_ema. Each is an object that names its class, carries the class's
source code (which is left alone here), and a state: torch's `_parameters`, `_buffers` and `_modules`, the arguments it
was made with in `_init_kwargs`, and further attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from stylepipe.interop.imported import Imported, channel_settings
from stylepipe.interop.nvidia import build_filled
from stylepipe.interop.plain_data import Record, RefusedError, shown
from stylepipe.interop.stored_tensors import StoredTensor, read_arrays
from stylepipe.networks.levels import LOWEST_RES
from stylepipe.networks.stylegan2 import Discriminator, Generator

NON_COMMERCIAL = (
    "NVIDIA's published networks are under a non-commercial licence: research and evaluation only, and so may be what "
    "is trained from them. --license says under which one you hold this file"
)
_MAX_PARTS = 100_000
_MAX_RES = 4096
_DEFAULT_MBSTD_GROUP = 4


def import_official(content: Mapping[str, Any]) -> Imported:
    """Build our networks from the content of a network file.

    All are float32, whatever precision they were trained in: such a file runs on a CPU, and training chooses its own
    precision. `num_fp16_res` goes into the metadata.

    Args:
        content: as `read_foreign` gives it, with G_ema; G and D may be missing or None.

    Raises:
        RefusedError: it holds other networks, or its settings contradict its weights.
        UserError: a weight is missing, unknown or of another shape.
    """
    modules = {name: _Module(name, content[name]) for name in ("G_ema", "G", "D") if content.get(name) is not None}
    if "G_ema" not in modules:
        raise RefusedError("no averaged generator G_ema in it")
    beside: dict[str, nn.Module] = {
        name: _generator(module) if name == "G" else _discriminator(module)
        for name, module in modules.items()
        if name != "G_ema"
    }
    num_fp16_res = modules["G_ema"].setting("num_fp16_res", int)
    return Imported(
        "NVIDIA's StyleGAN2",
        _generator(modules["G_ema"]),
        beside,
        notes=[NON_COMMERCIAL],
        metadata={} if num_fp16_res is None else {"num_fp16_res": str(num_fp16_res)},
    )


class _Module:
    """A network of the file: its arrays by name, its settings, and the attributes of its modules."""

    def __init__(self, name: str, record: Any) -> None:
        if not isinstance(record, Record) or not isinstance(record.state, dict):
            raise RefusedError(f"{name} is no network")
        self.name = name
        self.records: dict[str, Record] = {}
        self._parts = 0
        tensors: dict[str, StoredTensor] = {}
        self._collect(record, "", tensors)
        self.arrays = read_arrays(tensors)
        if any(key.startswith(("synthesis.input", "synthesis.L")) for key in self.records):
            raise RefusedError(
                f"{name} is an alias-free StyleGAN3 network, whose layers stylepipe does not have; only its StyleGAN2 "
                "networks can be imported"
            )
        kwargs = record.state.get("_init_kwargs")
        self._kwargs = kwargs if isinstance(kwargs, dict) else {}

    def size(self, name: str, axis: int) -> int:
        """Return one length of one of the arrays."""
        if name not in self.arrays or self.arrays[name].ndim <= axis:
            raise RefusedError(f"{self.name} has no {name} of a StyleGAN2 network")
        return self.arrays[name].shape[axis]

    def prefixed(self) -> dict[str, np.ndarray]:
        """Return the arrays under the names that messages about them shall have."""
        return {f"{self.name}.{name}": array for name, array in self.arrays.items()}

    def architecture(self, residual: str, rgb_at_4: str) -> str:
        """Tell the architecture from the arrays that only one of them has."""
        return "resnet" if residual in self.arrays else "skip" if rgb_at_4 in self.arrays else "orig"

    def channel_settings(self, channels: Mapping[int, int]) -> tuple[int, int]:
        """Return channel_base and channel_max, as the file says them or else as the widths tell."""
        return channel_settings(channels, self.setting("channel_base", int), self.setting("channel_max", int))

    def setting(self, name: str, kind: type, group: str = "synthesis_kwargs", attribute_of: str = "") -> Any:
        """Return an argument that the network was made with, None where the file does not say it.

        Args:
            name: of the argument.
            kind: what it must be.
            group: the dictionary among the arguments that may hold it; StyleGAN2-ADA has such, StyleGAN3 has not.
            attribute_of: the module that keeps it as `name` less `mbstd_`, where it may have been left to its default.
        """
        for values in (self._kwargs, self._kwargs.get(group)):
            if isinstance(values, dict) and name in values:
                return self._checked(name, values[name], kind)
        module = self.records.get(attribute_of)
        attribute = name.removeprefix("mbstd_")
        if module is None or not isinstance(module.state, dict):
            return None
        return self._checked(name, module.state.get(attribute), kind)

    def agree(self, **found: int) -> None:
        """See that the arguments are those that the arrays show, where the file says them."""
        for name, value in found.items():
            said = self.setting(name, int)
            if said is not None and said != value:
                raise RefusedError(f"{self.name}: its settings say {name} {said}, its weights {value}")

    def resolutions(self, pattern: str) -> list[int]:
        """Return those of the blocks, 4, 8, ..., that have an array whose name matches `pattern`."""
        matches = [re.fullmatch(pattern, name, flags=re.ASCII) for name in self.arrays]
        found = sorted(int(match[1]) for match in matches if match and len(match[1]) <= len(str(_MAX_RES)))
        if found != [2 ** (i + 2) for i in range(len(found))] or not found or found[-1] > _MAX_RES:
            raise RefusedError(
                f"{self.name}: blocks for {found[:16]} px; expected 4, 8, 16, ...: not a StyleGAN2 network"
            )
        return found

    def _checked(self, name: str, value: Any, kind: type) -> Any:
        if value is None or (isinstance(value, (kind, int)) and not isinstance(value, bool)):
            return value
        raise RefusedError(f"{self.name}: its setting {name} is a {type(value).__name__}, expected a number")

    def _collect(self, record: Record, prefix: str, tensors: dict[str, StoredTensor]) -> None:
        self.records[prefix.removesuffix(".")] = record
        for kind in ("_parameters", "_buffers", "_modules"):
            for key, value in _dictionary(record, kind).items():
                self._parts += 1
                if self._parts > _MAX_PARTS:
                    raise RefusedError(f"{self.name} has more than {_MAX_PARTS:,} weights and modules")
                if not isinstance(key, str) or not re.fullmatch(r"\w{1,60}", key, flags=re.ASCII):
                    raise RefusedError(f"damaged: {self.name} has a part named {shown(str(key))}")
                if isinstance(value, Record) and kind == "_modules":
                    self._collect(value, f"{prefix}{key}.", tensors)
                elif isinstance(value, StoredTensor) and kind != "_modules":
                    tensors[prefix + key] = value
                elif value is not None:
                    raise RefusedError(f"damaged: {self.name}.{prefix}{key} is a {type(value).__name__}")


def _dictionary(record: Record, kind: str) -> dict[Any, Any]:
    found = record.state.get(kind) if isinstance(record.state, dict) else None
    if not isinstance(found, dict):
        raise RefusedError(f"damaged: a module {shown(record.class_name)} without {kind}")
    return found


def _generator(module: _Module) -> Generator:
    resolutions = module.resolutions(r"synthesis\.b(\d+)\.conv1\.weight")
    res = resolutions[-1]
    conditional = "mapping.embed.weight" in module.arrays
    w_dim = module.size("mapping.w_avg", 0)
    found = {
        "z_dim": module.size("mapping.fc0.weight", 1) - (w_dim if conditional else 0),
        "w_dim": w_dim,
        "c_dim": module.size("mapping.embed.weight", 1) if conditional else 0,
        "img_channels": module.size(f"synthesis.b{res}.torgb.weight", 0),
    }
    module.agree(img_resolution=res, **found)
    if found["z_dim"] < 1:
        raise RefusedError(f"{module.name} takes no latents: not a StyleGAN2 network")
    channels = {r: module.size(f"synthesis.b{r}.conv1.weight", 0) for r in resolutions}
    channel_base, channel_max = module.channel_settings(channels)
    config: dict[str, Any] = found | {
        "channel_base": channel_base,
        "channel_max": channel_max,
        "mapping_layers": sum(f"mapping.fc{i}.weight" in module.arrays for i in range(len(module.arrays))),
        "architecture": module.architecture("synthesis.b8.skip.weight", "synthesis.b4.torgb.weight"),
        "conv_clamp": module.setting("conv_clamp", float, attribute_of=f"synthesis.b{res}.conv1"),
    }
    return build_filled(lambda: Generator(res, **config), f"{module.name}.", module.prefixed())


def _discriminator(module: _Module) -> Discriminator:
    resolutions = module.resolutions(r"b(\d+)\.conv0?\.weight")
    res = resolutions[-1]
    first = {r: f"b{r}.conv0" if r > LOWEST_RES else f"b{r}.conv" for r in resolutions}
    channels = {r: module.size(f"{name}.weight", 0) for r, name in first.items()}
    found = {
        "c_dim": module.size("mapping.embed.weight", 1) if "mapping.embed.weight" in module.arrays else 0,
        "img_channels": module.size(f"b{res}.fromrgb.weight", 1),
    }
    module.agree(img_resolution=res, **found)
    channel_base, channel_max = module.channel_settings(channels)
    group = module.setting("mbstd_group_size", int, group="epilogue_kwargs", attribute_of="b4.mbstd")
    config: dict[str, Any] = found | {
        "channel_base": channel_base,
        "channel_max": channel_max,
        "architecture": module.architecture("b8.skip.weight", "b4.fromrgb.weight"),
        "mbstd_group_size": _DEFAULT_MBSTD_GROUP if group is None else max(group, 1),
        "mbstd_channels": module.size("b4.conv.weight", 1) - channels[LOWEST_RES],
        "conv_clamp": module.setting("conv_clamp", float, attribute_of=first[res]),
    }
    return build_filled(lambda: Discriminator(res, **config), f"{module.name}.", module.prefixed())
