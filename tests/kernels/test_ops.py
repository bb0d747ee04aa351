"""The ops against golden numbers, against a slow definition, and against torch's own checkers."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stylepipe import kernels
from stylepipe.kernels import _activations, _operands, build, native

GOLDEN = Path(__file__).parents[1] / "golden" / "ops.npz"
TOLERANCE = 1e-10  # of the file: float64, relative L2
ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


CASES = json.loads(str(golden()["cases"]))


def assert_close(found: torch.Tensor, expected: np.ndarray) -> None:
    error = np.linalg.norm(found.detach().numpy() - expected)
    assert error <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_outputs_and_gradients(case: dict[str, Any], memory_format: torch.memory_format) -> None:
    arrays = golden()
    name = case["name"]
    options = {key: value for key, value in case.items() if key != "name"}
    x = torch.from_numpy(arrays[f"{name}.x"])
    if x.ndim == 4:
        x = x.contiguous(memory_format=memory_format)
    x.requires_grad_()
    op = getattr(kernels, name.split(".")[0])
    second = torch.from_numpy(arrays[f"{name}.b"]).requires_grad_() if f"{name}.b" in arrays else None
    y = op(x, torch.from_numpy(arrays[f"{name}.f"]) if second is None else second, **options)
    assert_close(y, arrays[f"{name}.y"])
    if f"{name}.dy" in arrays:
        y.backward(torch.from_numpy(arrays[f"{name}.dy"]))
        assert_close(x.grad, arrays[f"{name}.gx"])
    if second is not None:
        assert_close(second.grad, arrays[f"{name}.gb"])


# --- upfirdn2d ---


def upfirdn2d_by_definition(x, f, up, down, padding, flip_filter, gain):
    """Insert zeros, pad, convolve, decimate: each step as written in the op's description."""
    (upx, upy), (downx, downy), (x0, x1, y0, y1) = up, down, padding
    n, c, h, w = x.shape
    zeros = x.new_zeros(n, c, h * upy, w * upx)
    zeros[:, :, ::upy, ::upx] = x
    zeros = F.pad(zeros, [max(p, 0) for p in padding])
    zeros = zeros[:, :, max(-y0, 0) : zeros.shape[2] - max(-y1, 0), max(-x0, 0) : zeros.shape[3] - max(-x1, 0)]
    f = f if f.ndim == 2 else torch.outer(f, f)
    f = (f if flip_filter else f.flip([0, 1])).to(x.dtype) * gain
    rows, columns = zeros.shape[2] - f.shape[0] + 1, zeros.shape[3] - f.shape[1] + 1
    y = sum(zeros[:, :, i : i + rows, j : j + columns] * f[i, j] for i in range(f.shape[0]) for j in range(f.shape[1]))
    return y[:, :, ::downy, ::downx]


def test_upfirdn2d_is_its_definition_for_drawn_cases() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    tried = 0
    while tried < 200:
        up, down = rng.integers(1, 4, 2).tolist(), rng.integers(1, 4, 2).tolist()
        padding = rng.integers(-3, 7, 4).tolist()
        taps = rng.integers(1, 7, rng.integers(1, 3)).tolist()
        h, w = rng.integers(1, 9, 2).tolist()
        if h * up[1] + sum(padding[2:]) < taps[0] or w * up[0] + sum(padding[:2]) < taps[-1]:
            continue
        x, f = torch.randn(2, 3, h, w, dtype=torch.float64), torch.randn(taps)
        if tried % 2:
            x = x.contiguous(memory_format=torch.channels_last)
        flip = bool(rng.integers(2))
        found = kernels.upfirdn2d(x, f, up, down, padding, flip, 1.5)
        expected = upfirdn2d_by_definition(x, f.double(), up, down, padding, flip, 1.5)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        tried += 1


RESAMPLERS = {
    "up": {"up": 2, "padding": [2, 1, 2, 1], "gain": 4.0},
    "down": {"down": 2, "padding": 1},
    "same": {"padding": 2},
    "crop": {"up": [2, 1], "down": [1, 2], "padding": [-1, 2, 3, -2], "flip_filter": True},
}


@pytest.mark.parametrize("options", RESAMPLERS.values(), ids=RESAMPLERS)
@pytest.mark.parametrize("taps", [[1.0, 3.0, 3.0, 2.0], [[1.0, 2.0, 4.0], [3.0, 1.0, 0.5]]], ids=["1d", "2d"])
def test_upfirdn2d_gradients_of_any_order(options: dict[str, Any], taps: list) -> None:
    f = torch.tensor(taps)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)

    def op(x):
        return kernels.upfirdn2d(x, f, **options)

    assert torch.autograd.gradcheck(op, x)
    assert torch.autograd.gradgradcheck(op, x)
    # The op is linear: only a nonlinear function of it has a third derivative to check.
    assert torch.autograd.gradgradcheck(lambda x: torch.autograd.grad(op(x).pow(4).sum(), x, create_graph=True)[0], x)


@pytest.mark.parametrize("options", RESAMPLERS.values(), ids=RESAMPLERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_upfirdn2d_types_and_formats(options, memory_format, dtype) -> None:
    f = kernels.setup_filter([1, 3, 3, 1])
    x = torch.randn(2, 8, 12, 10).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    y = kernels.upfirdn2d(x, f, **options)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    expected = kernels.upfirdn2d(x.detach().double(), f, **options)
    # Half a unit in the last place of the output, and the rounding of 16 products.
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    y.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = kernels.upfirdn2d(x, torch.ones(4, 4), up=2, padding=(2, 1, 2, 1))
    assert y.shape == (*shape[:2], 16, 16)
    z = kernels.bias_act(y, torch.ones(shape[1]), act="lrelu")
    z.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": [1, 2, 3]}, "padding"),
        ({"up": 0}, "up 0"),
        ({"padding": -3}, "pad more"),
    ],
)
def test_upfirdn2d_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.upfirdn2d(torch.zeros(1, 1, 5, 5), torch.ones(3, 3), **options)


# --- filters ---


def test_resampling_keeps_a_constant_image_away_from_the_border() -> None:
    f = kernels.setup_filter([1, 3, 3, 1])
    x = torch.ones(1, 1, 8, 8)
    for y, size in (
        (kernels.upsample2d(x, f), 16), (kernels.downsample2d(x, f), 4), (kernels.filter2d(x, f), 8),
    ):  # fmt: skip
        assert y.shape[2:] == (size, size)
        torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones_like(y[:, :, 2:-2, 2:-2]))


def test_setup_filter_keeps_taps_separable_unless_told_otherwise() -> None:
    short = kernels.setup_filter([1, 3, 3, 1], separable=False)
    assert short.shape == (4, 4)
    assert short.dtype == torch.float32
    torch.testing.assert_close(short[0], torch.tensor([1, 3, 3, 1]) / 64)
    taps = kernels.setup_filter(range(1, 13), gain=4)
    assert taps.shape == (12,)
    torch.testing.assert_close(taps.sum(), torch.tensor(2.0))  # applied twice: the image gains 4
    assert kernels.setup_filter(2).shape == (1,)
    torch.testing.assert_close(kernels.setup_filter([1, 2], flip_filter=True), torch.tensor([2, 1]) / 3)
    torch.testing.assert_close(kernels.setup_filter([[1.0, 2.0]], normalize=False), torch.tensor([[1.0, 2.0]]))
    with pytest.raises(ValueError, match="separable"):
        kernels.setup_filter([[1.0, 2.0]], separable=True)
    with pytest.raises(ValueError, match=r"gain -1: expected 0 or more"):
        kernels.setup_filter([1, 2], gain=-1)
    assert kernels.setup_filter([1, 2], gain=-1, separable=False).sum() == -1


def test_separable_and_whole_filters_give_the_same(either) -> None:
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    separable, whole = (kernels.setup_filter([1, 3, 2], gain=3, separable=separable) for separable in (True, False))
    for resample in (kernels.upsample2d, kernels.downsample2d, kernels.filter2d):
        torch.testing.assert_close(resample(x, separable), resample(x, whole), rtol=1e-6, atol=1e-6)


def test_the_usual_call_runs_a_tiled_kernel(shim) -> None:
    x = torch.randn(2, 8, 8, 6).contiguous(memory_format=torch.channels_last)
    with native.use(shim):
        kernels.upsample2d(x, kernels.setup_filter([1, 3, 3, 1]))
    assert [name for name, _ in shim.launched] == ["upfirdn2d_rows_vector_2_1_4"]


# --- bias_act ---


@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("gain", [None, -0.5])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_gradients_of_any_order(act: str, gain: float | None, clamp: float | None) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def op(x, b):
        return kernels.bias_act(x, b, act=act, gain=gain, clamp=clamp)

    assert torch.autograd.gradcheck(op, (x, b))
    assert torch.autograd.gradgradcheck(op, (x, b))

    def second(x, b):
        (first,) = torch.autograd.grad(op(x, b).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), (x, b), create_graph=True)

    assert torch.autograd.gradcheck(second, (x, b))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_types_and_formats(act: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 4).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    b = torch.randn(3, requires_grad=True)  # a master weight: float32 beside any activation
    y = kernels.bias_act(x, b, act=act, clamp=2)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    expected = kernels.bias_act(x.detach().double(), b.detach().to(dtype).double(), act=act, clamp=2)
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.is_contiguous(memory_format=memory_format)
    assert b.grad.dtype == torch.float32


def test_bias_act_never_returns_its_input() -> None:
    x = torch.randn(4, 3)
    for act, b in itertools.product(("linear", "relu", "lrelu"), (None, torch.zeros(3))):
        before = x.clone()
        kernels.bias_act(x, b, act=act, gain=1).add_(1)
        assert torch.equal(x, before)


def test_bias_runs_along_the_dimension_asked_for() -> None:
    x, b = torch.randn(2, 3, 4), torch.randn(4)
    torch.testing.assert_close(kernels.bias_act(x, b, dim=-1), x + b)
    with pytest.raises(ValueError, match=r"expected \[3\]"):
        kernels.bias_act(x, b)


@pytest.mark.parametrize(("options", "message"), [({"act": "gelu"}, "lrelu"), ({"clamp": -1}, "clamp -1")])
def test_bias_act_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.bias_act(torch.zeros(2, 2), **options)


# --- registrations ---


def test_opcheck() -> None:
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    b = torch.randn(3, requires_grad=True)
    f = kernels.setup_filter([1, 3, 3, 1])
    for layout in (x, x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        torch.library.opcheck(
            torch.ops.stylepipe.upfirdn2d.default, (layout, f, [2, 1], [1, 2], [2, 1, -1, 3], False, 4.0)
        )
        for act in ("lrelu", "swish"):
            torch.library.opcheck(torch.ops.stylepipe.bias_act.default, (layout, b, 1, act, 0.2, 1.4, 0.5))
            torch.library.opcheck(
                torch.ops.stylepipe.bias_act_backward.default,
                (torch.randn_like(layout), layout, b, 1, act, 0.2, 1.4, 0.5, True),
            )


def test_ops_compile_into_one_graph_and_give_the_same_gradients(either, traced) -> None:
    f = kernels.setup_filter([1, 3, 3, 1])

    def layer(x, b):
        return kernels.bias_act(kernels.upsample2d(x, f), b, act="lrelu", clamp=2)

    x, b = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend=traced.backend, dynamic=True)
    for found, expected in zip(
        torch.autograd.grad(compiled(x, b).square().sum(), (x, b)),
        torch.autograd.grad(layer(x, b).square().sum(), (x, b)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    there = either("epilogue", torch.float32, x.device) is not None
    assert traced.own("forward") == ["upfirdn2d.default", *(["bias_act.default"] if there else [])]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_compiler_is_given_the_parts_where_there_are_no_kernels(act: str, traced) -> None:
    x, b = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(3, requires_grad=True)

    def op(x, b):
        return kernels.bias_act(x, b, act=act, clamp=0.8)

    with native.use(lambda *_: None):
        found, expected = torch.compile(op, fullgraph=True, backend=traced.backend)(x, b), op(x, b)
        assert traced.own("forward") == traced.own("backward") == []
        torch.testing.assert_close(found, expected)
        for one, other in zip(*(torch.autograd.grad(y.square().sum(), (x, b)) for y in (found, expected)), strict=True):
            torch.testing.assert_close(one, other)


def test_ops_give_shapes_on_the_meta_device() -> None:
    x = torch.empty(2, 3, 6, 5, device="meta").contiguous(memory_format=torch.channels_last)
    y = kernels.upsample2d(x, torch.empty(4, 4, device="meta"))
    assert y.shape == (2, 3, 12, 10)
    assert kernels.bias_act(y, act="swish").is_contiguous(memory_format=torch.channels_last)


# --- what kernels and PyTorch must agree on at the edges ---


def test_nothing_passes_a_slope_of_zero_not_even_infinity(either) -> None:
    x = torch.tensor([5.0, -5.0, 0.5]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = kernels.bias_act(x, act="relu", gain=1, clamp=1)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, torch.inf))
    assert dx[0, :, 0, 0].tolist() == [0, 0, torch.inf]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_bias_gradient_of_many_half_precision_numbers_keeps_its_range(either, memory_format) -> None:
    x = torch.zeros(1, 8, 320, 320, dtype=torch.float16).contiguous(memory_format=memory_format)
    b = torch.ones(8, requires_grad=True)
    kernels.bias_act(x, b, act="lrelu", gain=1).sum(dtype=torch.float32).backward()
    assert b.grad.tolist() == [320 * 320] * 8  # above 65504


def test_a_tall_narrow_image_stays_within_the_grid(shim) -> None:
    f = kernels.setup_filter([1, 3, 3, 1], separable=True)
    x = torch.randn(1, 4, 300_000, 1).contiguous(memory_format=torch.channels_last)
    with native.use(shim):
        found = kernels.upfirdn2d(x, f, padding=2)
    with native.use(lambda *_: None):
        torch.testing.assert_close(found, kernels.upfirdn2d(x, f, padding=2))


def test_activations_have_one_order() -> None:
    source = (build.CUDA_SOURCES / "common.cuh").read_text()
    (names,) = re.findall(r"enum Activation \{ (.*?) \};", source)
    assert tuple(names.lower().split(", ")) == _operands.ACTIVATIONS == tuple(_activations.ACTIVATIONS) == ACTIVATIONS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["upfirdn2d", *ACTIVATIONS])
def test_autocast_changes_nothing(either, op: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 6, 5).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    b, f = torch.randn(8, requires_grad=True), kernels.setup_filter([1, 3, 3, 1])
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = kernels.upfirdn2d(x, f, padding=2) if op == "upfirdn2d" else kernels.bias_act(x, b, act=op)
            gradients = torch.autograd.grad(y.float().square().sum(), [x] if op == "upfirdn2d" else [x, b])
        assert y.dtype == gradients[0].dtype == dtype
        results.append((y, *gradients))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_integers_and_operands_elsewhere_are_refused() -> None:
    x, f = torch.ones(1, 8, 4, 4), kernels.setup_filter([1, 3, 3, 1])
    integers = x.int()
    for op in (
        lambda: kernels.upfirdn2d(integers, f, padding=2),
        lambda: kernels.bias_act(integers),
        lambda: kernels.styled_act(integers),
        lambda: kernels.act_fir(integers, None, f),
    ):
        with pytest.raises(ValueError, match="expected a floating type"):
            op()
    elsewhere = torch.ones(8, device="meta")
    for op in (
        lambda: kernels.bias_act(x, elsewhere),
        lambda: kernels.styled_act(x, bias=elsewhere),
        lambda: kernels.act_fir(x, elsewhere, f),
        lambda: kernels.upfirdn2d(x, f.to("meta"), padding=2),
        lambda: kernels.styled_act(x, f=f.to("meta"), padding=2),
        lambda: kernels.act_fir(x, None, f.to("meta"), padding=2),
    ):
        with pytest.raises(ValueError, match="on meta: expected it on cpu"):
            op()
