"""Which augmentations are on, and how much: strengths, and the named pipelines of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from stylepipe.config import AugmentConfig
from stylepipe.errors import UserError


@dataclass(frozen=True)
class Strengths:
    """Share of p at which each augmentation is applied; 0 leaves it out.

    Raises:
        UserError: a strength is not within [0, 1].
    """

    xflip: float = 0
    rotate90: float = 0
    xint: float = 0
    scale: float = 0
    rotate: float = 0
    aniso: float = 0
    xfrac: float = 0
    brightness: float = 0
    contrast: float = 0
    lumaflip: float = 0
    hue: float = 0
    saturation: float = 0
    imgfilter: float = 0
    noise: float = 0
    cutout: float = 0

    def __post_init__(self) -> None:
        for name in NAMES:
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"augmentation strength {name} {value}: expected 0 to 1, a share of the probability p")


NAMES = tuple(field.name for field in fields(Strengths))
"""The augmentations, in the order in which they are applied."""

BLIT = ("xflip", "rotate90", "xint")
GEOMETRY = ("scale", "rotate", "aniso", "xfrac")
COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")


def _all_of(*names: str) -> Strengths:
    return Strengths(**dict.fromkeys(names, 1.0))


PIPELINES: Mapping[str, Strengths] = {
    "blit": _all_of(*BLIT),
    "geom": _all_of(*GEOMETRY),
    "color": _all_of(*COLOR),
    "filter": _all_of("imgfilter"),
    "noise": _all_of("noise"),
    "cutout": _all_of("cutout"),
    "bg": _all_of(*BLIT, *GEOMETRY),
    "bgc": _all_of(*BLIT, *GEOMETRY, *COLOR),
    "bgcf": _all_of(*BLIT, *GEOMETRY, *COLOR, "imgfilter"),
    "bgcfn": _all_of(*BLIT, *GEOMETRY, *COLOR, "imgfilter", "noise"),
    "bgcfnc": _all_of(*NAMES),
}
"""Karras et al. 2020, arXiv:2006.06676, section 3.1: the pipelines compared there."""


def strengths_of(config: AugmentConfig) -> Strengths:
    """Return the pipeline's strengths, those that the config names replaced.

    Raises:
        UserError: a strength is not within [0, 1], or none is above 0.
    """
    named = {name: value for name in NAMES if (value := getattr(config, name)) is not None}
    strengths = replace(PIPELINES[config.pipe], **named)
    if strengths == Strengths():
        raise UserError(f"--aug.pipe {config.pipe}: every strength is 0; give one, or --augment none")
    return strengths
