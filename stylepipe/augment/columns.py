"""Where an augmentation finds its random numbers in an image's row of them.

Every purpose has a column of its own, whatever else is on: so switching one augmentation on or off changes nothing
about the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHANCES = {
    "xflip": "xflip",
    "rotate90": "rotate90",
    "xint": "xint",
    "scale": "scale",
    "rotate": "rotate",
    "aniso": "aniso",
    "rotate_after": "rotate",  # a second time, beyond the anisotropic scale
    "xfrac": "xfrac",
    "brightness": "brightness",
    "contrast": "contrast",
    "lumaflip": "lumaflip",
    "hue": "hue",
    "saturation": "saturation",
    "band_0": "imgfilter",
    "band_1": "imgfilter",
    "band_2": "imgfilter",
    "band_3": "imgfilter",
    "noise": "noise",
    "cutout": "cutout",
}
"""What can happen to an image, and whose strength says how often. The first uniform columns decide whether it does."""

UNIFORMS = (
    "xflip", "rotate90", "xint_x", "xint_y", "rotate", "rotate_after", "lumaflip", "hue", "cutout_x", "cutout_y",
)  # fmt: skip
"""Of the uniform columns after those."""

NORMALS = (
    "scale", "aniso", "xfrac_x", "xfrac_y", "brightness", "contrast", "saturation",
    "band_0", "band_1", "band_2", "band_3", "noise",
)  # fmt: skip
"""Of the normal columns."""

Columns = Mapping[str, Tensor]
"""[N] tensors by name."""


def uniform_columns(uniform: Tensor) -> Columns:
    """Name the values among the uniform numbers [N, len(CHANCES) + len(UNIFORMS)]."""
    return dict(zip(UNIFORMS, uniform[:, len(CHANCES) :].unbind(1), strict=True))


def normal_columns(normal: Tensor) -> Columns:
    """Name the normal numbers [N, len(NORMALS)]."""
    return dict(zip(NORMALS, normal.unbind(1), strict=True))


def happenings(uniform: Tensor, p: Tensor, strengths: Tensor, twice: Tensor) -> Columns:
    """Decide what happens to each image.

    Args:
        uniform: [N, len(CHANCES) + ...] in [0, 1).
        p: [] of the same type.
        strengths: [len(CHANCES)] of the same type.
        twice: [len(CHANCES)] bool, of what has two chances that together are to come to p times the strength: each is
            then 1 - sqrt(1 - p strength).

    Returns:
        [N] of 1 where it does, else 0, of the same type, by the names of CHANCES.
    """
    chance = (p * strengths).clamp(0, 1)
    chance = torch.where(twice, 1 - (1 - chance).sqrt(), chance)
    happens = (uniform[:, : len(CHANCES)] < chance).to(uniform.dtype)
    return dict(zip(CHANCES, happens.unbind(1), strict=True))
