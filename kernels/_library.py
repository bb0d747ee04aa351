"""The torch.library namespace of all ops, and what their registrations share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from stylepipe.kernels.native import Library, library

LIBRARY = torch.library.Library("stylepipe", "FRAGMENT")

# One implementation answers for every device: it takes compiled kernels where they are, else PyTorch's operations.
ANY_DEVICE = "CompositeExplicitAutograd"

STRAIGHT = ("linear", "relu", "lrelu")
"""Activations that are straight on both sides of 0."""


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """Return the format an op's output takes after `x`: channels_last only where it differs from contiguous."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def check_floating(op: str, x: torch.Tensor) -> None:
    """Raise ValueError for integers: filters and slopes would be rounded to their type."""
    if not x.is_floating_point():
        raise ValueError(f"{op}: x of {x.dtype}: expected a floating type, such as x.float()")


def check_device(op: str, name: str, operand: torch.Tensor | None, x: torch.Tensor) -> None:
    """Raise ValueError for an operand elsewhere: kernels take addresses."""
    if operand is not None and operand.device != x.device:
        raise ValueError(f"{op}: {name} on {operand.device}: expected it on {x.device}, as x")


def in_own_type(x: torch.Tensor) -> AbstractContextManager[object]:
    """Keep autocast from changing the type that PyTorch's operations compute in, as it keeps out of kernels."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def compiled(source: str, x: torch.Tensor, act: str = "linear") -> Library | None:
    """Return the compiled kernels of cuda/`source`.cu or cpu/`source`.cpp if they are there and made for x and act.

    Those for a CPU are made for channels_last, as networks run, and activations that are straight on both sides of 0.
    """
    kernels = library(source, x.dtype, x.device)
    if kernels is None or kernels.threads > 1:
        return kernels
    return kernels if memory_format_of(x) == torch.channels_last and act in STRAIGHT else None
