"""Counting the bytes that operations move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from stylepipe.kernels import act_fir, bias_act, conv2d, setup_filter, styled_act, upfirdn2d
from stylepipe.training.traffic import Traffic, counting

X = 2 * 8 * 4 * 4 * 4  # bytes of x
FILTER = setup_filter([1, 3, 3, 1], separable=True).to("meta")


def x() -> torch.Tensor:
    return torch.empty(2, 8, 4, 4, device="meta", memory_format=torch.channels_last)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def passes(function: Callable[[], object], *, compiled: bool = True) -> float:
    with counting(compiled=compiled) as counter:
        function()
    return counter.take().passes


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a: a + 1, 2 * X),
        (lambda a: a + a, 2 * X),  # one input, though it comes twice
        (lambda a: a * meta(8, 1, 1), 2 * X + 8 * 4),
        (lambda a: a + meta(1).expand(2, 8, 4, 4), 2 * X + 4),
        (lambda a: a.add_(1), 2 * X),
        (lambda a: a.zero_(), X),
        (lambda a: a.copy_(x()), 2 * X),
        (lambda a: torch.zeros_like(a), X),
        (lambda a: a.bfloat16(), X + X // 2),
        (lambda a: a.sum(), X + 4),
        (lambda a: torch.empty_like(a), 0),
        (lambda a: a.permute(0, 2, 3, 1).flatten(1, 2)[0, :2].detach(), 0),
        (lambda a: torch.stack([a, a]).unbind(), 3 * X),
    ],
)
def test_an_operation_reads_each_input_and_writes_each_output_once(
    function: Callable[[torch.Tensor], object], expected: int
) -> None:
    a = x()
    assert passes(lambda: function(a)) == expected


def test_convolutions_are_told_apart_and_keep_the_layout() -> None:
    weight = meta(8, 8, 3, 3).requires_grad_()
    size = 8 * 8 * 9 * 4
    with counting(compiled=True) as counter:
        y = conv2d(x(), weight, padding=1)
        assert counter.take() == Traffic(convolutions=2 * X + size)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.autograd.grad(y, weight, x())
        assert counter.take() == Traffic(convolutions=2 * X + 2 * size)


def test_with_kernels_an_op_is_one_pass() -> None:
    b, scale, next_scale = meta(8), meta(2, 8), meta(2, 8)
    assert passes(lambda: bias_act(x(), b, act="lrelu")) == 2 * X + 8 * 4
    assert passes(lambda: styled_act(x(), scale, bias=b, next_scale=next_scale)) == 2 * X + (8 + 2 * 16) * 4
    assert passes(lambda: upfirdn2d(x(), FILTER, padding=2)) == X + X * 25 // 16 + 4 * 4
    assert passes(lambda: act_fir(x(), b, FILTER, 2)) == X + X * 25 // 16 + X // 16 + (8 + 4) * 4


def test_without_kernels_its_parts_are_counted() -> None:
    b = meta(8)
    gain_times_bias, sum_with_x, activation_in_place = 2 * 8 * 4, 2 * X + 8 * 4, 2 * X
    found = passes(lambda: bias_act(x(), b, act="lrelu"), compiled=False)
    assert found == gain_times_bias + sum_with_x + activation_in_place


def test_a_convolution_within_an_op_is_a_pass() -> None:
    outer, flip, read = 2 * 4 * 4 + 16 * 4, 2 * 16 * 4, 16 * 4  # of the filter
    found = passes(lambda: upfirdn2d(x(), FILTER, padding=2), compiled=False)
    assert found == outer + flip + read + X + X * 25 // 16
    assert passes(lambda: F.conv2d(x(), meta(8, 1, 4, 4), padding=2, groups=8), compiled=False) == 0


def test_the_gradient_behind_a_fused_filter_makes_a_trip_of_its_own() -> None:
    a, scale = x().requires_grad_(), meta(2, 8)
    with counting(compiled=True) as counter:
        y = styled_act(a, scale, f=FILTER, padding=2)
        counter.take()
        torch.autograd.grad(y, a, torch.empty_like(y))
    dy = X * 25 // 16
    assert counter.take().passes == dy + X + X + 2 * dy + (2 * 8 + 4) * 4
