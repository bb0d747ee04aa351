"""Features of a convolutional network with random weights: for distances on machines that have no trained network.

Naeem et al. 2020, arXiv:2002.09797, section 4.3, found such features of use beside trained ones, and free of what a
trained one has seen. Distances on them bear the name of the network: they are none of the published metrics.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, relu

from stylepipe.metrics.extraction import Counts, counts_of_features

SIDE = 64  # pixels: what images are brought to
CHANNELS = (3, 64, 128, 256, 512)
FEATURES = 64
SEED = 0


class RandomNetwork:
    """Four times a 3 x 3 convolution, ReLU and averages of 2 x 2, then 64 random projections of all that is left.

    Weights are normal with variance 2 / fan-in (He et al. 2015, arXiv:1502.01852), from NumPy's Philox: the same on
    every machine. Larger images are averaged to 64 px, smaller ones enlarged.
    """

    name = "random"
    lowest = 4
    seeded = False
    paths = False

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its features depend on."""
        resize = f"to {SIDE} px by averages, or bilinear where smaller"
        return {"network": "random convolutions", "sha256": self._digest, "resize": resize}

    def counts(self, available: int, asked: int | None) -> Counts:
        """See `Extraction.counts`."""
        return counts_of_features(available, asked)

    def extractor(self, resolution: int, seed: int, real: bool, device: torch.device) -> RandomFeatures:
        """See `Extraction.extractor`."""
        del resolution, seed, real
        return RandomFeatures([torch.from_numpy(w).to(device) for w in self._weights])

    @cached_property
    def _weights(self) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
        generator = np.random.Generator(np.random.Philox(key=[SEED, 0]))
        left = SIDE >> (len(CHANNELS) - 1)
        shapes = [(out, into, 3, 3) for into, out in pairwise(CHANNELS)]
        shapes.append((FEATURES, CHANNELS[-1], left, left))
        normal = [generator.standard_normal(shape, np.float32) for shape in shapes]
        return [w * np.float32(math.sqrt(2 / w[0].size)) for w in normal]

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(b"".join(w.tobytes() for w in self._weights)).hexdigest()


class RandomFeatures:
    """What the network makes of images.

    Args:
        weights: of the convolutions, and of the projections.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        *self._convolutions, self._projections = weights

    @torch.no_grad()
    def __call__(self, images: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return features [N, 64] float32 of [N, R, R, 3] uint8."""
        del numbers
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = interpolate(x, SIDE, mode="area") if x.shape[2] >= SIDE else interpolate(x, SIDE, mode="bilinear")
        for weight in self._convolutions:
            x = avg_pool2d(relu(conv2d(x, weight, padding=1)), 2)
        return {"features": conv2d(x, self._projections).flatten(1)}
