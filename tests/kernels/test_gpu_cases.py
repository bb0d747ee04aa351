"""The cases that a device is tested with: they reach every kernel, and are right as far as a CPU can tell."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from shim_kernels import Kernels, kernel_names

from stylepipe.kernels import native

sys.path.append(str(Path(__file__).parents[1] / "gpu"))

from gpu_ops import OPS, SMALL_CASES, check

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_cases_of_the_sanitizers_run_every_kernel(shim: Kernels) -> None:
    with native.use(shim):
        for op in OPS:
            for shape, dtype, layout in SMALL_CASES:
                check(op, shape, dtype, CPU, layout)
    assert {name for name, _ in shim.launched} == kernel_names()
