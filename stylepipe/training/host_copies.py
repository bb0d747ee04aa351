"""Copies of tensors in the host's memory, to be written while the training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, wait
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Room for copies of tensors, kept from one time to the next: to ask for fresh memory takes ten times the copying.

    From a CUDA device they are begun in the current stream, behind what it still computes. Where their room can be
    page-locked nothing waits for them; else each copy waits for the device.

    Attributes:
        reader: what reads the copies in another thread, if anything; new ones are not taken before it has ended.
    """

    def __init__(self) -> None:
        self.reader: Future[Any] | None = None
        self._copies: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Begin to copy tensors of any layout; return the copies, contiguous, by the same names.

        What was taken before is overwritten. On CUDA call `wait` before the copies are read.
        """
        if self.reader is not None:
            wait([self.reader])
        self._copies = {name: self._room(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._copies

    def wait(self) -> None:
        """Wait for the device to have copied."""
        if self._copied is not None:
            self._copied.synchronize()

    def _room(self, name: str, tensor: Tensor) -> Tensor:
        room = self._copies.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            try:
                room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            except RuntimeError:  # there is a limit to page-locked memory, in containers above all
                room = torch.empty(tensor.shape, dtype=tensor.dtype)
        return room
