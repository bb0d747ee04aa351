"""Bias, activation, gain and clamp in one op.

Karras et al. 2020, arXiv:1912.04958, appendix B joins them because each pass over an activation costs as much as the
whole epilogue. Leaky ReLU, ReLU and the identity are positively homogeneous, act(gain * u) = gain * act(u) for
gain > 0, so the gain joins the addition of the bias, the activation runs in place, and the gradient needs only the
signs of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stylepipe.kernels._library import ANY_DEVICE, LIBRARY, memory_format_of

_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717


class _Activation(NamedTuple):
    """An activation with its first two derivatives: functions of (u, alpha), made of differentiable ops."""

    gain: float
    alpha: float
    value: Callable[[torch.Tensor, float], torch.Tensor]
    first: Callable[[torch.Tensor, float], torch.Tensor]
    second: Callable[[torch.Tensor, float], torch.Tensor] | None  # None: zero wherever it is defined


def _exponential(u: torch.Tensor, positive: float, scale: float) -> torch.Tensor:
    """Return `positive` where u > 0 and scale * exp(u) elsewhere, without overflow in the gradient."""
    return torch.where(u > 0, positive, scale * u.clamp(max=0).exp())


def _swish_first(u: torch.Tensor, _: float) -> torch.Tensor:
    s = u.sigmoid()
    return s * (1 + u * (1 - s))


def _swish_second(u: torch.Tensor, _: float) -> torch.Tensor:
    s = u.sigmoid()
    return s * (1 - s) * (2 + u * (1 - 2 * s))


def _sigmoid_second(u: torch.Tensor, _: float) -> torch.Tensor:
    s = u.sigmoid()
    return s * (1 - s) * (1 - 2 * s)


def _tanh_second(u: torch.Tensor, _: float) -> torch.Tensor:
    t = u.tanh()
    return -2 * t * (1 - t * t)


_SCALED = _SELU_SCALE * _SELU_ALPHA
_ACTIVATIONS = {
    # name: (default gain, default alpha, act(u), act'(u), act''(u))
    "linear": _Activation(1, 0, lambda u, _: u, lambda u, _: torch.ones_like(u), None),
    "relu": _Activation(math.sqrt(2), 0, lambda u, _: u.relu(), lambda u, _: (u > 0).to(u.dtype), None),
    "lrelu": _Activation(
        math.sqrt(2), 0.2, lambda u, a: F.leaky_relu(u, a), lambda u, a: torch.where(u > 0, 1.0, a).to(u.dtype), None
    ),
    "tanh": _Activation(1, 0, lambda u, _: u.tanh(), lambda u, _: 1 - u.tanh().square(), _tanh_second),
    "sigmoid": _Activation(
        1, 0, lambda u, _: u.sigmoid(), lambda u, _: u.sigmoid() * (1 - u.sigmoid()), _sigmoid_second
    ),
    "elu": _Activation(
        1, 0, lambda u, _: F.elu(u), lambda u, _: _exponential(u, 1, 1), lambda u, _: _exponential(u, 0, 1)
    ),
    "selu": _Activation(
        1,
        0,
        lambda u, _: F.selu(u),
        lambda u, _: _exponential(u, _SELU_SCALE, _SCALED),
        lambda u, _: _exponential(u, 0, _SCALED),
    ),
    "softplus": _Activation(
        1, 0, lambda u, _: F.softplus(u), lambda u, _: u.sigmoid(), lambda u, _: u.sigmoid() * (1 - u.sigmoid())
    ),
    "swish": _Activation(math.sqrt(2), 0, lambda u, _: u * u.sigmoid(), _swish_first, _swish_second),
}


def activation_gain(act: str) -> float:
    """Return the default gain of an activation: what keeps unit variance for the ReLU family, else 1."""
    return _lookup(act).gain


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
        x: any shape, any floating type; 4-D tensors may be contiguous or channels_last.
        b: [x.shape[dim]], cast to x's type; None for no bias.
        dim: the dimension of x that b runs along.
        act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish.
        alpha: slope of lrelu for negative values, default 0.2; other activations ignore it.
        gain: factor after the activation; default sqrt(2) for relu, lrelu and swish, else 1.
        clamp: limit of the output's magnitude, applied last; None for none.

    Returns:
        A tensor of x's shape and type, in x's memory format.
    """
    spec = _lookup(act)
    if clamp is not None and clamp < 0:
        raise ValueError(f"bias_act: clamp {clamp}: expected a number >= 0, or None for no clamp")
    if b is not None and (b.ndim != 1 or b.shape[0] != x.shape[dim]):
        raise ValueError(f"bias_act: b of shape {list(b.shape)}: expected [{x.shape[dim]}], x's size along dim {dim}")
    return torch.ops.stylepipe.bias_act(
        x,
        b,
        dim % x.ndim,
        act,
        float(spec.alpha if alpha is None else alpha),
        float(spec.gain if gain is None else gain),
        None if clamp is None else float(clamp),
    )


def _lookup(act: str) -> _Activation:
    if act not in _ACTIVATIONS:
        raise ValueError(f"bias_act: act {act!r}: expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[act]


def _keeps_sign(act: str, alpha: float, gain: float) -> bool:
    """Tell whether the output's sign and magnitude suffice for the gradient (see the head of this file)."""
    return gain > 0 and (act in ("linear", "relu") or (act == "lrelu" and alpha >= 0))


def _along(b: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """View b [C] so that it broadcasts along `dim` of x."""
    return b.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])


def _sum_to_bias(dx: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    return dx.sum([i for i in range(dx.ndim) if i != dim]).to(b.dtype) if dx.ndim > 1 else dx.to(b.dtype)


# --- forward ---

LIBRARY.define(
    "bias_act(Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float? clamp) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "bias_act_backward(Tensor dy, Tensor ref, Tensor? b, int dim, str act, float alpha, float gain, float? clamp)"
    " -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(LIBRARY, "bias_act", ANY_DEVICE)
def _forward(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> torch.Tensor:
    if _keeps_sign(act, alpha, gain):
        y = _forward_homogeneous(x, b, dim, act, alpha, gain)
    else:
        u = x if b is None else x + _along(b, x, dim)
        y = _ACTIVATIONS[act].value(u, alpha) * gain
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
    ctx.save_for_backward(output if _keeps_sign(act, alpha, gain) else x, b)


def _forward_autograd(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    ref, b = ctx.saved_tensors
    dx = torch.ops.stylepipe.bias_act_backward(dy, ref, b, *ctx.options)
    db = _sum_to_bias(dx, b, ctx.options[0]) if ctx.needs_input_grad[1] else None
    return dx, db, None, None, None, None, None


torch.library.register_autograd("stylepipe::bias_act", _forward_autograd, setup_context=_forward_setup, lib=LIBRARY)


# --- gradient: dx = dy * gain * act'(x + b), zero where clamped ---


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
) -> torch.Tensor:
    """Return dx; `ref` is the output y where the output's sign suffices, else the input x."""
    memory_format = memory_format_of(ref)
    dy = dy.contiguous(memory_format=memory_format)
    if not _keeps_sign(act, alpha, gain):
        u = ref if b is None else ref + _along(b, ref, dim)
        return dy * _clamped_derivative(u, act, alpha, gain, clamp, _ACTIVATIONS[act].first)
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
    return slope * ((_ACTIVATIONS[act].value(u, alpha) * gain).abs() < clamp)


@torch.library.register_fake("stylepipe::bias_act_backward", lib=LIBRARY)
def _backward_fake(dy: torch.Tensor, ref: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(ref, memory_format=memory_format_of(ref))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    dy, ref, b, *ctx.options = inputs
    ctx.curved = _ACTIVATIONS[ctx.options[1]].second is not None
    # A piecewise linear activation's gradient is linear in dy, which is then not needed again.
    ctx.save_for_backward(dy if ctx.curved else None, ref, b)


def _backward_autograd(ctx: Any, ddx: torch.Tensor) -> tuple[Any, ...]:
    dy, ref, b = ctx.saved_tensors
    dim, act, alpha, gain, clamp = ctx.options
    ddy = torch.ops.stylepipe.bias_act_backward(ddx, ref, b, *ctx.options) if ctx.needs_input_grad[0] else None
    dref = db = None
    if ctx.curved and any(ctx.needs_input_grad[1:3]):
        u = ref if b is None else ref + _along(b, ref, dim)
        second = _ACTIVATIONS[act].second
        assert second is not None
        dref = dy * ddx * _clamped_derivative(u, act, alpha, gain, clamp, second)
        db = _sum_to_bias(dref, b, dim) if ctx.needs_input_grad[2] else None
    return ddy, dref, db, None, None, None, None, None


torch.library.register_autograd(
    "stylepipe::bias_act_backward", _backward_autograd, setup_context=_backward_setup, lib=LIBRARY
)
