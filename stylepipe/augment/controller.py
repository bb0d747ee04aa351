"""How likely augmentations are: a constant, a schedule, or what the discriminator's overfitting asks for.

Karras et al. 2020, arXiv:2006.06676, section 3. The probability p is a device scalar that is changed in place: a step
neither waits for it nor branches on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class AdaptiveProbability:
    """Raise p while the discriminator is too sure of real images, lower it while it is not.

    r_t = E[sign(D(real))] (Eq. 1) is averaged over `interval` steps; then p moves by the share of a unit that these
    steps' images are of `images_per_unit`, up if r_t is above the target and down if below, and is kept in [0, 1].

    Args:
        start: p at first.
        target: of r_t; 0.6 in the paper.
        interval: steps between two adjustments.
        images_per_unit: images in which p moves by 1 at the most.
        device: where p lives.

    Attributes:
        p: [] float32.
        state: tensors that resuming needs, changed in place.
    """

    def __init__(
        self, start: float, target: float, interval: int, images_per_unit: float, device: torch.device
    ) -> None:
        self.target, self.interval, self.images_per_unit = target, interval, images_per_unit
        self.p = torch.full((), start, device=device)
        self._signs = torch.zeros((), device=device)
        self._steps = torch.zeros((), device=device)
        self.state: Mapping[str, Tensor] = {"p": self.p, "sign_sum": self._signs, "sign_steps": self._steps}

    @torch.no_grad()
    def follow(self, real_sign: Tensor, batch_size: int) -> None:
        """Take in a step: the mean sign [] of D's logits of its real images on all processes, and their number."""
        self._signs.add_(real_sign.nan_to_num(0))
        self._steps.add_(real_sign.isfinite())  # a step that failed tells nothing
        due = self._steps >= self.interval
        direction = (self._signs - self.target * self._steps).sign()
        self.p.add_(due * direction * (batch_size * self.interval / self.images_per_unit)).clamp_(0, 1)
        self._signs.mul_(~due)
        self._steps.mul_(~due)


def cosine_rise(images_seen: int, images: float, end: float) -> float:
    """Return what rises from 0 to `end` over `images` along half a cosine (Huang et al. 2024, arXiv:2501.05441)."""
    return end * (1 - math.cos(math.pi * min(images_seen / images, 1))) / 2
