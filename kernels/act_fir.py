"""Bias, activation and the FIR filter of a coming down-convolution in one op, as discriminators need them.

The activations themselves are read by nothing but the filter, so they are never written: the gradient needs two bits of
each, which side of 0 it came from and whether it was clamped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stylepipe.kernels._activations import activation_alpha, activation_gain
from stylepipe.kernels._fir import fits_fused, plain_geometry, run_act_fir, run_act_fir_backward, transposed_padding
from stylepipe.kernels._library import (
    ANY_DEVICE,
    LIBRARY,
    STRAIGHT,
    check_device,
    check_floating,
    compiled,
    register_gradient,
    traits_for,
)
from stylepipe.kernels._operands import Operands, real_of, slope_below
from stylepipe.kernels.bias_act import bias_act, check_clamp
from stylepipe.kernels.upfirdn2d import upfirdn2d

_NEGATIVE, _POSITIVE, _CLAMPED = range(3)  # as in cuda/fused_fir.cu


def act_fir(
    x: Tensor,
    b: Tensor | None,
    f: Tensor,
    padding: int = 0,
    act: str = "lrelu",
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Return upfirdn2d(bias_act(x, b, act=act, gain=gain, clamp=clamp), f, padding=padding), differentiable too.

    Args:
        x: [N, C, H, W], any floating type, contiguous or channels_last; as for the two ops, autocast changes nothing.
        b: [C] or None.
        f, padding: as upfirdn2d has them.
        act, gain, clamp: as bias_act has them.

    Raises:
        ValueError: a shape does not fit, or the output would be empty.
    """
    if x.ndim != 4:
        raise ValueError(f"act_fir: x of shape {list(x.shape)}: expected [N, C, H, W]")
    if b is not None and list(b.shape) != [x.shape[1]]:
        raise ValueError(f"act_fir: b of shape {list(b.shape)}: expected {[x.shape[1]]}, x's channels")
    check_clamp("act_fir", clamp)
    check_floating("act_fir", x)
    check_device("act_fir", "b", b, x)
    check_device("act_fir", "f", f, x)
    gain = float(activation_gain(act) if gain is None else gain)
    clamp = None if clamp is None else float(clamp)
    traits = traits_for("fused_fir", x) if _fits(x, f, padding, act, gain) else None
    if traits is None or not fits_fused(traits, x, f):
        return upfirdn2d(bias_act(x, b, act=act, gain=gain, clamp=clamp), f, padding=padding)
    return torch.ops.stylepipe.act_fir(x, b, f, padding, act, activation_alpha(act), gain, clamp)[0]


def _fits(x: Tensor, f: Tensor, padding: int, act: str, gain: float) -> bool:
    """Tell whether there can be kernels for it.

    The codes of an input are written by the thread whose output lies at the same place: there must be one.
    """
    taps = f.shape[-1]
    return act in STRAIGHT and gain > 0 and x.numel() > 0 and taps - 1 <= 2 * padding <= 2 * (taps - 1)


_OPTIONS = "Tensor f, int padding, str act, float alpha, float gain, float? clamp"
LIBRARY.define(f"act_fir(Tensor x, Tensor? b, {_OPTIONS}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    f"act_fir_backward(Tensor dy, Tensor codes, {_OPTIONS}, bool with_db) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(LIBRARY, "act_fir", ANY_DEVICE)
def _forward(
    x: Tensor, b: Tensor | None, f: Tensor, padding: int, act: str, alpha: float, gain: float, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """Return y and codes [N, H, W, C / 4] uint8: four activations to a byte (two of float64), the first lowest."""
    x = x.contiguous(memory_format=torch.channels_last)
    kernels = compiled("fused_fir", x) if _fits(x, f, padding, act, gain) else None
    if kernels is not None and fits_fused(kernels, x, f):
        operands = Operands(bias=b, act=act, alpha=alpha, gain=gain, clamp=clamp)
        return run_act_fir(kernels, x, f, plain_geometry(x, f, padding), operands)
    u = x if b is None else x + b.to(x.dtype)[:, None, None]
    code = torch.where(u > 0, _POSITIVE, _NEGATIVE)
    if clamp is not None:
        code = code.masked_fill(bias_act(u, act=act, alpha=alpha, gain=gain).abs() >= clamp, _CLAMPED)
    lanes = torch.tensor([1, 4, 16, 64][: _per_byte(x)], device=x.device)
    codes = (code.permute(0, 2, 3, 1).unflatten(3, (-1, _per_byte(x))) * lanes).sum(-1).to(torch.uint8)
    y = upfirdn2d(bias_act(x, b, act=act, alpha=alpha, gain=gain, clamp=clamp), f, padding=padding)
    return y, codes


@torch.library.register_fake("stylepipe::act_fir", lib=LIBRARY)
def _forward_fake(x: Tensor, b: Tensor | None, f: Tensor, padding: int, *_: Any) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    grown = 2 * padding + 1 - f.shape[-1]
    shape = (n, c, h + grown, w + grown)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, x.new_empty(n, h, w, c // _per_byte(x), dtype=torch.uint8)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, b, f, *ctx.options = inputs
    ctx.bias_dtype = None if b is None else b.dtype
    ctx.save_for_backward(output[1], f)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _forward_autograd(ctx: Any, dy: Tensor | None, dcodes: None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 8
    codes, f = ctx.saved_tensors
    with_db = ctx.needs_input_grad[1]
    dx, db = torch.ops.stylepipe.act_fir_backward(dy, codes, f, *ctx.options, with_db)
    return dx, db.to(ctx.bias_dtype) if with_db else None, None, None, None, None, None, None


register_gradient("act_fir", _forward_setup, _forward_autograd)


@torch.library.impl(LIBRARY, "act_fir_backward", ANY_DEVICE)
def _backward(
    dy: Tensor,
    codes: Tensor,
    f: Tensor,
    padding: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    with_db: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx and db [C] (empty without `with_db`) in the type of sums."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    before = transposed_padding(f, padding)
    kernels = compiled("fused_fir", dy)
    if kernels is not None and fits_fused(kernels, dy, f):
        geometry = plain_geometry(dy, f, before)._replace(flip_filter=True)
        operands = Operands(act=act, alpha=alpha, gain=gain, clamp=clamp)
        dx, sums = run_act_fir_backward(kernels, dy, codes, f, geometry, operands, with_db)
        return dx, sums["bias"].sum(0) if with_db else dx.new_empty(0)
    dx = upfirdn2d(dy, f, padding=before, flip_filter=True) * _slope(codes, dy, act, alpha, gain)
    db = dx.to(real_of(dx.dtype)).sum((0, 2, 3)) if with_db else dx.new_empty(0)
    return dx, db


@torch.library.register_fake("stylepipe::act_fir_backward", lib=LIBRARY)
def _backward_fake(dy: Tensor, codes: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    n, h, w, _ = codes.shape
    shape = (n, dy.shape[1], h, w)
    dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    return dx, dy.new_empty(dy.shape[1], dtype=real_of(dy.dtype)) if options[-1] else dy.new_empty(0)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, codes, f, *ctx.options = inputs
    ctx.dtype = dy.dtype
    ctx.save_for_backward(codes, f)
    ctx.set_materialize_grads(False)


def _backward_autograd(ctx: Any, ddx: Tensor | None, ddb: Tensor | None) -> tuple[Any, ...]:
    """The gradient is linear in dy: its own gradient filters what passes the activation."""
    codes, f = ctx.saved_tensors
    padding, act, alpha, gain, _, with_db = ctx.options
    n, h, w, _ = codes.shape
    if ddb is not None and with_db:  # db is the sum of dx
        along = ddb.to(ctx.dtype)[:, None, None].expand(n, -1, h, w)
        ddx = along if ddx is None else ddx + along
    if ddx is None:
        return (None,) * 9
    passed = ddx * _slope(codes, ddx, act, alpha, gain)
    return upfirdn2d(passed, f, padding=padding), None, None, None, None, None, None, None, None


register_gradient("act_fir_backward", _backward_setup, _backward_autograd)


def _slope(codes: Tensor, like: Tensor, act: str, alpha: float, gain: float) -> Tensor:
    """Return dv/du [N, C, H, W], channels_last, in the type of `like`."""
    shifts = torch.arange(0, 2 * _per_byte(like), 2, dtype=torch.uint8, device=codes.device)
    code = ((codes[..., None] >> shifts) & 3).flatten(3).permute(0, 3, 1, 2)
    slope = torch.full_like(code, gain * slope_below(act, alpha), dtype=like.dtype)
    return slope.masked_fill(code == _POSITIVE, gain).masked_fill(code == _CLAMPED, 0)


def _per_byte(x: Tensor) -> int:
    return min(4, 16 // x.dtype.itemsize)
