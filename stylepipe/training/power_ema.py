"""Averages of weights whose length is chosen after the training (post-hoc EMA).

Karras et al. 2024, arXiv:2312.02696, section 3 and appendix C. Two averages are kept while a network trains, and both
are saved at intervals. An average is the integral of the weights over time, times a profile; one of another length has
a profile that is, very nearly, a sum of profiles of those saved, and the weights are the same sum of saved weights.

Times are counted in images since the averages began.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stylepipe.run_files import EMA_FOLDER, images_seen_of, kimg_name
from stylepipe.training.arena import Arena
from stylepipe.training.ema import EMA

SIGMA_RELS = (0.05, 0.10)
"""Lengths of the averages that are kept, as in section 3.2."""

MIN_SIGMA_REL, MAX_SIGMA_REL = 0.01, 0.28
"""Lengths that can be asked for: from gamma = 97 to gamma = 0.17. The plain mean, gamma = 0, has 12^(-1/2) = 0.289."""

_STORED = re.compile(r"\d{6,}\.\d{3}\.safetensors")


def sigma_rel_of(gamma: float) -> float:
    """Return the profile's standard deviation relative to its end, the length of an average (section 3.1).

    (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2)
    """
    return float((gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of a length up to 0.289: the largest root of `sigma_rel_of` squared and multiplied out.

    gamma^3 + 7 gamma^2 + (16 - sigma_rel^-2) gamma + 12 - sigma_rel^-2 = 0
    """
    rest = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - rest, 12.0 - rest]).real.max())


def power_decay(t: int, batch_size: int, gamma: float) -> float:
    """Return the factor by which a step of `batch_size` images that ends at time t keeps the average.

    (1 - batch / t)^(gamma + 1): section 3.1, with images for steps. The weights after a step then count as much as the
    profile has between its images, exactly, whatever the batches. The first step, t = batch, takes the weights whole.
    """
    return float((1 - batch_size / t) ** (gamma + 1))


def inner_product(
    t_a: NDArray[np.float64] | float,
    gamma_a: NDArray[np.float64] | float,
    t_b: NDArray[np.float64] | float,
    gamma_b: NDArray[np.float64] | float,
) -> NDArray[np.float64]:
    """Return the integral over time of the product of two profiles, element by element (appendix C).

    The profile that ends at T is p(t) = (gamma + 1) t^gamma / T^(gamma + 1) from 0 to T, and 0 after. So with t the
    earlier end, and T and gamma' of the later one

    (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t / T)^gamma' / T
    """
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    exponent = np.where(np.greater(t_a, t_b), gamma_a, gamma_b)
    factor = np.add(gamma_a, 1.0) * np.add(gamma_b, 1.0) / (np.add(gamma_a, gamma_b) + 1.0)
    return np.asarray(factor * (first / last) ** exponent / last, dtype=np.float64)


def profile_weights(
    times: Sequence[int], sigma_rels: Sequence[float], t: int, sigma_rel: float
) -> tuple[NDArray[np.float64], float]:
    """Return by how much each stored average counts in that of length `sigma_rel` at time t.

    Least squares between the profiles (section 3.2, appendix C): with the inner products A of the stored ones with
    each other and b with the wanted one, A x = b. Unlike the paper's, our weights add up to 1: free ones shrink what
    training leaves alone, by 2 % for a length of 0.2 from 8 files. Parameters are much larger than
    what averages of them differ by, so with this the error is smaller, of long averages by half or more.

    Args:
        times, sigma_rels: [N] of the stored averages, each pair once, times up to t.

    Returns:
        weights [N] float64, and the relative error ||sum x_i p_i - p|| / ||p|| of the profile.
    """
    gammas = np.array([gamma_of(sigma) for sigma in sigma_rels])
    ends, gamma = np.array(times, dtype=np.float64) / t, gamma_of(sigma_rel)
    products = inner_product(ends[:, None], gammas[:, None], ends[None], gammas[None])
    lengths, length = np.sqrt(products.diagonal()), np.sqrt(inner_product(1.0, gamma, 1.0, gamma))
    A = products / (lengths[:, None] * lengths)  # of profiles of unit length: better conditioned
    b = inner_product(ends, gammas, 1.0, gamma) / (lengths * length)
    count, ones = len(ends), length / lengths
    bordered = np.block([[A, ones[:, None]], [ones[None], np.zeros((1, 1))]])
    x = np.linalg.solve(bordered, np.append(b, 1.0))[:count]
    error = np.sqrt(max(0.0, float(x @ A @ x - 2 * x @ b + 1)))
    return x * ones, float(error)


class PowerEMA:
    """Keeps one average of a network with a power function as profile.

    Args:
        averaged: a copy of the network, such as the recipe's moving average. It is copied again; its buffers are shared
            with the copy, so that they are those of the moment.
        source: the network's weights.
        sigma_rel: length of the average.

    Attributes:
        average: the averaged network.
        start: images seen when the average began.
    """

    def __init__(self, averaged: nn.Module, source: Arena, sigma_rel: float) -> None:
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)
        self.average = copy.deepcopy(averaged)
        for name, module in self.average.named_modules():
            for buffer, tensor in averaged.get_submodule(name).named_buffers(recurse=False):
                setattr(module, buffer, tensor)
        self._ema = EMA(self.average, source)
        self.params = self._ema.arena.params.detach()
        self.begin(0)

    @property
    def name(self) -> str:
        """The length as it stands in the names of states and files."""
        return f"{self.sigma_rel:.3f}"

    @torch.no_grad()
    def begin(self, images_seen: int) -> None:
        """Start anew from the weights of now: what was before does not count."""
        self.start = images_seen
        self.params.copy_(self._ema.source.params)  # what no stage has used yet stays as it is

    def update(self, images_seen: int, batch_size: int, windows: Sequence[slice]) -> None:
        """Follow a step of `batch_size` images, after which `images_seen` have been seen, in these parts."""
        self._ema.update(power_decay(images_seen - self.start, batch_size, self.gamma), windows)


def averages_file(out: Path, images_seen: int) -> Path:
    """Return where a run keeps its power-function averages of a moment."""
    return out / EMA_FOLDER / f"{kimg_name(images_seen)}.safetensors"


def averages_files(out: Path) -> list[Path]:
    """Return the files of a run's power-function averages by the images they have seen, ascending."""
    found = [path for path in (out / EMA_FOLDER).glob("*.safetensors") if _STORED.fullmatch(path.name)]
    return sorted(found, key=images_seen_of)


def remove_later_averages(out: Path, images_seen: int) -> None:
    """Delete averages that an interrupted run stored later than this: the one that goes on stores its own.

    So are remains of files that were being written when their process was killed.
    """
    later = [path for path in averages_files(out) if images_seen_of(path) > images_seen]
    for path in [*later, *(out / EMA_FOLDER).glob(".*.tmp")]:
        path.unlink()
