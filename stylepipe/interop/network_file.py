"""Network files: weights, the settings that rebuild the network, and where it came from; safetensors, no pickle.

The header is safetensors' own string-to-string metadata:

    format              "stylepipe-network"
    format_version      "1", or "2" where other networks stand beside the main one
    stylepipe_version   version of the writer
    class               key of NETWORKS, such as "stylegan2.Generator"
    config              JSON object: the class is called with it
    beside              JSON object: class and config of each further network, by name
    ...                 what the writer adds: images_seen, data, preset, license, derived_from

The tensors are the main network's state dict, buffers included, and those of each further network under its name and
a slash: `D/b4.out.weight`. Any safetensors reader opens these files.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stylepipe.errors import UserError
from stylepipe.files import atomic_path
from stylepipe.parsing import one_line, parse_json

FORMAT = "stylepipe-network"
FORMAT_VERSION = 2

# What may be built from a file: nothing else is imported, whatever a file says. Each class has a `config`, the keyword
# arguments that make another of its kind.
NETWORKS = {
    "stylegan2.Generator": "stylepipe.networks.stylegan2:Generator",
    "stylegan2.Discriminator": "stylepipe.networks.stylegan2:Discriminator",
    "stylegan.Generator": "stylepipe.networks.stylegan:Generator",
    "stylegan.Discriminator": "stylepipe.networks.stylegan:Discriminator",
    "progan.Generator": "stylepipe.networks.progan:Generator",
    "progan.Discriminator": "stylepipe.networks.progan:Discriminator",
    "r3gan.Generator": "stylepipe.networks.r3gan:Generator",
    "r3gan.Discriminator": "stylepipe.networks.r3gan:Discriminator",
    "dcgan.Generator": "stylepipe.networks.dcgan:Generator",
    "dcgan.Discriminator": "stylepipe.networks.dcgan:Discriminator",
}

FOREIGN_SUFFIXES = {".pkl", ".pt"}  # of what `stylepipe convert` reads

_RESERVED = {"format", "format_version", "stylepipe_version", "class", "config", "beside"}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Of settings that make a network large in time or memory though its file is small; other numbers have the last.
_LARGEST = {"res": 4096, "z_dim": 1 << 16, "mapping_layers": 100}
_LARGEST_OF_OTHERS = 1 << 24
_LONGEST_TEXT = 100
# Settings that are no whole numbers, and those that may be null.
_TEXTS = {"architecture", "half_dtype", "norm", "conditioning", "last_layer"}
_FRACTIONS = {"conv_clamp", "alpha"}
_OPTIONAL = {"half_dtype", "conv_clamp"}


@dataclass(frozen=True)
class NetworkHeader:
    """What a network file says about itself."""

    class_name: str
    """Key of NETWORKS."""
    config: dict[str, Any]
    """Keyword arguments of the class."""
    metadata: dict[str, str]
    """Everything else, such as images_seen."""
    beside: dict[str, NetworkHeader] = field(default_factory=dict)
    """Further networks of the file by name, such as D; their metadata is the file's."""


class Content(NamedTuple):
    """What a network file holds."""

    tensors: Mapping[str, Tensor]
    """By name. Of `content_of` they are on the networks' device, and views of what training changes."""
    header: Mapping[str, str]


def save_network(
    path: str | Path,
    network: nn.Module,
    *,
    beside: Mapping[str, nn.Module] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network to `path`, whole or not at all.

    Args:
        path: by custom `network-<kimg>.safetensors`.
        network, beside, metadata: as for `content_of`.

    Raises:
        UserError: the file cannot be written.
    """
    content = content_of(network, beside=beside, metadata=metadata)
    # A training network's tensors are views of one arena; safetensors wants each to own its memory.
    copies = {
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in content.tensors.items()
    }
    write_network(path, Content(copies, content.header))


def content_of(
    network: nn.Module,
    *,
    beside: Mapping[str, nn.Module] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Content:
    """Return what a file of a network holds.

    Args:
        network: an instance of one of NETWORKS, on any device; it is not changed. By custom the averaged generator.
        beside: further networks by name, by custom G and D, what training goes on from.
        metadata: what else the header shall say, such as `images_seen`.
    """
    extra, beside = dict(metadata or {}), dict(beside or {})
    header = {
        "format": FORMAT,
        "format_version": "2" if beside else "1",  # the oldest that can say it: older readers go on reading
        "stylepipe_version": version("stylepipe"),
        "class": _class_name(network),
        "config": json.dumps(network.config, sort_keys=True),
    }
    if beside:
        described = {name: {"class": _class_name(other), "config": other.config} for name, other in beside.items()}
        header["beside"] = json.dumps(described, sort_keys=True)
    assert not extra.keys() & _RESERVED, f"reserved: {sorted(extra.keys() & _RESERVED)}"
    tensors = {
        prefix + name: tensor.detach()
        for prefix, module in {"": network, **{f"{name}/": other for name, other in beside.items()}}.items()
        for name, tensor in module.state_dict().items()
    }
    return Content(tensors, header | extra)


def write_network(path: str | Path, content: Content) -> None:
    """Write what `content_of` returned, whole or not at all; its tensors contiguous on the CPU, none a view of another.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            save_file(dict(content.tensors), temporary, metadata=dict(content.header))
    except (OSError, SafetensorError) as error:  # a full disk comes as the latter
        raise UserError(f"cannot write {path}: {error}") from error


def load_network(path: str | Path, device: str | torch.device | None = None, name: str | None = None) -> nn.Module:
    """Build the network of a file, ready to use: in eval mode, without gradients.

        G = load_network("network-000040.000.safetensors")
        img = G(torch.randn(4, G.z_dim), truncation_psi=0.7)  # [4, 3, R, R] float32 in [-1, 1]

    Args:
        path: written by `save_network`.
        device: where to put it; by default the CPU.
        name: which network of a file that holds several, such as "D"; by default the main one, the averaged generator.
            Only its weights are read.

    No network is allocated before the tensors of the file are known to be those of the one that it describes.

    Raises:
        UserError: there is no such file; it is something else, cut short, or made by a newer stylepipe; it holds no
            network of that name; a tensor is missing, or has another shape or kind of number.
    """
    header = read_header(path)
    if name is not None and name not in header.beside:
        held = f"besides the main one it holds {', '.join(header.beside)}" if header.beside else "it holds one only"
        raise UserError(f"{path}: no network {name!r} in it; {held}")
    described = header if name is None else header.beside[name]
    prefix = "" if name is None else f"{name}/"
    try:
        with safe_open(str(path), framework="pt") as file:
            own = [key for key in file.keys() if _owner(key, header) == name]  # noqa: SIM118 - it is no mapping
            tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in own}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: its tensors cannot be read ({one_line(error)}); copy or download it again") from error
    with torch.device("meta"):
        _check_tensors(path, _build(path, described).state_dict(), tensors)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn and overwritten: leave no trace of it
        network = _build(path, described)
    network.load_state_dict(tensors)
    return network.to(device or "cpu").eval().requires_grad_(False)


def read_header(path: str | Path) -> NetworkHeader:
    """Read what a network file says about itself, without its weights.

    Raises:
        UserError: as `load_network`, except for tensors that do not fit.
    """
    fields = _read_fields(Path(path))
    if fields.get("format") != FORMAT:
        raise UserError(
            f"{path}: a safetensors file, but not a network written by stylepipe (no '{FORMAT}' in its header)"
        )
    found = one_line(fields.get("format_version", "missing"))
    if not re.fullmatch("[0-9]{1,9}", found) or int(found) > FORMAT_VERSION:
        writer = one_line(fields.get("stylepipe_version", "a newer stylepipe"))
        raise UserError(
            f"{path}: format version {found}, written by stylepipe {writer}; this one "
            f"({version('stylepipe')}) reads versions up to {FORMAT_VERSION}: install a newer stylepipe"
        )
    metadata = {key: value for key, value in fields.items() if key not in _RESERVED - {"stylepipe_version"}}
    try:
        config = _settings(parse_json(fields.get("config", "")))
        described = parse_json(fields.get("beside", "{}"))
        beside = {
            name: NetworkHeader(str(entry["class"]), _settings(entry["config"]), metadata)
            for name, entry in described.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the network's settings in the header are damaged ({one_line(error)})") from error
    header = NetworkHeader(fields.get("class", ""), config, metadata, beside)
    for class_name in [header.class_name, *(other.class_name for other in beside.values())]:
        if class_name not in NETWORKS:
            raise UserError(f"{path}: holds a '{one_line(class_name)}'; this stylepipe knows {', '.join(NETWORKS)}")
    return header


def license_notice(path: str | Path, header: NetworkHeader) -> str | None:
    """Return the line that whoever uses a network of a foreign licence is shown; None where none is recorded."""
    found = header.metadata.get("license")
    return None if found is None else f"network {Path(path).name} is under {one_line(found)}"


def classes_of(path: str | Path, metadata: Mapping[str, str], c_dim: int) -> tuple[list[str] | None, bool]:
    """Return the names of the classes, None where the file says none, and whether its labels are vectors.

    Args:
        path: of the network file, for messages.
        metadata: of the file; `classes` is a JSON list of names by number, or null where labels are vectors. Files from
            elsewhere have none.
        c_dim: label dimensions of the network, 1 or more.

    Raises:
        UserError: they are damaged.
    """
    if "classes" not in metadata:
        return None, False
    try:
        names = parse_json(metadata["classes"])
    except ValueError as error:
        raise UserError(f"{path}: the names of its classes in the header are damaged ({one_line(error)})") from error
    if names is None:
        return None, True
    if not isinstance(names, list) or len(names) != c_dim or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: the names of its classes in the header are damaged; expected a list of {c_dim} names")
    return names, False


def same_labels(path: str | Path, header: NetworkHeader, c_dim: int, classes: Sequence[str] | None) -> bool:
    """Tell whether labels mean the same in the file and in the data; of classes without names, as many do."""
    if c_dim == 0 or c_dim != header.config["c_dim"]:
        return c_dim == header.config["c_dim"]
    names, vectors = classes_of(path, header.metadata, c_dim)
    if names is None and not vectors:
        return True
    return names == (None if classes is None else list(classes))


def lineage(path: str | Path, earlier: str | None) -> str:
    """Return what a file made from that at `path` says as `derived_from`: its name, and what it says itself."""
    return " < ".join([Path(path).name, *([earlier] if earlier else [])])


def _read_fields(path: Path) -> dict[str, str]:
    """Read the header's strings, and see that the file has all the bytes its header announces."""
    nothing = f"{path}: not a network file; expected one that training wrote, network-<kimg>.safetensors"
    if path.suffix in FOREIGN_SUFFIXES:
        nothing += f"; stylepipe convert {path} OUT.safetensors makes one"
    if path.is_dir():
        networks = sorted(path.glob("network-*.safetensors"))
        remedy = f"name a file in it, such as {networks[-1]}" if networks else "expected network-<kimg>.safetensors"
        raise UserError(f"{path}: a folder; {remedy}")
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > _MAX_HEADER_BYTES or file.read(1) != b"{":
                raise UserError(nothing)
            text = b"{" + file.read(min(length, size) - 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a network-<kimg>.safetensors") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) < length:
        raise UserError(f"{path}: cut short within its header, at {size:,} bytes; copy or download it again")
    try:
        entries = parse_json(text)
        fields = dict(entries.pop("__metadata__", {}))
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if not all(isinstance(value, str) for value in fields.values()) or not 0 <= end < 1 << 63:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(nothing) from None
    if size != 8 + length + end:
        problem = "cut short" if size < 8 + length + end else "longer than its header says"
        raise UserError(f"{path}: {problem}, {size:,} of {8 + length + end:,} bytes; copy or download it again")
    return fields


def _settings(values: Any) -> dict[str, Any]:
    """Return the settings of a network; raise ValueError where one is of a kind or a size that no network has."""
    for name, value in values.items():
        kinds = str if name in _TEXTS else (int, float) if name in _FRACTIONS else int
        right = isinstance(value, kinds)
        if isinstance(value, str):
            right &= value.isprintable() and len(value) <= _LONGEST_TEXT
        elif isinstance(value, (int, float)):
            right &= 0 <= value <= _LARGEST.get(name, _LARGEST_OF_OTHERS)  # NaN is not
        if not right and not (value is None and name in _OPTIONAL):
            raise ValueError(f"{name} {value!r}")
    return dict(values)


def _owner(key: str, header: NetworkHeader) -> str | None:
    """Return which of the networks beside the main one a tensor belongs to; None: the main one."""
    name = key.partition("/")[0]
    return name if "/" in key and name in header.beside else None


def _class_name(network: nn.Module) -> str:
    kind = type(network)
    name = f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}"
    assert name in NETWORKS, f"{name} is not in NETWORKS"
    return name


def _build(path: str | Path, header: NetworkHeader) -> nn.Module:
    module, _, attribute = NETWORKS[header.class_name].partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    try:
        network: nn.Module = kind(**header.config)
    except Exception as error:  # a strange setting may break anything
        found = one_line(error) or type(error).__name__
        raise UserError(f"{path}: its settings do not make a {header.class_name}: {found}") from error
    return network


def _check_tensors(path: str | Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise UserError(f"{path}: tensor {name} is missing")
        own = found[name]
        if own.shape != tensor.shape:
            shapes = f"{list(own.shape)} found, {list(tensor.shape)} expected from the settings in its header"
            raise UserError(f"{path}: tensor {name} has another shape: {shapes}")
        if own.is_floating_point() != tensor.is_floating_point() or own.is_complex():
            raise UserError(f"{path}: tensor {name} holds {own.dtype}; expected {tensor.dtype}")
    unknown = sorted(found.keys() - expected.keys())
    if unknown:
        raise UserError(f"{path}: tensor {one_line(unknown[0])} has no place in the network that its header describes")
