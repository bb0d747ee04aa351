"""Sliced Wasserstein distance between the patches of two sets of images, level by level of a Laplacian pyramid.

Karras et al. 2018, arXiv:1710.10196, section 5. It needs no trained network. Each level tells how well structures of
its scale are met: the lowest (16 px) the layout, the highest the finest detail. Numbers are times 1000, as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from stylepipe.metrics.extraction import ALONE, Counts, Rows, Team

IMAGES = 16_384  # of each kind, or as many as there are real ones
LOWEST_LEVEL = 16  # pixels
PATCH = 7  # pixels a side: 7 x 7 x 3 = 147 numbers each
PATCHES = 128  # of each image at each level
LOWEST_RESOLUTION = 8  # pixels: in smaller images no patch fits
DIRECTIONS = 512
SCALE = 1000.0

_SORTED_AT_A_TIME = 1 << 25  # numbers: 128 MiB


def levels_of(resolution: int) -> list[int]:
    """Return the resolutions of the pyramid's levels, from the highest on."""
    lowest = min(resolution, LOWEST_LEVEL)
    return [resolution >> k for k in range(resolution.bit_length() - lowest.bit_length() + 1)]


def laplacian_pyramid(img: Tensor) -> list[Tensor]:
    """Split images into what each resolution adds, from the highest on; the last level is what remains.

    L_l = G_l - up(G_(l+1)) with G_0 the images and G_(l+1) = down(G_l); adding the levels up again gives the images.

    Args:
        img: [N, 3, R, R] float32, R a power of two.
    """
    pyramid = [img]
    for _ in levels_of(img.shape[2])[1:]:
        smaller = _down(pyramid[-1])
        pyramid[-1] = pyramid[-1] - _up(smaller)
        pyramid.append(smaller)
    return pyramid


class PatchExtraction:
    """Patches of each level of a set of images, as an `Extraction`."""

    name = "patches"
    lowest = LOWEST_RESOLUTION
    seeded = True
    paths = False
    facts: Mapping[str, Any] = {"patches": f"{PATCHES} of {PATCH} x {PATCH} px, normalized by the set's own colours"}

    def counts(self, available: int, asked: int | None) -> Counts:
        """Return as many real images as generated ones, as the distance needs."""
        count = min(available, IMAGES if asked is None else asked)
        return Counts(count, count)

    def extractor(self, resolution: int, seed: int, real: bool, device: torch.device) -> Patches:
        """See `Extraction.extractor`."""
        del device
        return Patches(resolution, seed, real)


class Patches:
    """Takes patches from images at places drawn for each of them.

    Args:
        resolution: of the images.
        seed: of the places.
        real: real and generated images of the same number get places of their own.
    """

    def __init__(self, resolution: int, seed: int, real: bool) -> None:
        self.levels = levels_of(resolution)
        self._seed, self._real = seed, real

    def __call__(self, images: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return patches by the name of their level, [N, 128 * 147] float32 in units of 1/255.

        Args:
            images: [N, R, R, 3] uint8.
            numbers: of the images in their set: places depend on them, not on what comes together.
        """
        img = images.permute(0, 3, 1, 2).float()
        found = {}
        for level, part in zip(self.levels, laplacian_pyramid(img), strict=True):
            windows = part.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # [N, 3, y, x, 7, 7], without copying
            places = torch.from_numpy(np.stack([self._places(level, n) for n in numbers])).to(img.device)
            rows = torch.arange(len(images), device=img.device)[:, None]
            found[str(level)] = windows[rows, :, places[..., 0], places[..., 1]].flatten(1)
        return found

    def _places(self, level: int, number: int) -> NDArray[np.int64]:
        key = np.array([self._seed, 2 * level + self._real], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, number, 0]))
        return generator.integers(0, level - PATCH + 1, (PATCHES, 2))


def directions(seed: int, size: int = 3 * PATCH**2, count: int = DIRECTIONS) -> Tensor:
    """Draw directions to project on, uniformly: [count, size] float32 of length 1."""
    normal = np.random.Generator(np.random.Philox(key=[seed, 0])).standard_normal((count, size))
    return torch.from_numpy((normal / np.linalg.norm(normal, axis=1, keepdims=True)).astype(np.float32))


def sliced_wasserstein(real: Tensor, fake: Tensor, on: Tensor) -> Tensor:
    """Return the 1-D Wasserstein distance along each direction: mean_i |sort(a . x)_i - sort(a . y)_i|.

    Args:
        real, fake: [n, d] float32, as many of both.
        on: [k, d] float32, the directions a.

    Returns:
        [k] float64 on the host.
    """
    assert real.shape == fake.shape
    block = max(1, _SORTED_AT_A_TIME // len(real))
    distances = [(_sorted(part @ real.T) - _sorted(part @ fake.T)).abs_().mean(dim=1) for part in on.split(block)]
    return torch.cat([part.cpu().double() for part in distances])


def patch_distances(real: Rows, fake: Rows, seed: int, team: Team = ALONE) -> dict[str, float]:
    """Return the mean of all levels' distances, and each level's, times 1000.

    Colours of each set are normalized to mean 0 and deviation 1, each by its own, as the published numbers are: a level
    does not see that all images are brighter.

    Args:
        real, fake: [N, 128 * 147] float32 for each level, by its name, as many of both.
        seed: of the directions.
        team: processes that share the directions.
    """
    on = directions(seed)
    of_levels = {}
    for level in fake:
        theirs, ours = (_normalized(rows[level].view(-1, 3 * PATCH**2)) for rows in (real, fake))
        own = sliced_wasserstein(theirs, ours, on[team.rank :: team.size].to(ours.device)).sum()
        of_levels[f"swd_{level}"] = float(team.sum(own.to(ours.device))) / len(on) * SCALE
    return {"swd": sum(of_levels.values()) / len(of_levels), **of_levels}


def _normalized(patches: Tensor) -> Tensor:
    channels = patches.view(len(patches), 3, -1)
    mean = channels.mean(dim=(0, 2), dtype=torch.float64)
    square = torch.stack([channels[:, c].double().sub_(mean[c]).square_().mean() for c in range(3)])
    deviation = square.sqrt().clamp_(min=1e-8)  # one colour everywhere
    return ((channels - mean.float()[:, None]) / deviation.float()[:, None]).view(patches.shape)


def _sorted(rows: Tensor) -> Tensor:
    """Sort each row. On a CPU with NumPy, whose vectorized sort takes a fifteenth of torch's time."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))
    return rows.sort(dim=1).values


def _down(img: Tensor) -> Tensor:
    """Halve the resolution: binomial filter, every second pixel."""
    return _filtered(img, stride=2)


def _up(img: Tensor) -> Tensor:
    """Double the resolution: zeros between the pixels, binomial filter times 4."""
    n, c, h, w = img.shape
    spread = img.new_zeros(n, c, 2 * h, 2 * w)
    spread[:, :, ::2, ::2] = img
    return _filtered(spread, stride=1).mul_(4)


def _filtered(img: Tensor, stride: int) -> Tensor:
    """Apply the binomial filter, mirrored at the borders, and take every `stride`-th pixel.

    Sums of slices: convolutions of single channels take twenty times as long on a CPU.
    """
    img = pad(img, (2, 2, 2, 2), mode="reflect")
    for dim in (3, 2):
        taps = [img.narrow(dim, k, img.shape[dim] - 4) for k in range(5)]
        a, b, c, d, e = (tap[..., ::stride] if dim == 3 else tap[..., ::stride, :] for tap in taps)
        img = (a + e).add_(b + d, alpha=4).add_(c, alpha=6).mul_(1 / 16)
    return img
