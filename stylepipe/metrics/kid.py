"""The kernel distance of features, which is KID for features of Inception."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stylepipe.metrics.checks import checked_pair
from stylepipe.metrics.shuffle import permutation


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets; below 0 by chance where the distributions are alike."""

    mean: float
    std: float


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Return the squared maximum mean discrepancy (Binkowski et al. 2018, arXiv:1801.01401).

    Its expectation does not depend on how many samples there are, unlike that of the Fréchet distance.

    Args:
        real: [N, dim] of any float type.
        fake: [M, dim] of any float type; calculated on its device, in float64.
        subsets: how many random subsets of either are compared.
        subset_size: samples of each, without repetition; at most min(N, M) are taken.
        seed: of the subsets, which are the same on every device.

    Raises:
        UserError: fewer than two samples, features that are not finite, or of different dimensions.
    """
    assert subsets > 0, subsets
    assert subset_size > 1, subset_size
    real, fake = checked_pair(real, fake, at_least=(2, 2), reason="pairs of different ones")
    size = min(subset_size, len(real), len(fake))
    distances = torch.stack(
        [
            squared_discrepancy(
                _subset(real, size, seed, number=2 * subset), _subset(fake, size, seed, number=2 * subset + 1)
            )
            for subset in range(subsets)
        ]
    )
    return KernelDistance(float(distances.mean()), float(distances.std(correction=0)))


def squared_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate of MMD^2 with the kernel (<x, y> / dim + 1)^3; [] float64.

    The mean over pairs of different samples of x, and of y, less twice that over pairs of both (Gretton et al. 2012,
    Lemma 6).

    Args:
        x: [n, dim] float64.
        y: [m, dim] float64.
    """
    return _mean_of_others(_kernel(x, x)) + _mean_of_others(_kernel(y, y)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_others(kernel: Tensor) -> Tensor:
    """Return the mean off the diagonal."""
    count = len(kernel)
    return (kernel.sum() - kernel.trace()) / (count * (count - 1))


def _subset(features: Tensor, size: int, seed: int, number: int) -> Tensor:
    return features[permutation(len(features), seed, number)[:size].to(features.device)].double()
