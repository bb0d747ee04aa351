"""`stylepipe train --init`: what a training takes from a network file, and how its networks start from that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from stylepipe.config import Config, NetworkConfig
from stylepipe.errors import UserError
from stylepipe.interop.network_file import (
    NetworkHeader,
    classes_of,
    license_notice,
    lineage,
    load_network,
    read_header,
    same_labels,
)
from stylepipe.interop.transfer import check_resolution, fill_discriminator, fill_generator
from stylepipe.networks.stylegan2 import Discriminator, Generator
from stylepipe.recipes.gan import GANRecipe

# Options by the names that networks give them. Weights of one setting are of no use to another.
_G_WEIGHTS = {
    "z_dim": "z_dim",
    "w_dim": "w_dim",
    "channel_base": "channel_base",
    "channel_max": "channel_max",
    "mapping_layers": "mapping_layers",
    "architecture": "g_architecture",
}
_D_WEIGHTS = {"architecture": "d_architecture", "mbstd_channels": "mbstd_channels"}
# Options that make D another network, whose default the header of a file leaves out.
_D_FORMS = {"mbdisc_kernels": "mbdisc_kernels", "d_last_layer": "last_layer", "spectral_norm": "spectral_norm"}
_IN_COMMON = ("res", "c_dim", "img_channels", "channel_base", "channel_max")


def settings_of(path: str) -> dict[str, Any]:
    """Return the options that the networks of a file suggest, as a `--config` file would hold them.

    Besides what their weights need: resolution, clamp and the group of minibatch stddev. Their precision, which depends
    on the device that they were trained on, is left out.

    Raises:
        UserError: no network file, or not one of a generator for colour images with a discriminator of the same kind.
    """
    header = _read(path)
    network = {option: header.config[key] for key, option in _G_WEIGHTS.items()}
    if header.config["conv_clamp"] is not None:
        network["conv_clamp"] = header.config["conv_clamp"]
    if (D := header.beside.get("D")) is not None:
        network |= {option: D.config[key] for key, option in _D_WEIGHTS.items()}
        if D.config["mbstd_channels"] > 0:
            network["mbstd_group_size"] = D.config["mbstd_group_size"]
    return {"res": header.config["res"], "network": network}


def check_settings(config: Config, path: str) -> None:
    """See that networks of these settings can start from those of a file.

    Raises:
        UserError: names the option, its value and that of the file.
    """
    header = _read(path)
    D = header.beside.get("D")
    weights = {option: header.config[key] for key, option in _G_WEIGHTS.items()}
    if D is not None:
        weights |= {option: D.config[key] for key, option in _D_WEIGHTS.items()}
    for option, value in weights.items():
        found = getattr(config.network, option)
        if found != value:
            raise UserError(
                f"--network.{option.replace('_', '-')} {found}: --init {path} has {value}, and its weights fit nothing "
                f"else; leave the option out, or train without --init"
            )
    for option, name in _D_FORMS.items():
        here, default = getattr(config.network, option), getattr(NetworkConfig(), option)
        there = default if D is None else D.config.get(name, default)
        if D is not None and here != there:
            raise UserError(
                f"--network.{option.replace('_', '-')} {here}: the discriminator of --init {path} has {there}, and its "
                f"weights fit nothing else; leave the option out, or start from a file without D"
            )
    check_resolution(header.config, None if D is None else D.config, config.res)
    if config.freeze_d > 0 and D is None:
        raise UserError(
            f"--freeze-d {config.freeze_d}: --init {path} has no discriminator, and a new one has learnt nothing yet; "
            f"leave it out, or start from a file saved with --snapshot-with-d"
        )
    if config.freeze_d > 0 and config.res != header.config["res"]:
        raise UserError(
            f"--freeze-d {config.freeze_d}: at --res {config.res} the discriminator has first layers that have learnt "
            f"nothing yet, --init {path} having {header.config['res']} px; leave it out, or keep that resolution"
        )


def start_from(recipe: GANRecipe, path: str, classes: Sequence[str] | None) -> list[str]:
    """Let the networks of a recipe start from those of a file, and return lines that say how.

    G, G_ema and D each start from their like; G from G_ema where the file has no G, and D anew where it has no D.

    Args:
        recipe: freshly made.
        path: settings that `check_settings` has approved.
        classes: names of the classes of the data, None for label vectors or no labels.

    Raises:
        UserError: the file is damaged.
    """
    header = read_header(path)
    device = recipe.device
    alike = same_labels(path, header, recipe.labels.c_dim, classes)
    own_g, has_d = "G" if "G" in header.beside else None, "D" in header.beside
    # G first: both hold one buffer of mean styles, and those of the average are the ones to keep.
    fill_generator(recipe.G, cast(Generator, load_network(path, device, own_g)), alike)
    fill_generator(recipe.G_ema, cast(Generator, load_network(path, device)), alike)
    if has_d:
        fill_discriminator(recipe.D, cast(Discriminator, load_network(path, device, "D")), alike)
    recipe.start_pl_mean()
    return _told(recipe, path, header, own_g is not None, has_d, alike)


def origin_of(path: str) -> dict[str, str]:
    """Return what network files of a training that starts from this one shall say of it: its origin and its licence."""
    metadata = read_header(path).metadata
    licensed = {key: value for key, value in metadata.items() if key == "license"}
    return {"derived_from": lineage(path, metadata.get("derived_from")), **licensed}


def _told(
    recipe: GANRecipe, path: str, header: NetworkHeader, has_g: bool, has_d: bool, same_labels: bool
) -> list[str]:
    average = "G and its average" if has_g else "the averaged G"
    lines = [f"starting from {path}: {average}{' and D' if has_d else '; it has no D, so that one is new'}"]
    if (res := recipe.G.config["res"]) != header.config["res"]:
        lines.append(f"resolution: {header.config['res']} px there, {res} px here")
    if not same_labels:
        lines.append(
            f"labels: {header.config['c_dim']} there, {recipe.labels.c_dim} here, so all labels start as one: as the "
            f"mean of those there, if any"
        )
    elif recipe.labels.c_dim > 0:
        lines += _parts_of_labels(recipe, header)
    notice = license_notice(path, header)
    return lines if notice is None else [*lines, notice]


def _parts_of_labels(recipe: GANRecipe, header: NetworkHeader) -> Iterator[str]:
    """Say what of the file's labels is left out, and what is new, where the labels are the same."""
    parts = [
        (
            "mean styles of classes",
            "--network.class-w-avg",
            header.config.get("class_w_avg", False),
            recipe.G.mapping.class_w_offset is not None,
        )
    ]
    if (D := header.beside.get("D")) is not None:
        conditioning = D.config.get("conditioning", "projection")
        parts += [
            (
                "D's projection of labels",
                "--network.d-conditioning projection or both",
                conditioning != "aux",
                recipe.D.mapping is not None,
            ),
            (
                "D's auxiliary classifier",
                "--network.d-conditioning aux or both, with --loss.acgan-weight",
                conditioning != "projection",
                recipe.D.b4.aux is not None,
            ),
        ]
    for name, option, there, here in parts:
        if there and not here:
            yield f"left out: {name} of the file, which {option} would keep"
        elif here and not there:
            yield f"new: {name}, which the file has not"


def _read(path: str) -> NetworkHeader:
    """Read a header and see that its networks belong together, and that its labels are not damaged."""
    header = read_header(path)
    if header.class_name != "stylegan2.Generator":
        raise UserError(
            f"--init {path}: its main network is a {header.class_name}; expected a stylegan2.Generator, the one "
            f"kind that can be started from"
        )
    _check_complete(path, header, {*_IN_COMMON, *_G_WEIGHTS, "conv_clamp"})
    if header.config["img_channels"] != 3:
        raise UserError(f"--init {path}: images of {header.config['img_channels']} channels; expected 3, colour")
    if header.config["c_dim"] > 0:
        classes_of(path, header.metadata, header.config["c_dim"])
    for name, kind in {"G": "stylegan2.Generator", "D": "stylegan2.Discriminator"}.items():
        if (other := header.beside.get(name)) is None:
            continue
        if other.class_name != kind:
            raise UserError(f"--init {path}: its {name} is a {other.class_name}; expected a {kind}")
        _check_complete(path, other, {*_IN_COMMON, *(_G_WEIGHTS if name == "G" else (*_D_WEIGHTS, "mbstd_group_size"))})
        for key in (*_IN_COMMON, *(_G_WEIGHTS if name == "G" else ())):
            if other.config[key] != header.config[key]:
                raise UserError(
                    f"--init {path}: its {name} has {key} {other.config[key]}, its main network {header.config[key]}; "
                    f"expected networks of one training"
                )
    return header


def _check_complete(path: str, header: NetworkHeader, keys: set[str]) -> None:
    if missing := sorted(keys - header.config.keys()):
        raise UserError(f"--init {path}: its header says nothing of {missing[0]}; copy or download it again")
