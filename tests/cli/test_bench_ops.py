"""`stylepipe bench ops`: what is compared computes the same, the least bytes are counted right, the figures add up."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch

from stylepipe.cli import bench_timing
from stylepipe.cli.bench_cases import CASES, Case, Level, differentiable
from stylepipe.cli.bench_timing import EAGER, OURS, PASSES, PLAIN, time_in_turns
from stylepipe.cli.main import main
from stylepipe.kernels import native
from stylepipe.training.traffic import counting

CPU = torch.device("cpu")
META = torch.device("meta")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@every_case
def test_the_plain_form_computes_what_the_op_does(case: Case, memory_format: torch.memory_format) -> None:
    level = Level(2, 8, 16, torch.float64, memory_format, CPU)
    operands = case.operands(level)
    wanted = [tensor.requires_grad_() for tensor in differentiable(operands)]
    ours, plain = case.op(**operands), case.plain(**operands)
    torch.testing.assert_close(ours, plain)
    gradients = [torch.randn_like(y) for y in plain]
    for one, other in zip(
        torch.autograd.grad(ours, wanted, gradients), torch.autograd.grad(plain, wanted, gradients), strict=True
    ):
        torch.testing.assert_close(one, other)


@every_case
def test_the_least_bytes_are_those_of_one_fused_op(case: Case) -> None:
    """Count what the op itself reads and writes; what it has beside is the operands without pixels."""
    level = Level(4, 32, 256, torch.bfloat16, torch.channels_last, META)
    operands = case.operands(level)
    wanted = [tensor.requires_grad_() for tensor in differentiable(operands)]
    with counting(compiled=True) as counter:
        outputs = case.op(**operands)
        forward = counter.take().passes
        gradients = [torch.empty_like(y) for y in outputs]
        torch.autograd.grad(outputs, wanted, gradients)
        backward = counter.take().passes
    least = case.least(level)
    if case.name == "FIR + styled_act":  # our gradient makes a trip between epilogue and filter, which is no must
        backward -= 2 * level.activations(level.res)
    assert forward == pytest.approx(least.forward, rel=1e-3)
    assert backward == pytest.approx(least.backward, rel=1e-3)


def test_least_bytes_by_hand() -> None:
    """2 images of 4 channels, 8 x 8 pixels, 2 bytes each: 1024 bytes; a plane of noise: 512."""
    level = Level(2, 4, 8, torch.float16, torch.channels_last, META)
    least = {case.name: case.least(level) for case in CASES}
    assert least["bias_act"] == (2 * 1024, 3 * 1024)
    assert least["styled_act"] == (2 * 1024 + 512, 3 * 1024 + 512)
    assert least["styled_act_rgb"] == (2 * 1024 + 4 * 512, 3 * 1024 + 4 * 512)
    grown = 2 * 4 * 9 * 9 * 2
    assert least["FIR + styled_act"] == (grown + 1024 + 512, 2 * grown + 1024 + 512)
    assert least["act_fir"] == (1024 + grown + 128, 1024 + grown + 128)
    assert least["upfirdn2d"] == (1024 + grown, 1024 + grown)
    assert least["upfirdn2d down 2"] == least["upfirdn2d up 2"] == (1024 + 256, 1024 + 256)


def test_the_table_and_the_file_tell_the_same(tmp_path, capsys) -> None:
    path = tmp_path / "ops.json"
    assert main(["bench", "ops", "--quick", "--repeats", "1", "--no-compile", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    figures = json.loads(path.read_text())
    rows = figures["ops"]
    assert [(row["op"], row["pass"]) for row in rows] == [(case.name, name) for case in CASES for name in PASSES]
    printed = [line for line in lines if " x 8 x 16^2 " in line]
    assert len(printed) == len(rows)
    for line, row in zip(printed, rows, strict=True):
        assert line.startswith(row["op"])
        ours = row["seconds"][OURS]
        found = [float(number) for number in re.findall(r"([0-9.]+)[x%]? ", line.split(row["pass"])[1] + " ")]
        host = [] if row["host_seconds"] is None else [1e6 * row["host_seconds"]]
        expected = [1000 * ours, 100 * row["share_of_copy"], *host, *(row["seconds"][k] / ours for k in (EAGER, PLAIN))]
        assert found == pytest.approx(expected, abs=0.51)
        assert row["share_of_copy"] == pytest.approx(row["bytes"] / ours / figures["copy_bytes_per_s"])
    assert lines[-1].startswith("float32 channels_last, copy ")
    assert figures["dtype"] == "float32"
    assert figures["threads"] > 0


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--repeats", "0"], "--repeats 0"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json"),
        (["--res", "33"], "--res 33"),
        (["--res", "65536"], "--res 65536"),
        (["--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    more: list[str], named: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_timing, "time_in_turns", None)
    assert main(["bench", "ops", *more]) == 2
    assert named in capsys.readouterr().err


def test_only_the_eager_form_goes_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: Any = object()
    found = []

    def op(x: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor]:
        found.append(native.library("epilogue", x.dtype, x.device))
        return (x + bias[:, None, None],)

    def one_call_each(calls: dict[str, Any], *_: Any) -> dict[str, float]:
        for name in (OURS, EAGER):
            calls[name][0]()
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(bench_timing, "time_in_turns", one_call_each)
    monkeypatch.setattr(bench_timing, "host_seconds", lambda *_: None)
    case = dataclasses.replace(CASES[0], op=op)
    with native.use(lambda *_: kernels):
        bench_timing.time_case(case, Level(1, 8, 16, torch.float32, torch.channels_last, CPU), 1)
    assert found == [kernels, None] * len(PASSES)


def test_the_host_is_timed_without_launches() -> None:
    class Kernels:
        vector_bytes, threads = 16, 256

        def launch(self, *_: Any) -> None:
            raise AssertionError

    level = Level(1, 8, 16, torch.float32, torch.channels_last, CPU)
    operands = CASES[0].operands(level)
    with native.use(lambda *_: Kernels()):  # type: ignore[arg-type,return-value]
        found = bench_timing.host_seconds([lambda: CASES[0].op(**operands)], torch.float32, CPU)
    assert found is not None
    assert 0 < found < 1
    with native.use(lambda *_: None):
        assert bench_timing.host_seconds([lambda: CASES[0].op(**operands)], torch.float32, CPU) is None


def test_medians_are_per_call_and_rounds_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    done = []

    def takes(seconds: float) -> Any:
        def call() -> None:
            clock[0] += seconds

        return call

    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: clock[0])
    calls = {"two": [takes(1), takes(3)], "one": [takes(5)]}
    assert time_in_turns(calls, 4, CPU, lambda: done.append(1)) == pytest.approx({"two": 2, "one": 5})
    assert len(done) == 5
