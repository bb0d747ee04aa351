"""What the ops compute on a CUDA device, against float64 arithmetic on the CPU; `make gpu-check` runs these.

The host shim has run the same kernels over thousands of drawn cases (tests/kernels). What is left to a device: its
arithmetic, barriers and alignment, and in test_launches_on_gpu.py all that goes around a kernel.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from gpu_ops import (
    LARGE,
    LAYOUTS,
    OPS_WITH_SUMS,
    SHAPES,
    SMALL,
    SMALL_CASES,
    Op,
    check,
    differentiable,
    draw,
    every_op,
    every_type,
    placed,
    run,
)
from torch import Tensor

from stylepipe.kernels import build, native


@every_type
@every_op
@pytest.mark.usefixtures("poison")
def test_outputs_and_gradients_are_those_of_float64_on_the_cpu(
    op: Op, dtype: torch.dtype, device: torch.device
) -> None:
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        check(op, shape, dtype, device, layout)


@every_op
@pytest.mark.usefixtures("poison")
def test_every_kernel_on_a_small_case(op: Op, device: torch.device) -> None:
    """Compute-sanitizer runs these: see test_sanitizers.py."""
    for shape, dtype, layout in SMALL_CASES:
        check(op, shape, dtype, device, layout)


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("op", OPS_WITH_SUMS, ids=lambda op: op.name)
@pytest.mark.usefixtures("poison")
def test_sums_over_as_many_pixels_as_in_training(op: Op, layout: str, device: torch.device) -> None:
    check(op, LARGE, torch.bfloat16, device, layout)


class Counting:
    """Kernels that count their launches."""

    def __init__(self, library: native.Library) -> None:
        self.library, self.launches = library, 0
        self.vector_bytes, self.threads = library.vector_bytes, library.threads

    def launch(self, *arguments: Any) -> None:
        self.launches += 1
        self.library.launch(*arguments)


@every_type
@every_op
def test_kernels_are_what_runs(op: Op, dtype: torch.dtype, device: torch.device) -> None:
    libraries = {}
    for source in sorted(build.CUDA_SOURCES.glob("*.cu")):
        library = native.library(source.stem, dtype, device)
        assert library is not None, native.explain(source.stem, dtype, device)
        libraries[source.stem] = Counting(library)
    operands = placed(draw(op, SMALL), dtype, device)
    with native.use(lambda source, *_: libraries[source]):
        outputs = op(operands)
        forward = sum(library.launches for library in libraries.values())
        torch.autograd.grad(outputs, differentiable(operands), [y.detach() for y in outputs])
    assert forward == 1
    assert sum(library.launches for library in libraries.values()) == (3 if op.name == "styled_act f" else 2)


@every_op
def test_second_derivatives(op: Op, device: torch.device) -> None:
    operands = placed(draw(op, (1, 4, 5, 4)), torch.float64, device)
    names, tensors = zip(*operands.items(), strict=True)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return op(dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, tensors, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(function, tensors, nondet_tol=1e-12)


@pytest.mark.parametrize("shape", [(0, 16, 9, 11), (2, 0, 9, 11)])
@every_op
def test_empty_tensors(op: Op, shape: tuple[int, ...], device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check(op, shape, dtype, device, "planes")


@every_type
@every_op
def test_the_same_input_gives_the_same_bits(op: Op, dtype: torch.dtype, device: torch.device) -> None:
    operands = placed(draw(op, (2, 64, 33, 31)), dtype, device)
    first, second = (run(op, operands) for _ in range(2))
    for one, other in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert torch.equal(one, other)


@every_op
def test_autocast_changes_nothing(op: Op, device: torch.device) -> None:
    for dtype, layout in itertools.product((torch.bfloat16, torch.float32), ("rows", "planes")):
        operands = placed(draw(op, SMALL), dtype, device, layout)
        outputs, gradients = run(op, operands)
        with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
            within = op(operands)
        gradients_within = torch.autograd.grad(within, differentiable(operands), [y.detach() for y in within])
        for one, other in zip(outputs + gradients, within + gradients_within, strict=True):
            assert other.dtype == one.dtype
            assert torch.equal(one, other)


@every_op
def test_compiled_into_one_graph(op: Op, device: torch.device) -> None:
    operands = placed(draw(op, SMALL), torch.float32, device)
    torch.compiler.reset()
    compiled = torch.compile(lambda given: op(given), fullgraph=True, backend="aot_eager", dynamic=False)
    outputs, gradients = run(op, operands)
    outputs_of_compiled = compiled(operands)
    for one, other in zip(outputs, outputs_of_compiled, strict=True):
        torch.testing.assert_close(one, other)
    dys = [y.detach() for y in outputs]
    for one, other in zip(
        gradients, torch.autograd.grad(outputs_of_compiled, differentiable(operands), dys), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
