"""Streams, graphs, devices, large tensors, and which implementation runs; `make gpu-check` runs these."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_ops import OPS, SMALL, Op, check, draw, every_op, placed, run

from stylepipe.errors import UserError
from stylepipe.kernels import build, native
from stylepipe.kernels.build import BuildError, Unit
from stylepipe.kernels.cache import FOLDER_VARIABLE, read_entry
from stylepipe.kernels.driver import Cubin
from stylepipe.kernels.nvcc import find_nvcc
from stylepipe.kernels.nvrtc import find_nvrtc


@every_op
def test_work_goes_to_the_current_stream(op: Op, device: torch.device) -> None:
    op, operands = op.on(device), placed(draw(op, SMALL), torch.float32, device)  # a copy of a filter would wait
    outputs, gradients = run(op, operands)  # also builds the kernels
    late = {name: torch.full_like(tensor, float("nan")) for name, tensor in operands.items()}
    for name, tensor in late.items():
        tensor.requires_grad_(name != "noise")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        with torch.no_grad():
            for name, tensor in late.items():
                tensor.copy_(operands[name])
        found, found_gradients = run(op, late, [y.detach() for y in outputs])
        torch.cuda.current_stream().synchronize()
    for one, other in zip(outputs + gradients, found + found_gradients, strict=True):
        assert torch.equal(one, other)


@every_op
def test_a_captured_graph_replays_on_new_input(op: Op, device: torch.device) -> None:
    op, operands = op.on(device), placed(draw(op, SMALL), torch.bfloat16, device)
    outputs, _ = run(op, operands)
    dys = [torch.randn_like(y) for y in outputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(op, operands, dys)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_gradients = run(op, operands, dys)
    for _ in range(2):
        with torch.no_grad():
            for name, values in placed(draw(op, SMALL), torch.bfloat16, device).items():
                operands[name].copy_(values)
            for dy in dys:
                dy.normal_()
        graph.replay()
        found, gradients = run(op, operands, dys)
        for one, other in zip(found + gradients, captured + captured_gradients, strict=True):
            assert torch.equal(one, other)


@every_op
def test_nothing_waits_for_the_device(op: Op, device: torch.device) -> None:
    operands = placed(draw(op, SMALL), torch.bfloat16, device)
    op = op.on(device)
    run(op, operands)  # builds the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op, operands)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_another_device_than_the_current_one(op: Op, device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    operands = placed(draw(op, SMALL), torch.float32, device)
    outputs, gradients = run(op, operands)
    found, found_gradients = run(op, placed(operands, torch.float32, torch.device("cuda", 1)))
    for one, other in zip(outputs + gradients, found + found_gradients, strict=True):
        assert other.device.index == 1
        torch.testing.assert_close(one, other.to(device))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "planes") for name in ("bias_act lrelu", "styled_act", "upfirdn2d 4")),
        *((name, "rows") for name in ("bias_act lrelu", "styled_act", "styled_act_rgb", "styled_act f")),
        *((name, "rows") for name in ("act_fir", "upfirdn2d 4")),
    ],
)
def test_more_than_2_to_the_31_elements(name: str, layout: str, device: torch.device) -> None:
    """The last pixels of the last image are those of a crop of it."""
    size, crop, compared = 4097, 16, 8
    if torch.cuda.mem_get_info(device)[0] < 2**35:
        pytest.skip("needs 32 GiB of free GPU memory")
    op = next(op for op in OPS if op.name == name)
    memory_format = torch.channels_last if layout == "rows" else torch.contiguous_format
    corner = placed(draw(op, (1, 64, crop, crop)), torch.float16, device, layout)
    x = torch.empty((2, 64, size, size), dtype=torch.float16, device=device, memory_format=memory_format)
    assert x.numel() > 2**31
    x.normal_()[1:, :, -crop:, -crop:] = corner["x"].detach()
    operands = {name: torch.cat([tensor, tensor]) if tensor.ndim > 1 else tensor for name, tensor in corner.items()}
    if "noise" in operands:
        side = size + op.grown
        noise = torch.zeros(2, 1, side, side, device=device)
        noise[1:, :, -crop - op.grown :, -crop - op.grown :] = corner["noise"]
        operands["noise"] = noise
    operands = {name: tensor.detach() for name, tensor in operands.items()} | {"x": x.requires_grad_()}
    outputs, expected = op(operands), op(corner)
    (dx,) = torch.autograd.grad(outputs[0], x, outputs[0].detach())
    (dx_expected,) = torch.autograd.grad(expected[0], corner["x"], expected[0].detach())
    for found, of_corner in ((outputs[0], expected[0]), (dx, dx_expected)):
        ends = [tensor.detach()[-1:, :, -compared:, -compared:] for tensor in (found, of_corner)]
        torch.testing.assert_close(*ends)
        assert found[0, 0, 0, 0].isfinite()


# --- which implementation ---


@pytest.mark.parametrize(("mode", "there"), [("torch", False), ("cuda", True), ("auto", True)])
@pytest.mark.usefixtures("forget")
def test_the_variable_decides(mode: str, there: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, mode)
    for source in sorted(build.CUDA_SOURCES.glob("*.cu")):
        assert (native.library(source.stem, torch.float16, device) is not None) == there


@pytest.mark.usefixtures("forget")
def test_without_any_compiler(device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch's operations take over after one warning; STYLEPIPE_KERNELS=cuda refuses."""

    def missing() -> build.Compiler:
        raise BuildError("no compiler found")

    missing.cache_clear = lambda: None  # type: ignore[attr-defined]
    for name in ("find_nvrtc", "find_nvcc"):
        monkeypatch.setattr(native, name, missing)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(native.VARIABLE, "cuda")
    with pytest.raises(UserError, match="STYLEPIPE_KERNELS=cuda: no compiler found"):
        native.library("epilogue", torch.float32, device)
    monkeypatch.setenv(native.VARIABLE, "auto")
    native.forget()
    with pytest.warns(RuntimeWarning, match="no CUDA kernels: no compiler found"):
        native.library("epilogue", torch.float32, device)
    for op in OPS:  # without a second warning
        check(op, SMALL, torch.float32, device, "planes")


@every_op
def test_nvrtc_and_nvcc_make_the_same(op: Op, device: torch.device, both_builds: dict[str, Any]) -> None:
    for dtype in (torch.float16, torch.float32):
        operands = placed(draw(op, (2, 32, 17, 19)), dtype, device)
        results = []
        for libraries in both_builds.values():
            with native.use(lambda source, of, _, libraries=libraries: libraries[source, of]):  # type: ignore[misc]
                results.append(list(itertools.chain(*run(op, operands))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=4 * torch.finfo(one.dtype).eps, atol=1e-5)


@pytest.fixture(scope="module")
def both_builds() -> dict[str, Any]:
    """Give all kernels of two types by each of the compilers, or skip where one is missing."""
    index = torch.cuda.current_device()
    builds: dict[str, Any] = {}
    for find in (find_nvrtc, find_nvcc):
        try:
            compiler = find()
            builds[compiler.name] = {
                (unit.source.stem, getattr(torch, unit.scalar)): Cubin(_built_by(compiler, unit, index), index)
                for unit in build.units(scalars=("float16", "float32"))
            }
        except BuildError as error:
            pytest.skip(str(error))
    return builds


def _built_by(compiler: Any, unit: Unit, index: int) -> bytes:
    """Return what this very compiler makes: the cache would give another's as well."""
    target = compiler.target(native.capability_of(torch.device("cuda", index)))
    return read_entry(build.entry_path(unit, target, compiler)) or compiler.compile(unit, target)
