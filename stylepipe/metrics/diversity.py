"""How much images differ from one another, which is what mode collapse takes from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

SIDE = 32  # pixels at which images are compared: what they show, not its grain


class Diversity(NamedTuple):
    """Distances between images of a batch, as root mean square over pixels and channels in [-1, 1].

    Attributes:
        pairwise: mean over all pairs. It falls where all images become alike.
        nearest: mean distance of an image to the one most like it. It falls where there are but a few images, each
            many times, which may be far apart.
    """

    pairwise: float
    nearest: float


def thumbnails(images: Tensor, side: int = SIDE) -> Tensor:
    """Return images at most `side` pixels wide, by box averages.

    Args:
        images: [N, R, R, 3] uint8, R a power of two.
        side: a power of two.

    Returns:
        [N, 3, r, r] float32 in [-1, 1], r = min(R, side), on the same device.
    """
    img = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    factor = max(1, img.shape[2] // side)
    return avg_pool2d(img, factor)


def diversity(img: Tensor) -> Diversity:
    """Measure images of any size, [N, C, H, W] float32 with N at least 2; waits for the device.

    Means depend on N, nearest ones the more: compare batches of the same.
    """
    points = img.double().flatten(1)
    count, size = points.shape
    # The differences themselves: distances by way of inner products would have equal images apart by rounding.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") / size**0.5
    pairwise = distances.sum() / (count * (count - 1))
    itself = torch.eye(count, dtype=torch.bool, device=img.device)
    nearest = distances.masked_fill(itself, float("inf")).amin(dim=1).mean()
    return Diversity(float(pairwise), float(nearest))
