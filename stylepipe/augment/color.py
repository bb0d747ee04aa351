"""The transform of an image's colours: one affine map per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stylepipe.augment.columns import Columns

BRIGHTNESS_STD = 0.2
CONTRAST_OCTAVES = 0.5
SATURATION_OCTAVES = 1.0


def color_basis() -> Tensor:
    """Return the maps [3, 3, 3] that colour transforms are composed of, with v = (1, 1, 1) / sqrt(3).

    v v', which keeps the luma; I - v v', which keeps the chroma; and v x, which turns the chroma by a quarter.
    """
    luma = torch.full((3, 3), 1 / 3)
    quarter = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return torch.stack([luma, torch.eye(3) - luma, quarter])


def color_matrix(happens: Columns, uniform: Columns, normal: Columns, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's map of colours: [N, 3, 3], and what is then added to all three, [N].

    Karras et al. 2020, arXiv:2006.06676, appendix B.1. Applied in this order: brightness b, contrast c, luma flip
    I - 2 v v', hue rotation h about v, saturation s. The last three keep luma and chroma apart, so the product is

        c [+-v v' + s (cos h (I - v v') + sin h (v x))] (x + b 1)

    What does not happen enters as the identity, without rounding.
    """
    brightness = happens["brightness"] * normal["brightness"] * BRIGHTNESS_STD
    contrast = (happens["contrast"] * normal["contrast"] * CONTRAST_OCTAVES).exp2()
    luma = contrast * (1 - 2 * happens["lumaflip"] * (uniform["lumaflip"] * 2).floor())
    hue = happens["hue"] * (2 * uniform["hue"] - 1) * math.pi
    chroma = contrast * (happens["saturation"] * normal["saturation"] * SATURATION_OCTAVES).exp2()
    shares = torch.stack([luma, chroma * hue.cos(), chroma * hue.sin()], dim=1)
    # No matrix product: on a GPU it may round to TF32.
    matrix = (shares[:, :, None, None] * basis).sum(dim=1)
    return matrix, luma * brightness


def apply_color(img: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Return img [N, 3 or 1, H, W] with `matrix` [N, 3, 3] applied to its colours, and `offset` [N] added.

    A single channel is grey: its colours are equal before, and averaged after.
    """
    offset = offset[:, None, None, None]
    if img.shape[1] == 1:
        return img * (matrix.sum(dim=(1, 2)) / 3)[:, None, None, None] + offset
    y = torch.addcmul(offset, img[:, :1], matrix[:, :, :1, None])
    for channel in (1, 2):
        y = torch.addcmul(y, img[:, channel : channel + 1], matrix[:, :, channel : channel + 1, None])
    return y
