"""The torch.library namespace of all ops, and what their registrations share."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("stylepipe", "FRAGMENT")

# The PyTorch implementations answer for every device; a kernel for one device is registered under its own key.
ANY_DEVICE = "CompositeExplicitAutograd"


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """Return the format an op's output takes after `x`: channels_last only where it differs from contiguous."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
