"""The torch.library namespace of all ops, and what their registrations share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from stylepipe.kernels.native import Library, library

LIBRARY = torch.library.Library("stylepipe", "FRAGMENT")

# One implementation answers for every device: it takes compiled kernels where they are, else PyTorch's operations.
ANY_DEVICE = "CompositeExplicitAutograd"

STRAIGHT = ("linear", "relu", "lrelu")
"""Activations that are straight on both sides of 0."""


def register_gradient(op: str, setup: Callable[..., None], gradient: Callable[..., tuple[Any, ...]]) -> None:
    """Register the gradient of an op of ours, made of differentiable ops.

    As torch.library.register_autograd, which reads the op's whole schema again at every call: that took longer on the
    host than anything else that stands around a kernel.

    Args:
        op: its name.
        setup: keeps what the gradient needs: setup(ctx, inputs, output).
        gradient: returns one gradient per input, or None: gradient(ctx, *gradients by the outputs).
    """
    overload = getattr(torch.ops.stylepipe, op).default

    def below(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = below(*arguments)
            setup(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradient(ctx, *gradients)

    def run(*arguments: Any) -> Any:
        wanted = any(isinstance(argument, torch.Tensor) and argument.requires_grad for argument in arguments)
        return Differentiated.apply(*arguments) if wanted and torch.is_grad_enabled() else below(*arguments)

    LIBRARY.impl(op, run, "Autograd")


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


class Traits(NamedTuple):
    """What decides whether kernels take an operand; see native.Library."""

    vector_bytes: int
    threads: int


def compiled(source: str, x: torch.Tensor, act: str = "linear") -> Library | None:
    """Return the compiled kernels of cuda/`source`.cu or cpu/`source`.cpp if they are there and made for x and act."""
    kernels = library(source, x.dtype, x.device)
    return kernels if kernels is not None and _made_for(kernels, x, act) else None


def traits_for(source: str, x: torch.Tensor, act: str = "linear") -> Traits | None:
    """Return the traits of what compiled() returns; torch.compile can follow this, and keeps what it finds."""
    found = _traits(source, x.dtype, x.device)
    if found is None:
        return None
    traits = Traits(*found)
    return traits if _made_for(traits, x, act) else None


@torch.compiler.assume_constant_result
def _traits(source: str, dtype: torch.dtype, device: torch.device) -> tuple[int, int] | None:
    kernels = library(source, dtype, device)
    return None if kernels is None else (kernels.vector_bytes, kernels.threads)


def _made_for(kernels: Library | Traits, x: torch.Tensor, act: str) -> bool:
    """Those for a CPU are made for channels_last, as networks run, and straight activations."""
    return kernels.threads > 1 or (memory_format_of(x) == torch.channels_last and act in STRAIGHT)
