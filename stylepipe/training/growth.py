"""What the training looks like at a point of the image counter.

`images_seen` is the only clock. A schedule is a pure function of it; resuming needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Stage:
    """One step's setting.

    Attributes:
        resolution: pixels per side that the networks work at.
        alpha: how far the newest level is faded in, from 0 to 1.
        batch_size: images of the step on all devices together.
        lr_multiplier: factor of both learning rates.
        step: steps taken before this one.
        images_seen: the clock that all of it follows.
    """

    resolution: int
    alpha: float
    batch_size: int
    lr_multiplier: float
    step: int
    images_seen: int


class Schedule(Protocol):
    """Says what the training looks like at every point of the image counter."""

    def at(self, images_seen: int) -> Stage:
        """Return the stage of the step that begins after `images_seen` images."""
        ...


@dataclass(frozen=True)
class FixedResolution:
    """The schedule of networks that do not grow."""

    resolution: int
    batch_size: int

    def at(self, images_seen: int) -> Stage:
        return Stage(self.resolution, 1.0, self.batch_size, 1.0, images_seen // self.batch_size, images_seen)
