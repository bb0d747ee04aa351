"""The transform of an image's pixels: blit and geometry, composed into one matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stylepipe.augment.columns import Columns

XINT_SHARE = 0.125
SCALE_OCTAVES = 0.2
ANISO_OCTAVES = 0.2
XFRAC_SHARE = 0.125


def inverse_geometry(happens: Columns, uniform: Columns, normal: Columns, res: int) -> Tensor:
    """Return the top two rows of each image's inverse transform, [N, 2, 3] in pixels from the image's centre.

    Karras et al. 2020, arXiv:2006.06676, appendix B.1. Applied in this order: flip in x, rotation by k quarters,
    translation t by whole pixels, scale s, rotation a, anisotropic scale (r, 1/r), rotation b, translation f. So

        G^-1 = F R(k pi/2) T(-t) S(1/s) R(a) S(1/r, r) R(b) T(-f),

    whose linear part is F R(k pi/2 + a) S(1/sr, r/s) R(b). What does not happen enters as the identity.
    """
    flip = 1 - 2 * happens["xflip"] * (uniform["xflip"] * 2).floor()
    quarters = happens["rotate90"] * (uniform["rotate90"] * 4).floor()
    quarter_cos, quarter_sin = (quarters - 2).abs() - 1, 1 - (quarters - 1).abs()  # without rounding
    tx, ty = (happens["xint"] * ((2 * uniform[f"xint_{axis}"] - 1) * (XINT_SHARE * res)).round() for axis in ("x", "y"))
    octaves = happens["scale"] * normal["scale"] * SCALE_OCTAVES
    aniso = happens["aniso"] * normal["aniso"] * ANISO_OCTAVES
    before = happens["rotate"] * (2 * uniform["rotate"] - 1) * math.pi + quarters * (math.pi / 2)
    after = happens["rotate_after"] * (2 * uniform["rotate_after"] - 1) * math.pi
    fx, fy = (happens["xfrac"] * normal[f"xfrac_{axis}"] * (XFRAC_SHARE * res) for axis in ("x", "y"))

    sx, sy = (-octaves - aniso).exp2(), (aniso - octaves).exp2()
    cos_a, sin_a, cos_b, sin_b = before.cos(), before.sin(), after.cos(), after.sin()
    xx = flip * (cos_a * sx * cos_b - sin_a * sy * sin_b)
    xy = -flip * (cos_a * sx * sin_b + sin_a * sy * cos_b)
    yx = sin_a * sx * cos_b + cos_a * sy * sin_b
    yy = cos_a * sy * cos_b - sin_a * sx * sin_b
    x = -flip * (quarter_cos * tx - quarter_sin * ty) - xx * fx - xy * fy
    y = -(quarter_sin * tx + quarter_cos * ty) - yx * fx - yy * fy
    return torch.stack([xx, xy, x, yx, yy, y], dim=1).unflatten(1, (2, 3))
