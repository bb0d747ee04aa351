"""styled_act and styled_act_rgb: derivatives, registrations and refusals. test_shim.py tests their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stylepipe.kernels import native, styled_act, styled_act_rgb

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clamped": {"clamp": 0.8},
    "curved": {"act": "swish"},
    "filtered": {"f": FILTER, "padding": 1, "filter_gain": 4.0},
    "filtered longer": {"f": torch.ones(5) / 5, "padding": 2, "act": "tanh"},
}


def operands(
    n: int = 1, c: int = 4, h: int = 4, w: int = 3, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Tensor]:
    """Draw all operands, channels_last; `options` tell of a filter."""
    grown = 2 * options["padding"] + 1 - options["f"].numel() if "f" in options else 0
    real = torch.float64 if dtype == torch.float64 else torch.float32
    drawn = {
        "x": torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last),
        "scale": torch.rand(n, c, dtype=real) + 0.5,
        "noise": torch.randn(n, 1, h + grown, w + grown, dtype=real),
        "noise_strength": torch.randn((), dtype=real),
        "bias": torch.randn(c, dtype=real),
        "next_scale": torch.rand(n, c, dtype=real) + 0.5,
    }
    return {name: tensor.requires_grad_() for name, tensor in drawn.items()}


def function_of(given: dict[str, Tensor], op: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return op as a function of the operands by their position."""
    return lambda *tensors: op(**dict(zip(given, tensors, strict=True)), **options)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("colours", [0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_first_and_second_derivatives(form: str, colours: int) -> None:
    options = FORMS[form]
    given, op = operands(**options), styled_act
    if colours:
        given["rgb_weight"] = torch.randn(1, colours, 4, dtype=torch.float64, requires_grad=True)
        op = styled_act_rgb  # type: ignore[assignment]
    for constant in ([], ["noise"], ["noise", "bias", "rgb_weight"]):  # kernels make no gradient by noise
        for name, tensor in given.items():
            tensor.requires_grad_(name not in constant)
        inputs = tuple(given.values())
        assert torch.autograd.gradcheck(function_of(given, op, **options), inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function_of(given, op, **options), inputs, fast_mode=True)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("form", ["plain", "curved", "filtered"])
def test_third_derivatives(form: str) -> None:
    options = FORMS[form]
    given = operands(**options)
    given["noise"].requires_grad_(False)
    names = [name for name in given if name != "noise"]

    def second(*tensors: Tensor) -> Any:
        by_name = dict(zip(given, tensors, strict=True))
        y = styled_act(**by_name, **options)
        first = torch.autograd.grad(y.pow(3).sum(), [by_name[name] for name in names], create_graph=True)
        total = sum(gradient.pow(2).sum() for gradient in first)
        return torch.autograd.grad(total, [by_name[name] for name in names], create_graph=True)

    assert torch.autograd.gradcheck(second, tuple(given.values()), fast_mode=True)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(  # kernels make no colours of a contiguous x, and styled_act_rgb does not ask for them
    ("memory_format", "colours"),
    [(torch.contiguous_format, False), (torch.channels_last, True)],
    ids=str,
)
def test_opcheck(memory_format: torch.memory_format, colours: bool) -> None:
    given = operands(2, 4, 5, 6, torch.float32)
    given["noise"].requires_grad_(False)
    x = given["x"].detach().contiguous(memory_format=memory_format).requires_grad_()
    small = [given[name] for name in ("scale", "noise", "noise_strength", "bias", "next_scale")]
    rgb_weight = torch.randn(2, 3, 4, requires_grad=True) if colours else None
    arguments = (x, *small, rgb_weight, None, 0, 1.0, "lrelu", 0.2, 1.4, 0.9)
    torch.library.opcheck(torch.ops.stylepipe.styled_act.default, arguments)
    y, rgb = torch.ops.stylepipe.styled_act(*arguments)
    gradients = (torch.randn_like(y), torch.randn_like(rgb) if colours else None)
    wanted = [True, True, False, True, True, True, colours]
    torch.library.opcheck(torch.ops.stylepipe.styled_act_backward.default, (*gradients, *arguments, wanted))


@pytest.mark.usefixtures("either")
def test_opcheck_with_a_filter() -> None:
    given = operands(2, 4, 5, 6, torch.float32, f=FILTER, padding=1)
    given["noise"].requires_grad_(False)
    arguments = (*given.values(), None, FILTER, 1, 4.0, "lrelu", 0.2, 1.4, 0.9)
    torch.library.opcheck(torch.ops.stylepipe.styled_act.default, arguments)
    y, _ = torch.ops.stylepipe.styled_act(*arguments)
    wanted = [True, True, False, True, True, True, False]
    torch.library.opcheck(
        torch.ops.stylepipe.styled_act_backward.default, (torch.randn_like(y), None, *arguments, wanted)
    )


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("form", ["plain", "filtered"])
def test_compiled_into_one_graph(form: str, colours: bool, either: Any, traced: Any) -> None:
    options = FORMS[form]
    given = operands(2, 8, 6, 5, torch.float32, **options)
    weight = torch.randn(2, 3, 8, requires_grad=True)

    def loss(*tensors: Tensor) -> Tensor:
        if not colours:
            return function_of(given, styled_act, **options)(*tensors).square().sum()
        y, rgb = function_of(given, styled_act_rgb, rgb_weight=weight, **options)(*tensors)
        return y.square().sum() + rgb.square().sum()

    given["noise"].requires_grad_(False)  # kernels make no gradient by it
    inputs = [tensor for name, tensor in given.items() if name != "noise"]
    compiled = torch.compile(loss, fullgraph=True, backend=traced.backend)
    found = torch.autograd.grad(compiled(*given.values()), inputs)
    filters = ["upfirdn2d.default"] if form == "filtered" else []
    if either("epilogue", torch.float32, weight.device) is None:  # the compiler sees all but the filter
        assert (traced.own("forward"), traced.own("backward")) == (filters, filters)
    else:
        apart = filters if colours else []
        assert traced.own("forward") == [*apart, "styled_act.default"]
        assert traced.own("backward") == ["styled_act_backward.default", *apart]
    for one, expected in zip(found, torch.autograd.grad(loss(*given.values()), inputs), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)  # sums of 480 terms, in another order


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    given = operands(2, 8, 6, 5, dtype)
    weight = torch.randn(2, 3, 8)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, rgb = styled_act_rgb(rgb_weight=weight, **given)
        assert y.dtype == dtype
        assert rgb.dtype == torch.float32
        results.append((y, rgb, *torch.autograd.grad(y.float().sum() + rgb.sum(), list(given.values()))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shapes_without_numbers(memory_format: torch.memory_format) -> None:
    given = operands(2, 8, 6, 5, torch.bfloat16, f=FILTER, padding=1)
    given["x"] = given["x"].detach().contiguous(memory_format=memory_format).requires_grad_()
    options = {"rgb_weight": torch.randn(2, 3, 8), "f": FILTER, "padding": 1}
    expected = styled_act_rgb(**given, **options)
    on_meta = styled_act_rgb(
        **{name: t.to("meta") for name, t in (given | options).items() if name != "padding"}, padding=1
    )
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(t) for name, t in (given | options).items() if name != "padding"}
        faked = styled_act_rgb(**fake, padding=1)
    for found in (on_meta, faked):
        for one, real in zip(found, expected, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("colours", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weight_in_half_precision_makes_colours_in_float32(
    dtype: torch.dtype, colours: int, memory_format: torch.memory_format
) -> None:
    x = torch.randn(2, 8, 6, 5).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(2, colours, 8).to(dtype).requires_grad_()
    _, rgb = styled_act_rgb(x, weight)
    with FakeTensorMode() as mode:
        _, faked = styled_act_rgb(mode.from_tensor(x), mode.from_tensor(weight))
    assert rgb.dtype == faked.dtype == torch.float32
    _, expected = styled_act_rgb(x.double(), weight.double())
    torch.testing.assert_close(rgb.double(), expected, rtol=0.01, atol=0.05)  # v may have been rounded
    (gradient,) = torch.autograd.grad(rgb.sum(), weight)
    assert gradient.dtype == dtype


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 0, 4, 4), (2, 8, 0, 4)])
def test_nothing_in_nothing_out(shape: tuple[int, int, int, int]) -> None:
    given = operands(*shape, torch.float32)
    y = styled_act(**given)
    assert y.shape == shape
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), list(given.values())), given.values(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": None}, "noise and noise_strength go together"),
        ({"noise_strength": None}, "noise and noise_strength go together"),
        ({"x": torch.zeros(2, 4, 5)}, r"x of shape \[2, 4, 5\]: expected \[N, C, H, W\]"),
        ({"scale": torch.zeros(1, 4)}, r"scale of shape \[1, 4\]: expected \[2, 4\]"),
        ({"bias": torch.zeros(1)}, r"bias of shape \[1\]: expected \[4\]"),
        ({"next_scale": torch.zeros(4)}, r"next_scale of shape \[4\]: expected \[2, 4\]"),
        ({"noise": torch.zeros(5, 6)}, r"noise of shape \[5, 6\]: expected \[2, 1, 5, 6\] or \[1, 1, 5, 6\]"),
        ({"noise": torch.zeros(2, 1, 1, 6)}, r"noise of shape \[2, 1, 1, 6\]"),
        ({"noise_strength": torch.zeros(1)}, r"noise_strength of shape \[1\]: expected \[\]"),
        ({"rgb_weight": torch.zeros(2, 3, 5)}, r"rgb_weight of shape \[2, 3, 5\]: expected \[2, K, 4\]"),
        ({"f": FILTER}, r"noise of shape \[2, 1, 5, 6\]: expected \[2, 1, 2, 3\]"),
        ({"act": "gelu"}, "act 'gelu': expected one of linear"),
        ({"clamp": -1}, "clamp -1"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    given = operands(2, 4, 5, 6, torch.float32) | {"rgb_weight": torch.zeros(2, 3, 4)} | change
    with pytest.raises(ValueError, match=message):
        styled_act_rgb(**given)


@pytest.mark.parametrize("colours", [False, True])
def test_the_op_without_kernels_is_what_it_stands_for(colours: bool) -> None:
    given = operands(2, 4, 4, 3)
    weight = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) if colours else None
    inputs = (*given.values(), weight) if weight is not None else tuple(given.values())

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        rgb_weight = tensors[6] if colours else None
        y, rgb = torch.ops.stylepipe.styled_act(*tensors[:6], rgb_weight, None, 0, 1.0, "lrelu", 0.2, 1.4, 0.9)
        return (y, rgb) if colours else (y,)

    with native.use(lambda *_: None):
        x, scale, noise, strength, bias, next_scale = given.values()
        u = x * scale[:, :, None, None] + noise * strength + bias[:, None, None]
        v = (1.4 * torch.where(u > 0, u, 0.2 * u)).clamp(-0.9, 0.9)
        y, *rgb = op(*inputs)
        torch.testing.assert_close(y, v * next_scale[:, :, None, None])
        for colour in rgb:
            torch.testing.assert_close(colour, torch.einsum("nchw,nkc->nkhw", v, weight))
        assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(op, inputs, fast_mode=True)


def test_kernels_take_all_of_it(shim: Any) -> None:
    """One forward and one backward launch, and what the transposed filter adds."""
    for form, launches in (("plain", 2), ("filtered", 3)):
        options = FORMS[form]
        given = operands(2, 8, 6, 5, torch.float32, **options)
        given["noise"].requires_grad_(False)
        shim.launched.clear()
        with native.use(shim):
            styled_act(**given, **options).sum().backward()
        assert shim.launched.total() == launches, shim.launched
