"""Bias, activation, gain and clamp in one op.

Karras et al. 2020, arXiv:1912.04958, appendix B joins them because each pass over an activation costs as much as the
whole epilogue. Leaky ReLU, ReLU and the identity are positively homogeneous, act(gain * u) = gain * act(u) for
gain > 0, so the gain joins the addition of the bias, the activation runs in place, and the gradient needs only the
signs of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from stylepipe.kernels._activations import ACTIVATIONS, keeps_sign, lookup
from stylepipe.kernels._epilogue import run_backward, run_forward, view_along
from stylepipe.kernels._library import (
    ANY_DEVICE,
    LIBRARY,
    check_device,
    check_floating,
    compiled,
    in_own_type,
    memory_format_of,
    register_gradient,
    traits_for,
)
from stylepipe.kernels._operands import Operands, real_of
from stylepipe.kernels.native import Library


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """Return clamp(act(x + b) * gain), differentiable any number of times.

    Args:
        x: any shape, any floating type; 4-D tensors may be contiguous or channels_last. The op works in its type,
            autocast or not.
        b: [x.shape[dim]], None for no bias. Compiled kernels read it as float32 (float64 for float64) and round once,
            at the end; without them it is rounded to x's type.
        dim: the dimension of x that b runs along.
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        alpha: slope of lrelu for negative values, default 0.2; other activations ignore it.
        gain: factor after the activation; default sqrt(2) for relu, lrelu and swish, else 1. With 0, kernels of
            straight activations give 0 for inf and NaN too, PyTorch's operations NaN.
        clamp: limit of the output's magnitude, applied last; None for none.

    Returns:
        A tensor of x's shape and type, in x's memory format.
    """
    spec = lookup(act)
    check_clamp("bias_act", clamp)
    check_floating("bias_act", x)
    check_device("bias_act", "b", b, x)
    if b is not None and (b.ndim != 1 or b.shape[0] != x.shape[dim]):
        raise ValueError(f"bias_act: b of shape {list(b.shape)}: expected [{x.shape[dim]}], x's size along dim {dim}")
    dim, alpha = dim % x.ndim, float(spec.alpha if alpha is None else alpha)
    gain, clamp = float(spec.gain if gain is None else gain), None if clamp is None else float(clamp)
    if torch.compiler.is_compiling() and not (_fits(x, b, dim) and traits_for("epilogue", x, act)):
        return _in_parts(x, b, dim, act, alpha, gain, clamp)
    return torch.ops.stylepipe.bias_act(x, b, dim, act, alpha, gain, clamp)


def check_clamp(op: str, clamp: float | None) -> None:
    """Raise ValueError for a clamp that limits nothing."""
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"{op}: clamp {clamp}: expected a number >= 0, or None for no clamp")


def _in_parts(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> torch.Tensor:
    """Compose it of what a compiler sees through, and so joins with what stands before and behind."""
    with in_own_type(x):
        y = ACTIVATIONS[act].value(x if b is None else x + _along(b, x, dim), alpha) * gain
        return y if clamp is None else y.clamp(-clamp, clamp)


def _along(b: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """View b [C] so that it broadcasts along `dim` of x."""
    return b.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])


def _sum_to_bias(dx: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over all but `dim`, in float32 at the least: half a million half-precision numbers pass their range."""
    others = [i for i in range(dx.ndim) if i != dim]
    return (dx.sum(others, dtype=real_of(dx.dtype)) if others else dx).to(b.dtype)


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """Stand for an output that is not wanted: an op has to return a tensor."""
    return like.new_empty(0)


def _kernels(x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str) -> Library | None:
    """Return compiled kernels that take x and b, or None."""
    return compiled("epilogue", x, act) if _fits(x, b, dim) else None


def _fits(x: torch.Tensor, b: torch.Tensor | None, dim: int) -> bool:
    """Tell whether kernels of any kind take x and b."""
    return x.numel() > 0 and (b is None or dim == 1 or memory_format_of(x) != torch.channels_last)


# --- forward ---

LIBRARY.define(
    "bias_act(Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float? clamp) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "bias_act_backward(Tensor dy, Tensor ref, Tensor? b, int dim, str act, float alpha, float gain, float? clamp,"
    " bool with_db) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(LIBRARY, "bias_act", ANY_DEVICE)
def _forward(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> torch.Tensor:
    if kernels := _kernels(x, b, dim, act):
        x = x.contiguous(memory_format=memory_format_of(x))
        operands = Operands(bias=b, act=act, alpha=alpha, gain=gain, clamp=clamp)
        return run_forward(kernels, x, view_along(kernels, x, None if b is None else dim), operands)[0]
    with in_own_type(x):
        if keeps_sign(act, alpha, gain):
            y = _forward_homogeneous(x, b, dim, act, alpha, gain)
        else:
            u = x if b is None else x + _along(b, x, dim)
            y = ACTIVATIONS[act].value(u, alpha) * gain
    if clamp is not None:
        y.clamp_(-clamp, clamp)
    return y.contiguous(memory_format=memory_format_of(x))


def _forward_homogeneous(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float
) -> torch.Tensor:
    """Compute act(gain * x + gain * b): one pass for the sum, one in place for the activation."""
    if b is not None:
        y = torch.add(_along(b, x, dim) * gain, x, alpha=gain)
    elif gain != 1:
        y = x * gain
    elif act == "lrelu":
        return F.leaky_relu(x, alpha)
    elif act == "relu":
        return x.relu()
    else:
        return x.clone()
    if act == "lrelu":
        return F.leaky_relu_(y, alpha)
    return y.relu_() if act == "relu" else y


@torch.library.register_fake("stylepipe::bias_act", lib=LIBRARY)
def _forward_fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=memory_format_of(x))


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, b, *ctx.options = inputs
    _, act, alpha, gain, _ = ctx.options
    ctx.save_for_backward(output if keeps_sign(act, alpha, gain) else x, b)


def _forward_autograd(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    ref, b = ctx.saved_tensors
    with_db = ctx.needs_input_grad[1]
    dx, db = torch.ops.stylepipe.bias_act_backward(dy, ref, b, *ctx.options, with_db)
    return dx, db if with_db else None, None, None, None, None, None


register_gradient("bias_act", _forward_setup, _forward_autograd)


# --- gradient: dx = dy * gain * act'(x + b), zero where clamped, and db, its sum ---


@torch.library.impl(LIBRARY, "bias_act_backward", ANY_DEVICE)
def _backward(
    dy: torch.Tensor,
    ref: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    with_db: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dx and db [C] (empty without `with_db`); `ref` is y where its sign suffices, else x."""
    dy = dy.contiguous(memory_format=memory_format_of(ref))
    if kernels := _kernels(ref, b, dim, act):
        ref = ref.contiguous(memory_format=memory_format_of(ref))
        by_sign = keeps_sign(act, alpha, gain)
        operands = Operands(bias=None if by_sign else b, act=act, alpha=alpha, gain=gain, clamp=clamp)
        view, wanted = view_along(kernels, ref, None if b is None else dim), {"bias"} if with_db else set[str]()
        dx, sums = run_backward(kernels, dy, ref, view, operands, wanted, ref_is_output=by_sign)
        return dx, sums["bias"].sum(0).to(b.dtype) if with_db and b is not None else _nothing(dx)
    with in_own_type(ref):
        dx = _backward_in_torch(dy, ref, b, dim, act, alpha, gain, clamp)
    return dx, _sum_to_bias(dx, b, dim) if with_db and b is not None else _nothing(dx)


def _backward_in_torch(
    dy: torch.Tensor,
    ref: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> torch.Tensor:
    if not keeps_sign(act, alpha, gain):
        u = ref if b is None else ref + _along(b, ref, dim)
        return dy * _clamped_derivative(u, act, alpha, gain, clamp, ACTIVATIONS[act].first)
    if act == "lrelu":
        dx = torch.ops.aten.leaky_relu_backward(dy, ref, alpha, True)
    elif act == "relu":
        dx = torch.ops.aten.threshold_backward(dy, ref, 0)
    else:
        dx = dy.clone()
    if gain != 1:
        dx.mul_(gain)
    if clamp is not None:
        dx.masked_fill_(ref.abs() >= clamp, 0)
    return dx


def _clamped_derivative(
    u: torch.Tensor,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    derivative: Callable[[torch.Tensor, float], torch.Tensor],
) -> torch.Tensor:
    """Return gain * derivative(u), zero where the output is clamped."""
    slope = derivative(u, alpha) * gain
    if clamp is None:
        return slope
    return slope * ((ACTIVATIONS[act].value(u, alpha) * gain).abs() < clamp)


@torch.library.register_fake("stylepipe::bias_act_backward", lib=LIBRARY)
def _backward_fake(
    dy: torch.Tensor, ref: torch.Tensor, b: torch.Tensor | None, dim: int, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    with_db = options[-1] and b is not None
    db = torch.empty_like(b) if with_db and b is not None else _nothing(ref)
    return torch.empty_like(ref, memory_format=memory_format_of(ref)), db


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    dy, ref, b, *ctx.options = inputs
    ctx.curved = ACTIVATIONS[ctx.options[1]].second is not None
    # A piecewise linear activation's gradient is linear in dy, which is then not needed again.
    ctx.save_for_backward(dy if ctx.curved else None, ref, b)
    ctx.set_materialize_grads(False)


def _backward_autograd(ctx: Any, ddx: torch.Tensor | None, ddb: torch.Tensor | None) -> tuple[Any, ...]:
    dy, ref, b = ctx.saved_tensors
    dim, act, alpha, gain, clamp, _ = ctx.options
    if ddb is not None and b is not None:  # db is the sum of dx
        ddx = _along(ddb, ref, dim).expand_as(ref) if ddx is None else ddx + _along(ddb, ref, dim)
    ddy = dref = db = None
    if ddx is not None and ctx.needs_input_grad[0]:
        ddy = torch.ops.stylepipe.bias_act_backward(ddx, ref, b, dim, act, alpha, gain, clamp, False)[0]
    if ddx is not None and ctx.curved and any(ctx.needs_input_grad[1:3]):
        u = ref if b is None else ref + _along(b, ref, dim)
        second = ACTIVATIONS[act].second
        assert second is not None
        dref = dy * ddx * _clamped_derivative(u, act, alpha, gain, clamp, second)
        db = _sum_to_bias(dref, b, dim) if b is not None and ctx.needs_input_grad[2] else None
    return ddy, dref, db, None, None, None, None, None, None


register_gradient("bias_act_backward", _backward_setup, _backward_autograd)
