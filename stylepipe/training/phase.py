"""What the engine runs, and what a recipe must offer it.

A recipe names its networks and phases; the engine knows neither generator nor discriminator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stylepipe.training.growth import Schedule, Stage


@dataclass(frozen=True)
class MicroBatch:
    """The images that one device works on at a time.

    Attributes:
        positions: where each image stands in the endless order of the training.
        stage: the setting of this step.
        img: [N, 3, H, W] float32 in [-1, 1], channels_last, or None if the phase uses no real images.
        c: [N, c_dim] float32 labels of `img`; c_dim may be 0.
    """

    positions: list[int]
    stage: Stage
    img: Tensor | None
    c: Tensor


class Record:
    """Take what phases report, on the device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.histograms: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._averages: dict[str, Tensor] = {}

    def stat(self, name: str, values: Tensor) -> None:
        """Add `values` of any shape to the mean that the next tick reports under `name`; inf and NaN are left out."""
        values = values.detach().double()
        if name not in self._sums:
            self._sums[name] = torch.zeros(2, device=self.device, dtype=torch.float64)
        finite = values.isfinite()
        self._sums[name] += torch.stack([torch.where(finite, values, 0.0).sum(), finite.sum().double()])

    def latest(self, name: str, value: Tensor) -> None:
        """Have the next tick report `value` [] under `name`: not a mean over steps, but the newest one."""
        self._sums[name] = torch.stack([value.detach().double(), torch.ones((), device=self.device).double()])

    def histogram(self, name: str, values: Tensor) -> None:
        """Keep the latest `values` for the next tick."""
        self.histograms[name] = values.detach().flatten()

    def average(self, name: str, value: Tensor) -> None:
        """Offer a tensor whose mean over micro-batches and processes `Phase.after` will be given."""
        value = value.detach()
        self._averages[name] = self._averages[name] + value if name in self._averages else value

    def take_averages(self, rounds: int) -> dict[str, Tensor]:
        """Return the means over `rounds` micro-batches, and start anew."""
        averages = {name: total / rounds for name, total in self._averages.items()}
        self._averages = {}
        return averages

    def take_sums(self) -> dict[str, Tensor]:
        """Return [2] float64 (sum, count) for each statistic, and start anew."""
        sums, self._sums = self._sums, {}
        return sums


def _nothing(averages: Mapping[str, Tensor], stage: Stage) -> None:
    del averages, stage


@dataclass(frozen=True)
class Phase:
    """One kind of update of one network.

    A lazy regularizer (Karras et al. 2020, arXiv:1912.04958, appendix B) runs at every k-th update of its network with
    weight k. The engine corrects the optimizer for the extra updates.

    Attributes:
        name: as it stands in statistics, `G/main`.
        trains: name of the network that it updates.
        interval: steps from one run to the next.
        loss: yields the terms of the loss on one micro-batch, each a scalar. The engine back-propagates a term
            before it asks for the next, so that only one graph is alive.
        uses_reals: whether `MicroBatch.img` is filled.
        weight: factor of its loss.
        after: is given the averages that `loss` recorded and the step's stage, when the update is done.
    """

    name: str
    trains: str
    interval: int
    loss: Callable[[MicroBatch, Record], Iterator[Tensor]]
    uses_reals: bool = False
    weight: int = 1
    after: Callable[[Mapping[str, Tensor], Stage], None] = field(default=_nothing)


@dataclass(frozen=True)
class Annealed:
    """Settings of the engine that vary in time.

    Attributes:
        lr: factor of both learning rates.
        beta2: Adam's; None for the one it began with.
        ema_kimg: half-life of the averages.
    """

    lr: float
    beta2: float | None
    ema_kimg: float


class Generated(Protocol):
    """Images that a network makes, by number.

    Attributes:
        resolution: of the images, in pixels.
        seed: of what they are made of.
        batch: how many are made at a time.
    """

    resolution: int
    seed: int
    batch: int

    def facts(self, paths: bool = False) -> Mapping[str, Any]:
        """Return what moves them, or `paths`, besides network and seed."""
        ...

    def images(self, numbers: Sequence[int]) -> Tensor:
        """Return the images of these numbers, [n, R, R, 3] uint8 on the device."""
        ...

    def paths(self, numbers: Sequence[int], epsilon: float) -> Tensor:
        """Return both ends of short ways through latent space, [n, 2, 3, R, R] float32 in [0, 255]."""
        ...

    def walks(self, count: int, frames: int, stops: int) -> Iterator[Tensor]:
        """Yield the frames of `count` closed walks past so many latents, [count, R, R, 3] uint8 on the device."""
        ...


class Recipe(Protocol):
    """Networks, phases, what to sample and what to export.

    Attributes:
        networks: each trained network by name.
        averaged: for some of them, a copy that follows as moving average.
        phases: in the order of a step.
        learning_rates: of each network, before the correction for lazy phases and the stage's factor.
        schedule: the stage at every point of the image counter.
        headline: names of the statistics to show while training, by a short label.
        state: further tensors that resuming needs, by name; changed in place.
        optional: those of the engine's state that an option brings, which a state saved without it lacks.
    """

    networks: Mapping[str, nn.Module]
    averaged: Mapping[str, nn.Module]
    phases: Sequence[Phase]
    learning_rates: Mapping[str, float]
    schedule: Schedule
    headline: Mapping[str, str]
    state: Mapping[str, Tensor]
    optional: Collection[str]

    def begin(self, stage: Stage) -> None:
        """Set what varies in time, all of it scalars on the device, to what the stage says."""
        ...

    def used_at(self, stage: Stage) -> Mapping[str, Sequence[nn.Module]]:
        """Return the parts of each network that the stage uses, by the network's name: all others get no gradients."""
        ...

    def anneal(self, stage: Stage) -> Annealed:
        """Return what else of the engine's settings varies in time."""
        ...

    def regularize(self, factor: float) -> str:
        """Multiply the settings' weights of the penalties that keep training stable; say what they are now."""
        ...

    def sample(self, columns: int, rows: int, stage: Stage) -> Tensor:
        """Return images for a grid at fixed latents, row by row, [N, H, W, 3] uint8 on the host."""
        ...

    def watched(self, count: int, stage: Stage) -> Iterator[Tensor]:
        """Yield images of the newest weights, not averaged, at fixed latents, some at a time.

        Each is [n, R, R, 3] uint8 on the device, R the stage's resolution.
        """
        ...

    def generated(self, stage: Stage) -> Generated:
        """Return the images to measure the training by, of the averaged weights."""
        ...

    def classes_of_rows(self, rows: int) -> list[int]:
        """Return the class that each row of the grid shows; empty where rows belong to no class."""
        ...

    def export(self, stage: Stage) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        """Return the network that users of the model want, and those to go on training from, as grown so far."""
        ...
