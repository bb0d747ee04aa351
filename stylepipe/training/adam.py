"""Adam on the parts of an arena that are in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stylepipe.training.arena import Arena


class Adam:
    """Adam with its moments in buffers like the arena's, so that a part of it can be stepped alone.

    Kingma & Ba 2015, arXiv:1412.6980. What is inf or NaN is never applied: the device decides, without the host.

    Args:
        arena: with gradients.
        learning_rate: to which a step's multiplier applies.
        betas: decay of mean and of mean square.
        correction: exponent of both betas, for updates that come oftener than steps.
        eps: added to the root of the latter.

    Attributes:
        learning_rate, betas: as given.
        state: tensors that resuming needs, by name; after they are changed from outside, call `use` again.
    """

    def __init__(
        self, arena: Arena, learning_rate: float, betas: tuple[float, float], eps: float, correction: float = 1.0
    ) -> None:
        self._arena, self.learning_rate, self._eps, self._correction = arena, learning_rate, eps, correction
        self.betas = (betas[0] ** correction, betas[1] ** correction)
        device = arena.params.device
        self._lr = torch.tensor(learning_rate, device=device)
        self.state = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(arena.params.detach()),
            "exp_avg_sq": torch.zeros_like(arena.params.detach()),
        }
        self.use(arena.windows(arena.trained))

    def use(self, windows: Sequence[slice]) -> None:
        """Step these parts of the arena from now on; all of them have taken the same number of steps."""
        grad = self._arena.grad
        assert grad is not None
        parts = [nn.Parameter(self._arena.params.detach()[window]) for window in windows]
        for part, window in zip(parts, windows, strict=True):
            part.grad = grad[window]
        self._adam = torch.optim.Adam(parts, lr=self.learning_rate, betas=self.betas, eps=self._eps, fused=True)
        self._adam.param_groups[0]["lr"] = self._lr  # set afterwards: the constructor would read it from the device
        for index, (part, window) in enumerate(zip(parts, windows, strict=True)):
            self._adam.state[part] = {
                "step": self.state["step"].clone() if index else self.state["step"],
                "exp_avg": self.state["exp_avg"][window],
                "exp_avg_sq": self.state["exp_avg_sq"][window],
            }

    def step(self, lr_multiplier: float, found_inf: Tensor, beta2: float | None = None) -> None:
        """Update; not at all where `found_inf` [] float32 is 1. `beta2` replaces that of the beginning."""
        if beta2 is not None:
            self._adam.param_groups[0]["betas"] = (self.betas[0], beta2**self._correction)
        self._lr.fill_(self.learning_rate * lr_multiplier)
        self._adam.found_inf = found_inf  # type: ignore[attr-defined]
        self._adam.step()

    def reset(self) -> None:
        """Forget all steps taken."""
        for state in self._adam.state.values():
            state["step"].zero_()
        self.state["exp_avg"].zero_()
        self.state["exp_avg_sq"].zero_()
