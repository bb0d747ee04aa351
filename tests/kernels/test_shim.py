"""Every kernel against float64 arithmetic, over drawn cases, and whether these cases would find a broken one.

drawn_cases.py says what is drawn and what a result may be off by.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from drawn_cases import TYPES, Report, run_cases
from shim_kernels import Kernels, kernel_names

from stylepipe.kernels import bias_act, build, cache, gxx, native

SCRIPT = Path(__file__).with_name("drawn_cases.py")
QUICK_CASES = 300
SLOW_CASES = 2500  # of each type
CHECKED_CASES = 250  # under sanitizers


@pytest.fixture(autouse=True)
def _shared_cache(compiled_folder: Path, monkeypatch: pytest.MonkeyPatch, cxx: tuple[str, ...]) -> Iterator[None]:
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(compiled_folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small, threads cost more than they save
    yield
    torch.set_num_threads(threads)


def tell(report: Report, kernels: Kernels, record_property: Callable[[str, object], None]) -> None:
    """Show what was found, with pytest -rP or --junit-xml."""
    figures: dict[str, object] = {"cases": report.cases, "launches": kernels.launched.total()}
    for name, value in (figures | report.worst).items():
        record_property(name, value)
    worst = ", ".join(f"{name} {error:.2f}" for name, error in sorted(report.worst.items()))
    print(f"{report.cases} cases, {kernels.launched.total()} launches; worst error in eps: {worst}")


def test_drawn_cases(record_property) -> None:
    kernels = Kernels()
    report = run_cases(kernels, QUICK_CASES)
    tell(report, kernels, record_property)
    assert not report.wrong
    assert {name for name, _ in kernels.launched} == kernel_names()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_thousands_of_drawn_cases(dtype: torch.dtype, record_property) -> None:
    kernels = Kernels()
    report = run_cases(kernels, SLOW_CASES, seed=1, types=[dtype])
    tell(report, kernels, record_property)
    assert not report.wrong
    assert set(kernels.launched) == {(name, native.SCALAR_OF[dtype]) for name in kernel_names()}


def test_drawn_cases_of_the_cpu_s_own_kernels(record_property) -> None:
    # Only some operands are theirs; the rest is PyTorch's, whose sums of 16-bit numbers are less exact than compared.
    kernels = Kernels("native")
    report = run_cases(kernels, QUICK_CASES // 2, types=[torch.float32, torch.float64])
    tell(report, kernels, record_property)
    assert not report.wrong
    exported = re.findall(r"^CPU_KERNEL\((\w+),", (build.CPU_SOURCES / "epilogue.cpp").read_text(), re.MULTILINE)
    assert {name for name, _ in kernels.launched} == set(exported)


# --- single values ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_numbers_of_every_kind_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    with native.use(Kernels()):
        for gain in (1.0, 0.3, 1e-3, 7e4):
            torch.testing.assert_close(
                bias_act(x, gain=gain), (x.float() * gain).to(dtype), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("clamp", [None, 2.0])
@pytest.mark.parametrize("act", ["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"])
def test_nan_and_infinity_go_the_way_they_go_in_torch(act: str, clamp: float | None, dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0, 30.0, -30.0], dtype=dtype)
    with native.use(Kernels()):
        found = bias_act(x, act=act, clamp=clamp)
    with native.use(lambda *_: None):
        expected = bias_act(x, act=act, clamp=clamp)
    torch.testing.assert_close(found, expected, equal_nan=True)


# --- under sanitizers ---


def preloaded(compiler: gxx.HostCompiler) -> str:
    """Return AddressSanitizer's library, which must be loaded before all others; skip where there is none."""
    if compiler.name != "g++":
        pytest.skip(f"{compiler.name} links its sanitizers into programs only; needs g++")
    said = subprocess.run(
        [*compiler.command, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    )
    path = Path(said.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"{compiler.command[0]} came without AddressSanitizer")
    return str(path.resolve())


def run_checked(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run cases under AddressSanitizer and UndefinedBehaviorSanitizer in a process of their own."""
    environment = {
        **os.environ,
        "LD_PRELOAD": preloaded(gxx.host_shim()),
        "OMP_NUM_THREADS": "1",
        # Python leaks at its end; threads of the shim have stacks that the sanitizer does not know.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, str(SCRIPT), "--sanitize", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shim", "native"])
def test_drawn_cases_under_sanitizers(kind: str, record_property) -> None:
    types = list(build.SCALARS) if kind == "shim" else ["float32", "float64"]
    done = run_checked("--kind", kind, "--cases", str(CHECKED_CASES), "--seed", "2", "--types", *types)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    record_property("cases", found["cases"])
    record_property("launches", found["launches"])
    print(f"{found['cases']} cases, {found['launches']} launches")
    assert found["cases"] == CHECKED_CASES
    assert found["launches"] > CHECKED_CASES / 4
    assert not found["wrong"]


# --- broken kernels ---


class Break(NamedTuple):
    """One change to a source that makes a kernel wrong."""

    file: str
    text: str
    instead: str
    op: str
    dtype: str = "float32"
    nth: int = 0

    def copy_to(self, folder: Path) -> Path:
        """Copy all sources, and change the nth place with that text."""
        shutil.copytree(build.CUDA_SOURCES, folder)
        source = folder / self.file
        parts = source.read_text().split(self.text)
        assert len(parts) > self.nth + 1, f"{self.file} no longer holds {self.text!r}"
        place = self.nth + 1
        source.write_text(self.text.join(parts[:place]) + self.instead + self.text.join(parts[place:]))
        return folder


BARRIER = "    __syncthreads();\n"
FIRST_ROUNDS = "pixel < smaller(at.last, at.first + 4 * blockDim.y); pixel += PAIRS"
FIVE_LINES = "step < smaller(at.line_end, at.line + 5) -"
WRONG = {
    "no barrier behind a tile": Break("upfirdn2d.cu", BARRIER, "", "upfirdn2d"),
    "no barrier behind filtered rows": Break("upfirdn2d.cu", BARRIER, "", "upfirdn2d", nth=1),
    "no barrier in a sum over rows": Break("sums.cuh", BARRIER, "", "bias_act"),
    "no barrier in a sum over columns": Break("epilogue.cu", f"    {BARRIER}    }}\n", "    }\n", "bias_act", nth=1),
    "no barrier before colours": Break("epilogue.cu", f"{BARRIER}        // Shares", "// Shares", "styled_act"),
    "no barrier behind a sum over rows": Break("sums.cuh", BARRIER, "", "styled_act", nth=1),
    "no barrier behind colours": Break("epilogue.cu", f"{BARRIER}    }}\n}}", "    }\n}", "styled_act"),
    "rounds that skip every other": Break("epilogue.cu", "pixel += IN_FLIGHT", "pixel += 2 * IN_FLIGHT", "styled_act"),
    "rounds that end early": Break("epilogue.cu", "pixel < at.last; pixel += PAIRS", FIRST_ROUNDS, "styled_act"),
    "a strip that ends after five lines": Break("fir_rows.cuh", "step < at.line_end -", FIVE_LINES, "upfirdn2d"),
    "a tile that begins a row late": Break("upfirdn2d.cu", "(out_y, p.pad_y);", "(out_y, p.pad_y) + 1;", "upfirdn2d"),
    "taps off by one": Break("fir_rows.cuh", "f[F::across(j, e)]", "f[(F::across(j, e) + 1) % TAPS]", "upfirdn2d"),
    "a strip that ends early": Break("fir_rows.cuh", "line_end = smaller(", "line_end = smaller(-1 + ", "act_fir"),
    "taps in the other order": Break("fir_rows.cuh", "[p.flip_filter", "[!p.flip_filter", "act_fir"),
    "no clamp": Break("channel.cuh", "clamped ? copysign(clamp, a) : a", "a", "bias_act"),
    "a slope beyond the clamp": Break("channel.cuh", "clamped ? Real(0) : slope", "slope", "bias_act"),
    "noise of the first image": Break("channel.cuh", "image * of.noise_stride + pixel", "pixel", "styled_act"),
    "a gradient left out": Break("channel.cuh", "sums.bias[i] += du;", "sums.bias[i] += i ? du : 0;", "styled_act"),
    "codes in the other order": Break("fused_fir.cu", "<< 2 * i;", "<< 2 * (VECTOR - 1 - i);", "act_fir"),
    "half precision rounded down": Break("host_shim.h", "0xfff + ((bits >> 13) & 1)", "0", "bias_act", "float16"),
}


def test_a_source_that_is_whole_passes_where_broken_ones_fail(tmp_path: Path) -> None:
    folder = Break("sums.cuh", BARRIER, BARRIER, "").copy_to(tmp_path / "cuda")
    assert not run_cases(Kernels(sources=folder), 20, types=[torch.float32], ops=["bias_act"]).wrong


@pytest.mark.slow
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_broken_kernel_is_found(change: Break, tmp_path: Path) -> None:
    kernels = Kernels(sources=change.copy_to(tmp_path / "cuda"))
    report = run_cases(kernels, 100, types=[getattr(torch, change.dtype)], ops=[change.op])
    print(f"{len(report.wrong)} of {report.cases} cases")
    assert report.wrong


THREADS_GO = "at(p, V);\n    if (!at.active) return;\n    ChannelSums"
UNSAFE = {  # all of these give the right results
    "a load beyond the end": (
        Break("epilogue.cu", "at.last - 1);  // the last again", "at.last);  // the last again", "bias_act"),
        "heap-buffer-overflow",
    ),
    "a store beyond the end": (
        Break("sums.cuh", "if (active) to[i] = sum;", "if (active) to[i + 1] = to[i] = sum;", "bias_act"),
        "heap-buffer-overflow",
    ),
    "too little shared memory": (
        Break("epilogue.cu", "SHARED Real scratch[THREADS];", "SHARED Real scratch[THREADS / 4];", "bias_act"),
        "insufficient space",
    ),
    "threads that miss a barrier": (
        Break("epilogue.cu", "at(p, V);\n    ChannelSums", THREADS_GO, "bias_act"),
        "threads of a block wait at a barrier",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), UNSAFE.values(), ids=UNSAFE)
def test_an_unsafe_kernel_is_found(change: Break, message: str, tmp_path: Path) -> None:
    folder = change.copy_to(tmp_path / "cuda")
    done = run_checked("--sources", str(folder), "--cases", "60", "--types", change.dtype, "--ops", change.op)
    assert done.returncode != 0
    assert message in done.stderr
