"""Perceptual path length: how far images move when their latents do a little.

Karras et al. 2019, arXiv:1812.04948, section 4.1, and 2020, arXiv:1912.04958. The variant is that of StyleGAN2's
published numbers: between points of w, at the latents themselves ("end"), on whole images. A generator without w is
measured in z, along the sphere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from stylepipe.metrics.extraction import FEATURES_OF, Counts
from stylepipe.metrics.published_networks import LPIPSDistance

EPSILON = 1e-4  # share of the way to another latent
SIDE = 256  # pixels: larger images are averaged to it, as published
_LEFT_OUT = 0.01  # of the lengths at either end


class PathLengths:
    """Squared perceptual distances of pairs of images, over epsilon squared, as an `Extraction`."""

    name = "paths"
    lowest = 4
    seeded = False
    paths = True

    def __init__(self, cache: Path) -> None:
        self._distance = LPIPSDistance(cache)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its lengths depend on."""
        variant = f"end points, epsilon {EPSILON:g}, not cropped, averaged to {SIDE} px"
        return {**self._distance.facts, "variant": variant}

    def counts(self, available: int, asked: int | None) -> Counts:
        """Return how many ways are measured; no real images are looked at."""
        del available
        return Counts(0, FEATURES_OF if asked is None else asked)

    def extractor(self, resolution: int, seed: int, real: bool, device: torch.device) -> _OfPaths:
        """See `Extraction.extractor`."""
        del resolution, seed, real
        return _OfPaths(self._distance.on(device))


class _OfPaths:
    def __init__(self, distance: nn.Module) -> None:
        self._distance = distance

    @torch.no_grad()
    def __call__(self, images: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return lengths [n, 1] of [n, 2, 3, R, R] float32 in [0, 255], the images at both ends of each path."""
        del numbers
        img = images.flatten(0, 1)
        if img.shape[2] > SIDE:
            img = avg_pool2d(img, img.shape[2] // SIDE)
        start, end = img.unflatten(0, (-1, 2)).unbind(1)
        return {"lengths": self._distance(start, end).view(-1, 1) / EPSILON**2}


def mean_path_length(lengths: Tensor) -> float:
    """Return the mean of lengths [n] without the smallest and the largest hundredth."""
    lengths = lengths.double()
    low = torch.quantile(lengths, _LEFT_OUT, interpolation="lower")
    high = torch.quantile(lengths, 1 - _LEFT_OUT, interpolation="higher")
    return float(lengths[(lengths >= low) & (lengths <= high)].mean())
