"""Normalisation over a batch, whose statistics the trainer keeps, and over a fixed reference batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_EPS = 1e-5


class BatchNorm2d(nn.Module):
    """Normalise each channel over batch and pixels, then scale and shift it.

    Ioffe & Szegedy 2015, arXiv:1502.03167, Alg. 1 and 2. As torch's, except that training leaves the running statistics
    alone: micro-batches and processes each see a part of the batch, so the trainer averages what they noted and calls
    `follow_` once per step, the same everywhere.

    Attributes:
        running_mean, running_var: [C], used in evaluation mode.
        noted: [2, C] float32, detached: mean and unbiased variance of the last batch in training mode; 0 and 1 before.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.noted = torch.stack([self.running_mean, self.running_var])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, C, H, W] of any floating type to the same, calculating in float32."""
        wide = at_least_float32(x)
        if not self.training:
            y = F.batch_norm(wide, self.running_mean, self.running_var, self.weight, self.bias, eps=_EPS)
            return y.to(x.dtype)
        y, mean, inverse_std = torch.native_batch_norm(wide, self.weight, self.bias, None, None, True, 0, _EPS)
        count = x.numel() // x.shape[1]
        var = (inverse_std.detach().pow(-2) - _EPS).clamp_min(0) * (count / max(count - 1, 1))
        self.noted = torch.stack([mean.detach(), var])
        return y.to(x.dtype)

    @torch.no_grad()
    def follow_(self, noted: torch.Tensor, weight: float) -> None:
        """Move the running statistics by `weight` towards `noted` [2, C], except where that is inf or NaN."""
        for running, value in zip((self.running_mean, self.running_var), noted, strict=True):
            moved = running.lerp(value.to(running.dtype), weight)
            running.copy_(torch.where(moved.isfinite(), moved, running))


def batch_norms(module: nn.Module) -> list[BatchNorm2d]:
    """Return the batch normalisations in `module`, in their order there."""
    return [m for m in module.modules() if isinstance(m, BatchNorm2d)]


class VirtualBatchNorm2d(nn.Module):
    """Normalise each image by the statistics of a fixed reference batch and of the image itself.

    Salimans et al. 2016, arXiv:1606.03498, section 3.5: no image depends on the others of its batch. The reference goes
    through the network in front of the images, and is normalised by its own statistics; those of an image are of the
    reference and the image together, R + 1 of equal weight. The same in training and evaluation.
    """

    def __init__(self, channels: int, reference_size: int) -> None:
        super().__init__()
        self.reference_size = reference_size
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [R + N, C, H, W], of which the first R are the reference, to the same, calculating in float32."""
        wide, r = at_least_float32(x), self.reference_size
        var_ref, mean_ref = torch.var_mean(wide[:r], dim=(0, 2, 3), keepdim=True, correction=0)
        var_x, mean_x = torch.var_mean(wide[r:], dim=(2, 3), keepdim=True, correction=0)
        mean = (r * mean_ref + mean_x) / (r + 1)
        # E[x^2] - mean^2 without its cancellation: what lies within each part, and between the parts.
        var = (r * (var_ref + (mean_ref - mean).square()) + var_x + (mean_x - mean).square()) / (r + 1)
        mean = torch.cat([mean_ref.expand(r, -1, -1, -1), mean])
        scale = torch.cat([var_ref.expand(r, -1, -1, -1), var]).add(_EPS).rsqrt() * self.weight[:, None, None]
        return torch.addcmul(self.bias[:, None, None], wide - mean, scale).to(x.dtype)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
