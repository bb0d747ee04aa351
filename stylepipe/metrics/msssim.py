"""Multi-scale structural similarity of pairs of images: the more alike a generator's images are, the higher it is.

Wang et al. 2003; as a measure of diversity: Odena et al. 2017, arXiv:1610.09585, and Karras et al. 2018,
arXiv:1710.10196. It sees large-scale mode collapse, not quality: compare with the same number of the real images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from stylepipe.metrics.extraction import Counts, Rows

IMAGES = 40_000  # 20,000 pairs
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, from the finest on
WINDOW, SIGMA = 11, 1.5  # pixels; below 161 px they shrink to the size of the coarsest scales
LOWEST_RESOLUTION = 2 ** (len(WEIGHTS) - 1)  # px: the coarsest scale is one pixel then

_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the similarity of each pair, [N] float32; 1 for equal images.

    prod_j cs_j^w_j over the scales, the last with its luminance term; each a mean over pixels and channels, and 0 where
    that is negative.

    Args:
        a, b: [N, 3, R, R] float32 in [0, 255], R at least 16, a power of two.
    """
    similarity = torch.ones(len(a), device=a.device)
    for scale, weight in enumerate(WEIGHTS):
        if scale:
            a, b = avg_pool2d(a, 2), avg_pool2d(b, 2)
        whole, contrast = _ssim(a, b)
        term = whole if scale == len(WEIGHTS) - 1 else contrast
        similarity = similarity * term.clamp(min=0) ** weight
    return similarity


class PairSimilarities:
    """Similarities of the images 2k and 2k + 1 of a set, as an `Extraction`."""

    name = "pairs"
    lowest = LOWEST_RESOLUTION
    seeded = False
    paths = False
    facts: Mapping[str, Any] = {"window": f"{WINDOW} px, or the scale's size where that is smaller"}

    def counts(self, available: int, asked: int | None) -> Counts:
        """Return even numbers of images: of real ones no more than there are."""
        fake = (IMAGES if asked is None else asked) // 2 * 2
        return Counts(min(available // 2 * 2, fake), fake)

    def extractor(self, resolution: int, seed: int, real: bool, device: torch.device) -> _OfPairs:
        """See `Extraction.extractor`."""
        del resolution, seed, real, device
        return _OfPairs()


class _OfPairs:
    def __call__(self, images: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return for each image the similarity of its pair, [N, 1], of [N, R, R, 3] uint8, N even."""
        del numbers
        img = images.permute(0, 3, 1, 2).float()
        return {"similarity": ms_ssim(img[0::2], img[1::2]).repeat_interleave(2)[:, None]}


def mean_similarities(real: Rows, fake: Rows) -> dict[str, float]:
    """Return the mean similarity of pairs of generated images, and of real ones."""
    return {
        "msssim": float(fake["similarity"].mean(dtype=torch.float64)),
        "msssim_real": float(real["similarity"].mean(dtype=torch.float64)),
    }


def _ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return structural similarity and its contrast and structure part, [N] each."""
    n, _, size = a.shape[:3]
    window = min(WINDOW, size)
    offsets = torch.arange(window, device=a.device) - (window - 1) / 2
    taps = torch.exp(-((offsets / (SIGMA * window / WINDOW)) ** 2) / 2)
    taps = taps / taps.sum()
    stacked = torch.stack([a, b, a * a, b * b, a * b]).reshape(-1, 1, size, size)
    blurred = conv2d(conv2d(stacked, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))
    mean_a, mean_b, aa, bb, ab = blurred.reshape(5, n, -1)
    cs = (2 * (ab - mean_a * mean_b) + _C2) / (aa - mean_a**2 + bb - mean_b**2 + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return (luminance * cs).mean(dim=1), cs.mean(dim=1)
