"""Every unit compiles for every GPU architecture that is sold, and no kernel takes more of it than it should.

    python tests/kernels/test_architectures.py [sm_90]

prints the registers and shared memory of all kernels, the table of docs/performance.md.
"""

from __future__ import annotations

import math
import re
import shutil
import sys
from pathlib import Path

import pytest

from stylepipe.kernels import build, nvcc, nvrtc
from stylepipe.kernels.build import Unit

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "compute_120")
# Registers in types of up to 32 bits. With 64, 80 and 128 a multiprocessor holds four, three and two blocks of 256
# threads; above 80, the number is what a kernel took when it was written, and a little more. The compiler cannot pass
# 128 (the launch bounds): kernels near to that, and all of float64, are held by the absence of spills alone.
MOST_REGISTERS = {
    r"epilogue_(backward_)?(curved_)?(rows|planes)_single": 64,
    r"epilogue_(curved_|backward_curved_)?planes_vector": 80,
    r"epilogue_(curved_)?rows_vector": 96,
    r"epilogue_backward_(curved_)?rows_vector": 104,
    r"upfirdn2d_general": 48,
    r"upfirdn2d_planes_\d_\d_(4|12)": 64,
    r"upfirdn2d_rows_single_\d_\d_4": 64,
    r"upfirdn2d_rows_single_\d_\d_12": 104,
    r"upfirdn2d_rows_vector_2_1_4": 112,
}
MOST_SHARED_BYTES = 48 * 1024  # without asking for more at launch
CALLING = {"upfirdn2d_general"}  # calls functions that divide 64-bit numbers, for which it sets registers aside
SOURCES = sorted(source.stem for source in build.CUDA_SOURCES.glob("*.cu"))

EVERY = [
    pytest.param(target, scalar, marks=[] if (target, scalar) == ("sm_90", "float16") else pytest.mark.slow)
    for target in TARGETS
    for scalar in build.SCALARS
]


def unit_of(source: str, scalar: str) -> Unit:
    return Unit(build.CUDA_SOURCES / f"{source}.cu", scalar)


def kernel_names(unit: Unit) -> set[str]:
    """Return the kernels of a source."""
    return set(re.findall(r"^(?:COOPERATIVE_)?KERNEL\((\w+),", unit.source.read_text(), re.MULTILINE))


def budget(kernel: str) -> float:
    """Return the most registers that a kernel may take."""
    return next((most for pattern, most in MOST_REGISTERS.items() if re.fullmatch(pattern, kernel)), math.inf)


def check_image(image: bytes, unit: Unit, target: str) -> None:
    form = "{}" if target.startswith("sm_") else ".entry {}("
    assert kernel_names(unit)
    for name in kernel_names(unit):
        assert form.format(name).encode() in image, name


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("target", "scalar"), EVERY)
def test_nvcc_compiles_every_unit_within_limits(source: str, target: str, scalar: str, the_nvcc: nvcc.Nvcc) -> None:
    unit = unit_of(source, scalar)
    if target.startswith("compute_"):
        check_image(the_nvcc.compile(unit, target), unit, target)
        return
    usage = the_nvcc.usage(unit, target)
    assert set(usage) == kernel_names(unit)
    for name, one in usage.items():
        if scalar != "float64":
            assert one.registers <= budget(name), (name, one)
        assert one.shared_bytes <= MOST_SHARED_BYTES, (name, one)
        if name not in CALLING:
            assert one.spill_store_bytes == one.spill_load_bytes == 0, (name, one)
            assert one.stack_bytes == 0, (name, one)  # arrays that are not in registers


@pytest.mark.slow
def test_a_kernel_that_takes_more_registers_is_found(tmp_path: Path, the_nvcc: nvcc.Nvcc) -> None:
    folder = shutil.copytree(build.CUDA_SOURCES, tmp_path / "cuda")
    source = folder / "epilogue.cu"
    source.write_text(source.read_text().replace("int IN_FLIGHT = 4;", "int IN_FLIGHT = 8;"))
    usage = the_nvcc.usage(Unit(source, "bfloat16"), "sm_90")
    assert usage["epilogue_rows_vector"].registers > budget("epilogue_rows_vector")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("target", "scalar"), EVERY)
def test_nvrtc_compiles_every_unit(source: str, target: str, scalar: str, the_nvrtc: nvrtc.Nvrtc) -> None:
    unit = unit_of(source, scalar)
    check_image(the_nvrtc.compile(unit, target), unit, target)


def usage_table(target: str) -> str:
    """Return a table in Markdown: registers and bytes of shared memory of each kernel, by scalar type."""
    compiler = nvcc.find_nvcc()
    lines = [f"| kernel ({target}) | {' | '.join(build.SCALARS)} |", f"| --- |{' --- |' * len(build.SCALARS)}"]
    for source in SOURCES:
        by_scalar = [compiler.usage(unit_of(source, scalar), target) for scalar in build.SCALARS]
        for name in sorted(by_scalar[0]):
            cells = (f"{usage[name].registers}, {usage[name].shared_bytes}" for usage in by_scalar)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(usage_table(sys.argv[1] if len(sys.argv) > 1 else "sm_90"))
