"""act_fir: derivatives, registrations and refusals. test_shim.py tests its numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stylepipe.kernels import act_fir, bias_act, native, upfirdn2d

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
OPTIONS = (FILTER, 2, "lrelu", 0.2, 1.4, 0.9)  # of the op itself


def operands(n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    b = torch.randn(c, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x.requires_grad_(), b.requires_grad_()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("options", [{}, {"clamp": 0.8}, {"act": "relu"}, {"act": "swish"}, {"gain": -1.0}], ids=str)
@pytest.mark.parametrize("padding", [1, 2, 3])
def test_first_and_second_derivatives(options: dict[str, Any], padding: int) -> None:
    x, b = operands(1, 4, 4, 5)

    def op(x: Tensor, b: Tensor | None = None) -> Tensor:
        return act_fir(x, b, FILTER, padding, **options)

    for inputs in ((x, b), (x.detach(), b), (x,)):
        assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_third_derivatives(act: str) -> None:
    x, b = operands(1, 4, 4, 5)

    def second(x: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = act_fir(x, b, FILTER, 2, act)
        first = torch.autograd.grad(y.pow(4).sum(), (x, b), create_graph=True)
        return torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), (x, b), create_graph=True)

    assert torch.autograd.gradcheck(second, (x, b), fast_mode=True)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float64))],
    ids=str,
)
def test_opcheck(dtype: torch.dtype) -> None:
    x, b = operands(2, 8, 5, 6, dtype)
    torch.library.opcheck(torch.ops.stylepipe.act_fir.default, (x, b, *OPTIONS))
    y, codes = torch.ops.stylepipe.act_fir(x, b, *OPTIONS)
    dy = torch.randn_like(y).requires_grad_()
    torch.library.opcheck(torch.ops.stylepipe.act_fir_backward.default, (dy, codes, *OPTIONS, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_kernels_and_torch_write_the_same_codes(shim: Any, dtype: torch.dtype) -> None:
    x, b = operands(2, 16, 9, 70, dtype)
    codes = []
    for chooser in (shim, lambda *_: None):
        with native.use(chooser):
            codes.append(torch.ops.stylepipe.act_fir(x, b.to(dtype), *OPTIONS)[1])
    assert shim.launched.total() == 1
    # A 16-bit sum may be rounded to 0 or to the limit.
    assert (codes[0] != codes[1]).double().mean() < (1e-6 if dtype.itemsize > 2 else 0.01)
    # Two bits of each: below 0, above, clamped.
    values = torch.stack([codes[0] >> shift & 3 for shift in range(0, 8, 2)][: 16 // codes[0].shape[-1]])
    assert values.unique().tolist() == [0, 1, 2]


def test_compiled_into_one_graph(either: Any, traced: Any) -> None:
    x, b = operands(2, 8, 6, 5, torch.float32)

    def loss(x: Tensor, b: Tensor) -> Tensor:
        return act_fir(x, b, FILTER, 2, clamp=0.8).square().sum()

    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=traced.backend)(x, b), (x, b))
    there = either("fused_fir", torch.float32, x.device) is not None  # else the compiler sees all but the filter
    assert traced.own("forward") == ["act_fir.default" if there else "upfirdn2d.default"]
    assert traced.own("backward") == ["act_fir_backward.default" if there else "upfirdn2d.default"]
    for one, expected in zip(found, torch.autograd.grad(loss(x, b), (x, b)), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    x, b = operands(2, 8, 6, 5, dtype)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = act_fir(x, b, FILTER, 2)
        assert y.dtype == dtype
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, b))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.usefixtures("either")
def test_shapes_without_numbers() -> None:
    x, b = operands(2, 8, 6, 5, torch.bfloat16)
    y = act_fir(x, b, FILTER, 2)
    on_meta = act_fir(x.to("meta"), b.to("meta"), FILTER.to("meta"), 2)
    with FakeTensorMode() as mode:
        faked = act_fir(mode.from_tensor(x), mode.from_tensor(b), mode.from_tensor(FILTER), 2)
    for found in (on_meta, faked):
        assert (found.shape, found.dtype, found.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, int, int, int]) -> None:
    x, b = operands(*shape, torch.float32)
    y = act_fir(x, b, FILTER, 2)
    assert y.shape == (*shape[:2], 5, 5)
    dx, db = torch.autograd.grad(y.sum(), (x, b))
    assert dx.shape == shape
    assert torch.equal(db, torch.zeros_like(b))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"x of shape \[2, 4\]: expected \[N, C, H, W\]"),
        ({"b": torch.zeros(3)}, r"b of shape \[3\]: expected \[4\]"),
        ({"f": torch.zeros(0)}, r"filter of shape \[0\]"),
        ({"padding": 0, "x": torch.zeros(1, 4, 2, 2)}, "pad more"),
        ({"act": "gelu"}, "act 'gelu': expected one of linear"),
        ({"clamp": -1}, "clamp -1"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    x, b = operands(2, 4, 5, 6, torch.float32)
    with pytest.raises(ValueError, match=message):
        act_fir(**{"x": x, "b": b, "f": FILTER, "padding": 2} | change)


def test_the_op_without_kernels_is_what_it_stands_for() -> None:
    x, b = operands(2, 4, 4, 5)

    def op(x: Tensor, b: Tensor) -> Tensor:
        return torch.ops.stylepipe.act_fir(x, b, *OPTIONS)[0]

    with native.use(lambda *_: None):
        expected = upfirdn2d(bias_act(x, b, act="lrelu", gain=1.4, clamp=0.9), FILTER, padding=2)
        torch.testing.assert_close(op(x, b), expected)
        assert torch.autograd.gradcheck(op, (x, b), fast_mode=True)
        assert torch.autograd.gradgradcheck(op, (x, b), fast_mode=True)
