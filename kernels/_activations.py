"""The activations of bias_act: defaults, values and derivatives, each made of differentiable PyTorch operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

_SELU_SCALE = 1.0507009873554804934193349852946
_SELU_ALPHA = 1.6732632423543772848170429916717


class Activation(NamedTuple):
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
ACTIVATIONS = {  # in the order of cuda/common.cuh
    # name: (default gain, default alpha, act(u), act'(u), act''(u))
    "linear": Activation(1, 0, lambda u, _: u, lambda u, _: torch.ones_like(u), None),
    "relu": Activation(math.sqrt(2), 0, lambda u, _: u.relu(), lambda u, _: (u > 0).to(u.dtype), None),
    "lrelu": Activation(
        math.sqrt(2),
        0.2,
        lambda u, a: F.leaky_relu(u, a),
        lambda u, a: torch.full_like(u, a).masked_fill(u > 0, 1),
        None,
    ),
    "tanh": Activation(1, 0, lambda u, _: u.tanh(), lambda u, _: 1 - u.tanh().square(), _tanh_second),
    "sigmoid": Activation(
        1, 0, lambda u, _: u.sigmoid(), lambda u, _: u.sigmoid() * (1 - u.sigmoid()), _sigmoid_second
    ),
    "elu": Activation(
        1, 0, lambda u, _: F.elu(u), lambda u, _: _exponential(u, 1, 1), lambda u, _: _exponential(u, 0, 1)
    ),
    "selu": Activation(
        1,
        0,
        lambda u, _: F.selu(u),
        lambda u, _: _exponential(u, _SELU_SCALE, _SCALED),
        lambda u, _: _exponential(u, 0, _SCALED),
    ),
    "softplus": Activation(
        1, 0, lambda u, _: F.softplus(u), lambda u, _: u.sigmoid(), lambda u, _: u.sigmoid() * (1 - u.sigmoid())
    ),
    "swish": Activation(math.sqrt(2), 0, lambda u, _: u * u.sigmoid(), _swish_first, _swish_second),
}


def activation_gain(act: str) -> float:
    """Return the default gain of an activation: what keeps unit variance for the ReLU family, else 1."""
    return lookup(act).gain


def activation_alpha(act: str) -> float:
    """Return the default alpha of an activation: 0.2 for lrelu; the others have none, 0."""
    return lookup(act).alpha


def lookup(act: str) -> Activation:
    """Return an activation by its name; raise ValueError for any other word."""
    if act not in ACTIVATIONS:
        raise ValueError(f"bias_act: act {act!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def keeps_sign(act: str, alpha: float, gain: float) -> bool:
    """Tell whether the output's sign and magnitude suffice for the gradient (see the head of bias_act.py)."""
    return gain > 0 and (act in ("linear", "relu") or (act == "lrelu" and alpha >= 0))
