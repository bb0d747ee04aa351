"""The names that rosinality's checkpoints have for the parameters of ours, and the shapes there.

Its convolutions of the generator are in one list, `convs`, two per resolution from 8 px up; the discriminator's `convs`
holds fromRGB and then a block per resolution, from the image down.
"""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """Where a parameter stands: its name there, and how many dimensions of size 1 are in front of and behind ours."""

    name: str
    lead: int = 0
    trail: int = 0


def generator_places(res: int, mapping_layers: int) -> dict[str, Place]:
    """Return the places of all weights of a generator by our names, noise_const included, w_avg not."""
    places: dict[str, Place] = {}
    for i in range(mapping_layers):  # layer 0 there is the normalisation
        places |= {f"mapping.fc{i}.{kind}": Place(f"style.{i + 1}.{kind}") for kind in ("weight", "bias")}
    places["synthesis.b4.const"] = Place("input.input", lead=1)
    places |= _layer("b4.conv1", "conv1", noise=0) | _to_rgb("b4.torgb", "to_rgb1")
    for i, r in enumerate(resolutions_above_4(res)):
        places |= _layer(f"b{r}.conv0", f"convs.{2 * i}", noise=2 * i + 1)
        places |= _layer(f"b{r}.conv1", f"convs.{2 * i + 1}", noise=2 * i + 2)
        places |= _to_rgb(f"b{r}.torgb", f"to_rgbs.{i}")
    return places


def generator_filters(res: int) -> list[str]:
    """Return the names of the resampling filters there, all of upsampling."""
    steps = range(len(resolutions_above_4(res)))
    return [name for i in steps for name in (f"convs.{2 * i}.conv.blur.kernel", f"to_rgbs.{i}.upsample.kernel")]


def discriminator_places(res: int) -> dict[str, Place]:
    """Return the places of all weights of a discriminator by our names."""
    places = _pair(f"b{res}.fromrgb", "convs.0.0", "convs.0.1")
    for i, r in enumerate(reversed(resolutions_above_4(res)), start=1):
        places |= _pair(f"b{r}.conv0", f"convs.{i}.conv1.0", f"convs.{i}.conv1.1")
        places |= _pair(f"b{r}.conv1", f"convs.{i}.conv2.1", f"convs.{i}.conv2.2")
        places[f"b{r}.skip.weight"] = Place(f"convs.{i}.skip.1.weight")
    places |= _pair("b4.conv", "final_conv.0", "final_conv.1")
    return (
        places
        | _pair("b4.fc", "final_linear.0", "final_linear.0")
        | _pair("b4.out", "final_linear.1", "final_linear.1")
    )


def discriminator_filters(res: int) -> list[str]:
    """Return the names of the resampling filters there, all of downsampling."""
    blocks = range(1, len(resolutions_above_4(res)) + 1)
    return [name for i in blocks for name in (f"convs.{i}.conv2.0.kernel", f"convs.{i}.skip.0.kernel")]


def resolutions_above_4(res: int) -> list[int]:
    """Return 8, 16, ... up to `res`."""
    return [2**i for i in range(3, res.bit_length())]


def _layer(ours: str, theirs: str, noise: int) -> dict[str, Place]:
    ours = f"synthesis.{ours}"
    return {
        f"{ours}.weight": Place(f"{theirs}.conv.weight", lead=1),
        f"{ours}.affine.weight": Place(f"{theirs}.conv.modulation.weight"),
        f"{ours}.affine.bias": Place(f"{theirs}.conv.modulation.bias"),
        f"{ours}.noise_strength": Place(f"{theirs}.noise.weight", lead=1),
        f"{ours}.noise_const": Place(f"noises.noise_{noise}", lead=2),
        f"{ours}.bias": Place(f"{theirs}.activate.bias"),
    }


def _to_rgb(ours: str, theirs: str) -> dict[str, Place]:
    ours = f"synthesis.{ours}"
    return {
        f"{ours}.weight": Place(f"{theirs}.conv.weight", lead=1),
        f"{ours}.affine.weight": Place(f"{theirs}.conv.modulation.weight"),
        f"{ours}.affine.bias": Place(f"{theirs}.conv.modulation.bias"),
        f"{ours}.bias": Place(f"{theirs}.bias", lead=1, trail=2),
    }


def _pair(ours: str, weight: str, bias: str) -> dict[str, Place]:
    return {f"{ours}.weight": Place(f"{weight}.weight"), f"{ours}.bias": Place(f"{bias}.bias")}
