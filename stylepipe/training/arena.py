"""One contiguous buffer for all parameters of a network, and one for their gradients.

Averaging over processes, optimizer, moving average, finite check and checkpoint each touch one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_ALIGNMENT = 16  # float32 numbers: 64 bytes, a cache line and more than any vector load needs


class Arena:
    """Move the parameters of `module` into one buffer; each stays a view of it, and so does its `.grad`.

    Parameters that require no gradient now are frozen: gradients never reach them and stay 0, with which Adam leaves
    them as they are, to the bit.

    Attributes:
        trained: the parameters that are not frozen.
        frozen: where in `params` the others lie.
        params: [total] float32, a leaf that an optimizer can be given. Gaps between parameters are 0.
        grad: [total] float32 = `params.grad`, or None without `with_grad`.
        layout: shape of each parameter by name, in order.
    """

    def __init__(self, module: nn.Module, with_grad: bool = True) -> None:
        self.module = module
        self.trained = trained_parameters(module)
        named = dict(module.named_parameters())
        self.layout = {name: list(p.shape) for name, p in named.items()}
        offsets, total = {}, 0
        for name, p in named.items():
            assert p.dtype == torch.float32, f"{name} is {p.dtype}; master weights are float32"
            offsets[name] = total
            total += -(-p.numel() // _ALIGNMENT) * _ALIGNMENT
        device = next(iter(named.values())).device
        buffer = torch.zeros(total, device=device)
        windows = {name: slice(offsets[name], offsets[name] + p.numel()) for name, p in named.items()}
        self.frozen = [windows[name] for name, p in named.items() if not p.requires_grad]
        self._windows = {id(p): windows[name] for name, p in named.items()}
        self.grad: Tensor | None = torch.zeros(total, device=device) if with_grad else None
        for name, p in named.items():
            view = buffer[windows[name]].view(p.shape)
            view.copy_(p.detach())
            p.data = view
            if self.grad is not None:
                p.grad = self.grad[windows[name]].view(p.shape)
        self.params = nn.Parameter(buffer, requires_grad=with_grad)
        self.params.grad = self.grad

    def windows(self, parameters: Iterable[nn.Parameter]) -> list[slice]:
        """Return the fewest parts of `params` in which the given parameters lie, and no others but frozen ones.

        Those frozen have gradients of 0 and lose nothing by being stepped.
        """
        wanted = {id(p) for p in parameters}
        trained = {id(p) for p in self.trained}
        found: list[slice] = []
        joined = False  # everything since the last part that is wanted may be stepped with it
        for key, window in self._windows.items():
            if key in wanted:
                found.append(slice(found.pop().start if joined else window.start, window.stop))
                joined = True
            elif key in trained:
                joined = False
        return found


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of `module` that require gradients; the others are frozen."""
    return [p for p in module.parameters() if p.requires_grad]


def mark_trained(parameters: Iterable[nn.Parameter], trained: bool) -> None:
    """Let gradients flow to the parameters, or not."""
    for p in parameters:
        p.requires_grad_(trained)


def mark_only(trained: Mapping[str, Iterable[nn.Parameter]], name: str) -> None:
    """Let gradients flow to the parameters of that name and to no others; what is frozen is not among them."""
    for other, parameters in trained.items():
        mark_trained(parameters, other == name)
