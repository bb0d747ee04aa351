"""Moving average of weights, with a half-life counted in images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from stylepipe.training.arena import Arena


def ema_decay(images_seen: int, batch_size: int, half_life_kimg: float, rampup: float) -> float:
    """Return the factor by which one step of `batch_size` images keeps the average.

    0.5^(batch / half-life), the half-life being at most `rampup` times the images seen so far
    (0: no ramp-up), so that the random first weights are soon forgotten.
    """
    half_life = half_life_kimg * 1000
    if rampup > 0:
        half_life = min(half_life, images_seen * rampup)
    return 0.5 ** (batch_size / max(half_life, 1e-8))


class EMA:
    """Keep `average`, a copy of a network, as the moving average of its parameters.

    Buffers are left alone: those that change with training are the recipe's to share or to follow.
    """

    def __init__(self, average: nn.Module, source: Arena) -> None:
        self.arena = Arena(average, with_grad=False)
        self.source = source
        self._weight = torch.zeros((), device=source.params.device)

    @torch.no_grad()
    def update(self, decay: float, windows: Sequence[slice]) -> None:
        """Move these parts towards the source by 1 - decay."""
        self._weight.fill_(1 - decay)  # a device scalar: a captured step can go on reading it
        for window in windows:
            self.arena.params[window].lerp_(self.source.params[window], self._weight)
