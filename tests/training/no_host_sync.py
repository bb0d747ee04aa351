"""Watches that nothing waits for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSync(TorchDispatchMode):
    """Raises where the host would have to wait for a number from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.is_nonzero.default:
            raise AssertionError("a phase reads a number back from the device")
        return func(*args, **(kwargs or {}))
