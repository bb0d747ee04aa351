"""conv2d is torch's convolution, with derivatives of every order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stylepipe.kernels import conv2d

GEOMETRIES = {
    "3x3": ({"padding": 1}, 3),
    "1x1": ({}, 1),
    "strided, even input": ({"stride": 2}, 3),
    "transposed": ({"stride": 2, "transposed": True}, 3),
    "transposed, stride 1": ({"padding": 1, "transposed": True}, 3),
}


def operands(kernel: int, transposed: bool, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shape = (3, 2, kernel, kernel) if transposed else (2, 3, kernel, kernel)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((2, 3, 6, 5), shape, (2,))]


@pytest.mark.parametrize(("options", "kernel"), GEOMETRIES.values(), ids=GEOMETRIES)
def test_derivatives_of_first_second_and_third_order(options: dict, kernel: int) -> None:
    x, weight, bias = operands(kernel, options.get("transposed", False))
    native = {key: value for key, value in options.items() if key != "transposed"}
    torch_op = F.conv_transpose2d if "transposed" in options else F.conv2d
    torch.testing.assert_close(conv2d(x, weight, bias, **options), torch_op(x, weight, bias, **native))

    def op(x, weight, bias):
        return conv2d(x, weight, bias, **options)

    assert torch.autograd.gradcheck(op, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (x, weight, bias), fast_mode=True)

    def second(x, weight, bias):
        first = torch.autograd.grad(op(x, weight, bias).pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, weight, bias), create_graph=True)

    assert torch.autograd.gradcheck(second, (x, weight, bias), fast_mode=True)


def test_the_first_pass_of_a_gradient_penalty_computes_no_weight_gradient() -> None:
    x, weight, bias = operands(3, transposed=False)
    calls: list[list[bool]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution_backward.default:
                calls.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Record():
        y = conv2d(x, weight * 2, bias * 2, padding=1).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        assert not calls  # by x alone: a convolution
        dx.square().sum().backward()
    assert any(mask[1] for mask in calls)
    assert weight.grad is not None


def test_the_gradient_of_a_leaf_weight_can_be_asked_for_alone() -> None:
    x, weight, bias = operands(3, transposed=False)
    for create_graph in (False, True):
        (found,) = torch.autograd.grad(conv2d(x, weight, bias).sum(), weight, create_graph=create_graph)
        (expected,) = torch.autograd.grad(F.conv2d(x, weight, bias).sum(), weight)
        torch.testing.assert_close(found, expected)


def test_it_compiles_into_one_graph() -> None:
    x, weight, bias = operands(3, transposed=False)
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias, stride=2), F.conv2d(x, weight, bias, stride=2))
