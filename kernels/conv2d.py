"""Convolution whose derivatives of every order are plain convolutions.

torch expresses the derivative of a weight gradient as a convolution with images and channels exchanged, which runs at
a quarter of the speed of the weight gradient itself, and in a grouped convolution as one convolution per group. R1 and
path length regularization differentiate twice, so here both gradients are written with the primitives of the first
backward pass: the input's gradient is a convolution of the other kind, and the weight's gradient is bilinear, with two
such convolutions as derivatives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

_aten = torch.ops.aten


class _Geometry(NamedTuple):
    """What defines a convolution beside its tensors; `output_padding` (rows, columns) counts where transposed."""

    stride: int
    padding: int
    transposed: bool
    output_padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def arguments(self) -> tuple[Any, ...]:
        """Return stride, padding, dilation, transposed, output padding and groups, as torch takes them."""
        stride, padding = [self.stride] * 2, [self.padding] * 2
        return stride, padding, [1, 1], self.transposed, list(self.output_padding), self.groups

    def adjoint(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> _Geometry:
        """Return the geometry that maps y's shape back to x's with the same weight."""
        if self.transposed:
            return self._replace(transposed=False, output_padding=(0, 0))
        rows, columns = (
            x.shape[i] - ((y.shape[i] - 1) * self.stride + weight.shape[i] - 2 * self.padding) for i in (2, 3)
        )
        return self._replace(transposed=True, output_padding=(rows, columns))


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    transposed: bool = False,
    groups: int = 1,
) -> torch.Tensor:
    """Return the correlation of x [N, I, H, W] with weight [O, I / groups, kh, kw], plus bias [O].

    Transposed, it is the adjoint of that map, as torch's conv_transpose2d: weight is [I, O / groups, kh, kw] then.
    """
    if torch.compiler.is_compiling():  # a compiled region is differentiated once
        if transposed:
            return F.conv_transpose2d(x, weight, bias, stride=stride, padding=padding, groups=groups)
        return F.conv2d(x, weight, bias, stride=stride, padding=padding, groups=groups)
    return _Convolution.apply(x, weight, bias, _Geometry(stride, padding, transposed, groups=groups))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: _Geometry
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _aten.convolution(x, weight, bias, *geometry.arguments())

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        needs_weight = needs_weight and _is_wanted(ctx.next_functions[1][0])
        needs_bias = needs_bias and _is_wanted(ctx.next_functions[2][0])
        if not torch.is_grad_enabled():  # all at once
            sizes = [dy.shape[1]] if needs_bias else None
            mask = [needs_x, needs_weight, needs_bias]
            return *_aten.convolution_backward(dy, x, weight, sizes, *ctx.geometry.arguments(), mask), None
        dx = _Convolution.apply(dy, weight, None, ctx.geometry.adjoint(x, dy, weight)) if needs_x else None
        dweight = _WeightGradient.apply(dy, x, weight, ctx.geometry) if needs_weight else None
        return dx, dweight, dy.sum(dim=(0, 2, 3)) if needs_bias else None, None


class _WeightGradient(torch.autograd.Function):
    """The gradient by the weight, of which only the shape is used."""

    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: _Geometry) -> torch.Tensor:
        ctx.save_for_backward(dy, x)
        ctx.geometry = geometry
        mask = [False, True, False]
        return _aten.convolution_backward(dy, x, weight, None, *geometry.arguments(), mask)[1]

    @staticmethod
    def backward(ctx: Any, ddweight: torch.Tensor) -> tuple[Any, ...]:
        dy, x = ctx.saved_tensors
        needs_dy, needs_x, _, _ = ctx.needs_input_grad
        ddy = _Convolution.apply(x, ddweight, None, ctx.geometry) if needs_dy else None
        dx = _Convolution.apply(dy, ddweight, None, ctx.geometry.adjoint(x, dy, ddweight)) if needs_x else None
        return ddy, dx, None, None


def _is_wanted(node: Any) -> bool:
    """Tell whether the running backward pass goes on to `node`.

    `needs_input_grad` only tells whether the input requires a gradient at all; the first pass of R1 and path length
    asks for the gradient of images or styles and has no use for those of the weights.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it does not answer for a leaf that autograd.grad was asked for: wanted, then
        return True
