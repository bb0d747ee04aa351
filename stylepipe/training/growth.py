"""What the training looks like at a point of the image counter.

`images_seen` is the only clock. A schedule is a pure function of it; resuming needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
        batch_gpu: images that one device works on at a time.
        fading: the newest level is being faded in, so that the one below makes and sees images too.
        first_step: the step with which this resolution began.
    """

    resolution: int
    alpha: float
    batch_size: int
    lr_multiplier: float
    step: int
    images_seen: int
    batch_gpu: int
    fading: bool = False
    first_step: int = 0


class Schedule(Protocol):
    """Says what the training looks like at every point of the image counter."""

    def at(self, images_seen: int) -> Stage:
        """Return the stage of the step that begins after `images_seen` images."""
        ...

    def final(self) -> Stage:
        """Return the last stage, which takes the most memory and time."""
        ...

    def stages(self) -> Sequence[Stage]:
        """Return each stage as it begins, in order: what changes within one are device scalars only."""
        ...


@dataclass(frozen=True)
class FixedResolution:
    """The schedule of networks that do not grow."""

    resolution: int
    batch_size: int
    batch_gpu: int

    def at(self, images_seen: int) -> Stage:
        step = images_seen // self.batch_size
        return Stage(self.resolution, 1.0, self.batch_size, 1.0, step, images_seen, self.batch_gpu)

    def final(self) -> Stage:
        return self.at(0)

    def stages(self) -> Sequence[Stage]:
        return [self.at(0)]


@dataclass(frozen=True)
class Level:
    """What a resolution has of its own in a growing training."""

    resolution: int
    batch_size: int
    batch_gpu: int
    lr_multiplier: float = 1.0


@dataclass(frozen=True)
class GrowthSchedule:
    """Progressive growing (Karras et al. 2018, arXiv:1710.10196, section 2 and appendix A).

    The first level is trained for `stable` images. Each further one is faded in over `fade` images, alpha rising
    linearly from 0, and then trained for `stable` images; the last one for ever.

    A step belongs to one level wholly, so a level takes whole batches and may begin a little later than the images
    say: less than a batch of the level before.

    Attributes:
        levels: from the lowest resolution to the highest, each twice the one before.
        stable, fade: in images.
    """

    levels: tuple[Level, ...]
    stable: int
    fade: int

    @cached_property
    def _starts(self) -> list[tuple[int, int]]:
        """(images, steps) taken before each level."""
        starts = [(0, 0)]
        for index, level in enumerate(self.levels[:-1]):
            images, steps = starts[-1]
            taken = -(-(self.stable + (self.fade if index else 0)) // level.batch_size)
            starts.append((images + taken * level.batch_size, steps + taken))
        return starts

    def at(self, images_seen: int) -> Stage:
        index = max(i for i, (images, _) in enumerate(self._starts) if images <= images_seen)
        level, (images, steps) = self.levels[index], self._starts[index]
        fading = index > 0 and images_seen - images < self.fade
        return Stage(
            level.resolution,
            (images_seen - images) / self.fade if fading else 1.0,
            level.batch_size,
            level.lr_multiplier,
            steps + (images_seen - images) // level.batch_size,
            images_seen,
            level.batch_gpu,
            fading,
            steps,
        )

    def final(self) -> Stage:
        return self.stages()[-1]

    def stages(self) -> Sequence[Stage]:
        found = []
        for index, ((images, _), level) in enumerate(zip(self._starts, self.levels, strict=True)):
            found.append(self.at(images))
            if index and self.fade:
                found.append(self.at(images + -(-self.fade // level.batch_size) * level.batch_size))
        # A level whose images are fewer than a batch has no stable stage of its own.
        return [stage for stage, after in zip(found, [*found[1:], None], strict=True) if after is None or
                (stage.resolution, stage.fading) != (after.resolution, after.fading)]  # fmt: skip


def end_of(schedule: Schedule, start: int, wanted: int) -> int:
    """Return where whole steps from `start` on first reach `wanted` images."""
    images = start
    while images < wanted:
        stage = schedule.at(images)
        # All steps up to the next stage are alike: take them at once.
        following = [s.images_seen for s in schedule.stages() if s.images_seen > images]
        until = min([wanted, *following])
        images += -(-(until - images) // stage.batch_size) * stage.batch_size
    return images
