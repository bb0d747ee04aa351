"""Every unit compiles for every GPU architecture that is sold, and no kernel takes more of it than it should.

    python tests/kernels/test_architectures.py [sm_90]

prints the registers and shared memory of all kernels, the table of docs/performance.md.
"""

from __future__ import annotations

import re
import sys

import pytest

from stylepipe.kernels import build, nvcc, nvrtc
from stylepipe.kernels.build import Unit

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "compute_120")
MOST_REGISTERS = {"float64": 255}  # all that a thread can have; each of its numbers takes two
MOST_REGISTERS_ELSE = 128  # two blocks of 256 threads on a multiprocessor
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
        assert one.registers <= MOST_REGISTERS.get(scalar, MOST_REGISTERS_ELSE), (name, one)
        assert one.shared_bytes <= MOST_SHARED_BYTES, (name, one)
        if name not in CALLING:
            assert one.spill_store_bytes == one.spill_load_bytes == 0, (name, one)
            assert one.stack_bytes == 0, (name, one)  # arrays that are not in registers


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
