"""What is done to an image's content: the filter of octave bands, noise, cutout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stylepipe.augment.columns import Columns
from stylepipe.augment.warp import reflected
from stylepipe.augment.wavelets import SYM2, octave_bands

BANDS = 4
BAND_OCTAVES = 1.0
NOISE_STD = 0.1
CUTOUT_SHARE = 0.5
_EXPECTED_POWER = tuple(power / 13 for power in (10, 1, 1, 1))
"""Of natural images, from the lowest band to the highest, whose power falls with the square of the frequency."""


def band_matrices(res: int) -> Tensor:
    """Return [BANDS, R, R] float32: each band's filter of a row that is reflected endlessly."""
    filters = octave_bands(SYM2, BANDS)
    row, tap = np.arange(res), np.arange(filters.shape[1])
    column = reflected(row[:, None] + tap - filters.shape[1] // 2, res)
    matrices = np.zeros((BANDS, res, res))
    for matrix, band in zip(matrices, filters, strict=True):
        np.add.at(matrix, (row[:, None], column), band)
    return torch.tensor(matrices, dtype=torch.float32)


def band_gains(happens: Columns, normal: Columns) -> Tensor:
    """Return the gain of each band, [N, BANDS].

    Karras et al. 2020, arXiv:2006.06676, appendix B.2. A band that is amplified by t changes the image's expected
    power; all bands are scaled so that it stays. What the bands' turns make of each is multiplied.
    """
    gains = []
    for band in range(BANDS):
        name = f"band_{band}"
        t = (happens[name] * normal[name] * BAND_OCTAVES).exp2()
        power = _EXPECTED_POWER[band]
        gains.append((t, (1 - power + power * t.square()).rsqrt()))
    common = torch.stack([norm for _, norm in gains]).prod(dim=0)
    return torch.stack([t * common for t, _ in gains], dim=1)


def filter_bands(img: Tensor, gains: Tensor, matrices: Tensor) -> Tensor:
    """Return img [N, C, R, R] with the gains [N, BANDS] on its bands, along both axes."""
    matrix = (gains[:, :, None, None] * matrices).sum(dim=1).unsqueeze(1)
    return matrix @ img @ matrix.mT


def add_noise(img: Tensor, noise: Tensor, happens: Columns, normal: Columns) -> Tensor:
    """Add normal noise [N, C, H, W] with a deviation of |N(0, 0.1^2)| per image (arXiv:2006.06676, appendix B.2)."""
    sigma = happens["noise"] * normal["noise"].abs() * NOISE_STD
    return img + noise * sigma[:, None, None, None]


def cut_out(img: Tensor, happens: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Set a square of half the image's side to 0, where `happens` [N] is 1 (arXiv:2006.06676, appendix B.2).

    Args:
        img: [N, C, R, R].
        happens: [N] of 0 or 1.
        x, y: [N] in [0, 1), the square's centre; it may reach over the edge.
    """
    res = img.shape[3]
    place = (torch.arange(res, device=img.device) + 0.5) / res
    within_x, within_y = ((place - centre[:, None]).abs() < CUTOUT_SHARE / 2 for centre in (x, y))
    cut = within_x[:, None, None, :] & within_y[:, None, :, None] & (happens > 0)[:, None, None, None]
    return img.masked_fill(cut, 0)
