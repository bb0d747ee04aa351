"""The ops that the tests on a device call, their operands, and the comparison with float64 arithmetic on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stylepipe.kernels import act_fir, bias_act, native, setup_filter, styled_act, styled_act_rgb, upfirdn2d

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = ("rows", "planes", "unaligned rows")
SHAPES = ((2, 16, 17, 19), (3, 5, 7, 9), (2, 8, 33, 64), (1, 264, 5, 6), (2, 512, 4, 4))
SMALL = (2, 32, 9, 11)
SMALL_CASES = (
    (SMALL, torch.bfloat16, "rows"),
    (SMALL, torch.float32, "rows"),
    (SMALL, torch.float32, "planes"),
    (SMALL, torch.float32, "unaligned rows"),
    ((2, 3, 8, 12), torch.float32, "planes"),  # of whole vectors
)
"""Under these every kernel runs, for the sanitizers, whose work takes long; tests/kernels sees that none is missing."""
LARGE = (2, 128, 256, 257)
"""A level of configuration F at 256 px, where a thread goes several rounds and strips are long."""
FIR = setup_filter([1, 3, 3, 1], separable=True)
LONG = setup_filter(range(1, 13), separable=True)
SKEWED = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 0.5]])

Operands = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """An op as it is called. `grown` says by how much y is larger than x, `operands` what it takes beside x."""

    name: str
    function: Callable[..., Any]
    operands: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    grown: int = 0

    def __call__(self, operands: Operands) -> tuple[Tensor, ...]:
        y = self.function(**operands, **self.on(operands["x"].device).options)
        return y if isinstance(y, tuple) else (y,)

    def on(self, device: torch.device) -> Op:
        """Return the op with its filter on a device."""
        options = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.options.items()}
        return replace(self, options=options)


STYLED = ("scale", "noise", "noise_strength", "bias", "next_scale")
ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")
OPS = (
    *(Op(f"bias_act {act}", bias_act, ("b",), {"act": act}) for act in ACTIVATIONS),
    Op("bias_act clamped", bias_act, ("b",), {"act": "lrelu", "gain": 1.0, "clamp": 1.0}),
    Op("styled_act", styled_act, STYLED),
    Op("styled_act clamped", styled_act, STYLED, {"clamp": 0.7}),
    Op("styled_act swish", styled_act, STYLED, {"act": "swish"}),
    Op("styled_act scale", styled_act, ("scale",), {"act": "linear"}),
    Op("styled_act_rgb", styled_act_rgb, (*STYLED, "rgb_weight"), {"clamp": 0.7}),
    Op("styled_act f", styled_act, STYLED, {"f": FIR, "padding": 1, "filter_gain": 4, "clamp": 0.7}, grown=-1),
    Op("act_fir", act_fir, ("b",), {"f": FIR, "padding": 2, "gain": 1.0, "clamp": 1.0}),
    Op("upfirdn2d 4", upfirdn2d, (), {"f": FIR, "padding": 2}),
    Op("upfirdn2d up", upfirdn2d, (), {"f": FIR, "up": 2, "padding": (2, 1), "gain": 4.0}),
    Op("upfirdn2d down", upfirdn2d, (), {"f": FIR, "down": 2, "padding": 1}),
    Op("upfirdn2d 12", upfirdn2d, (), {"f": LONG, "padding": (6, 5), "flip_filter": True}),
    Op("upfirdn2d 12 up", upfirdn2d, (), {"f": LONG, "up": 2, "padding": (6, 5, 7, 4)}),
    Op("upfirdn2d 12 down", upfirdn2d, (), {"f": LONG, "down": 2, "padding": 6}),
    Op("upfirdn2d any", upfirdn2d, (), {"f": SKEWED, "up": (3, 2), "down": (2, 1), "padding": (-1, 2, 3, 1)}),
)
"""Every kernel runs under one of them, in one of the layouts."""

OPS_WITH_SUMS = tuple(
    op for op in OPS if op.name in ("bias_act lrelu", "styled_act", "styled_act_rgb", "styled_act f", "act_fir")
)

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])


def draw(op: Op, shape: tuple[int, ...]) -> Operands:
    """Draw operands on the CPU, float64.

    They lie on grids, such that what an activation is taken of is exact in float32 and never near one of its kinks,
    where rounding would decide on the gradient. What is added up over an image is mostly positive, so that its terms
    hardly cancel.
    """
    n, c, h, w = shape

    def grid(step: float, *size: int) -> Tensor:
        return (torch.randn(size, dtype=torch.float64) / step).round() * step

    def factors(*size: int) -> Tensor:
        return 2.0 ** torch.randint(-1, 2, size).double()

    drawn = {
        "scale": factors(n, c) * (1 - 2 * torch.randint(0, 2, (n, c))),
        "noise": grid(1 / 2, n, 1, h + op.grown, w + op.grown).abs(),
        "noise_strength": torch.tensor(0.5, dtype=torch.float64),
        "bias": grid(1 / 4, c) + 1 / 256,  # a FIR filter makes the grid finer
        "b": grid(1 / 4, c) + 1 / 8,  # exact in any type
        "next_scale": factors(n, c),
        "rgb_weight": torch.randn(n, 3, c, dtype=torch.float64),
    }
    return {"x": grid(1 / 4, *shape), **{name: drawn[name] for name in op.operands}}


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Return a copy of [N, C, H, W]; `unaligned` starts an element behind the address of an allocation."""
    if layout == "planes":
        return values.clone(memory_format=torch.contiguous_format)
    rows = values.permute(0, 2, 3, 1)
    storage = values.new_empty(values.numel() + 1)
    start = 1 if layout == "unaligned rows" else 0
    place = storage[start : start + values.numel()].view(rows.shape)
    return place.copy_(rows).permute(0, 3, 1, 2)


def placed(operands: Operands, dtype: torch.dtype, device: torch.device, layout: str = "rows") -> Operands:
    """Return operands on a device, x in `dtype` and the others in that of sums; all but the noise get gradients."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    found = {name: tensor.to(device, dtype if name == "x" else real) for name, tensor in operands.items()}
    found["x"] = lay_out(found["x"], layout)
    for name, tensor in found.items():
        tensor.requires_grad_(name != "noise")
    return found


def differentiable(operands: Operands) -> list[Tensor]:
    return [tensor for name, tensor in operands.items() if name != "noise"]


def run(op: Op, operands: Operands, dys: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and the gradients by all operands but the noise; dys default to the outputs."""
    outputs = op(operands)
    dys = [y.detach() for y in outputs] if dys is None else dys
    return list(outputs), list(torch.autograd.grad(outputs, differentiable(operands), dys))


def reference(op: Op, operands: Operands, dys: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return what run() returns, by PyTorch's operations on the CPU in float64."""
    wide = {name: tensor.detach().cpu().double() for name, tensor in operands.items()}
    for name, tensor in wide.items():
        tensor.requires_grad_(name != "noise")
    with native.use(lambda *_: None):
        return run(op, wide, [dy.cpu().double() for dy in dys])


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Compare element by element, relative to the largest."""
    assert found.shape == expected.shape, what
    if expected.numel():
        error = (found.detach().cpu().double() - expected.detach()).abs().max()
        limit = tolerance * expected.detach().abs().max()
        assert error <= limit, f"{what}: off by {error:.3g}, allowed {limit:.3g}"  # NaN is not


def check(op: Op, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str) -> None:
    """Compare outputs and gradients with the reference."""
    operands = placed(draw(op, shape), dtype, device, layout)
    dys = [(0.5 + torch.rand(y.shape)).to(y.dtype) for y in op(operands)]
    outputs, gradients = run(op, operands, [dy.to(device) for dy in dys])
    expected, expected_gradients = reference(op, operands, dys)
    eps = torch.finfo(dtype).eps
    what = f"{op.name} {list(shape)} {dtype} {layout}"
    half = dtype in (torch.float16, torch.bfloat16)
    fused = layout == "rows" and shape[1] % 16 == 0
    # One rounding of what is stored, or one more between two ops; in float32 and float64 also those of the arithmetic.
    rounded = (2 if fused else 4) * eps if half else 32 * eps
    summed = 4 * eps if half and not fused else 256 * torch.finfo(torch.float32 if half else dtype).eps
    for i, (y, y_expected) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(y, y_expected, rounded if i == 0 else summed, f"{what}: output {i}")
    assert outputs[0].dtype == dtype
    kept = torch.contiguous_format if layout == "planes" else torch.channels_last
    assert outputs[0].is_contiguous(memory_format=kept), what
    if half and not fused and op.name == "styled_act f":
        return  # what is filtered has been rounded before its sign is taken
    names = [name for name in operands if name != "noise"]
    for name, gradient, gradient_expected in zip(names, gradients, expected_gradients, strict=True):
        assert gradient.dtype == operands[name].dtype
        assert_close(gradient, gradient_expected, rounded if name == "x" else summed, f"{what}: gradient of {name}")
