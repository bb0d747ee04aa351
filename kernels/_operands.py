"""What kernels are given: the small operands of an epilogue, and the structs of the source, field by field."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")
"""In the order of the enum in cuda/common.cuh."""

RGB = 3
"""Colours that the kernels make beside an activation, as in cuda/channel.cuh."""

SUMS = ("scale", "bias", "next_scale", "noise_strength", "rgb_weight")
"""The operands whose gradients are sums over pixels."""


class Operands(NamedTuple):
    """What an epilogue joins to an activation of N images, C channels and P pixels; None where absent.

    Attributes:
        scale, next_scale: [N, C].
        bias: [C].
        noise: [N or 1, P], the pixels of an image next to one another.
        noise_strength: [].
        rgb_weight: [N, RGB, C].
    """

    scale: Tensor | None = None
    bias: Tensor | None = None
    next_scale: Tensor | None = None
    noise: Tensor | None = None
    noise_strength: Tensor | None = None
    rgb_weight: Tensor | None = None
    act: str = "linear"
    alpha: float = 0
    gain: float = 1
    clamp: float | None = None

    def prepared(self, dtype: torch.dtype) -> Operands:
        """Return them as kernels for activations of this type read them."""
        real = real_of(dtype)
        noise = None if self.noise is None else self.noise.to(real)
        if noise is not None and noise.stride(1) != 1:
            noise = noise.contiguous()
        return Operands(
            _packed(self.scale, real), _packed(self.bias, real), _packed(self.next_scale, real), noise,
            _packed(self.noise_strength, real), _packed(self.rgb_weight, real),
            self.act, self.alpha, self.gain, self.clamp,
        )  # fmt: skip


def _packed(tensor: Tensor | None, real: torch.dtype) -> Tensor | None:
    if tensor is None or (tensor.dtype == real and tensor.is_contiguous()):
        return tensor
    return tensor.to(real).contiguous()


def slope_below(act: str, alpha: float) -> float:
    """Return the slope below 0 of a straight activation."""
    return {"linear": 1.0, "relu": 0.0}.get(act, alpha)


def real_of(dtype: torch.dtype) -> torch.dtype:
    """Return the type that kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Structures(NamedTuple):
    """The structs that epilogue kernels take, as ctypes has them."""

    operands: type[ctypes.Structure]
    sums: type[ctypes.Structure]
    forward: type[ctypes.Structure]
    backward: type[ctypes.Structure]


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """Return the ctypes form of a struct of the source."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


@cache
def structures(real: torch.dtype) -> Structures:
    """Return the structs of cuda/channel.cuh and cuda/epilogue_params.cuh, field by field."""
    address, int64, number = ctypes.c_void_p, ctypes.c_int64, real_number(real)
    operands = structure(
        "Operands",
        **dict.fromkeys(("scale", "bias", "next_scale", "noise", "noise_strength", "rgb_weight"), address),
        noise_stride=int64, alpha=number, gain=number, clamp=number, act=ctypes.c_int,
    )  # fmt: skip
    sums = structure("Sums", **dict.fromkeys(SUMS, address))
    place = {
        "images": int64,
        "pixels": int64,
        **dict.fromkeys(("channels", "tiles", "chunks", "pixels_per_block"), ctypes.c_int),
    }
    forward = structure("EpilogueParams", x=address, y=address, rgb=address, operands=operands, **place)
    backward = structure(
        "EpilogueBackwardParams",
        dy=address, ref=address, dx=address, drgb=address, operands=operands, sums=sums, **place,
        ref_is_output=ctypes.c_int,
    )  # fmt: skip
    return Structures(operands, sums, forward, backward)


def real_number(real: torch.dtype) -> Any:
    """Return the ctypes form of `Real`."""
    return ctypes.c_double if real == torch.float64 else ctypes.c_float


def pack(of: Operands, dtype: torch.dtype) -> ctypes.Structure:
    """Return prepared operands as the source's struct, for activations of this type."""
    shared = of.noise is None or of.noise.shape[0] == 1
    return structures(real_of(dtype)).operands(
        pointer(of.scale), pointer(of.bias), pointer(of.next_scale), pointer(of.noise),
        pointer(of.noise_strength), pointer(of.rgb_weight),
        0 if shared or of.noise is None else of.noise.stride(0), slope_below(of.act, of.alpha), of.gain,
        math.nan if of.clamp is None else of.clamp, ACTIVATIONS.index(of.act),
    )  # fmt: skip


def pointer(tensor: Tensor | None) -> int | None:
    """Return a tensor's address; None, a null pointer, for None."""
    return None if tensor is None else tensor.data_ptr()
