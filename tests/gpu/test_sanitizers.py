"""NVIDIA's compute-sanitizer over a small case of every kernel: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASES = "tests/gpu/test_ops_on_gpu.py"
REFUSALS = ("Device not supported", "not supported on this")  # as in some sandboxes and virtual machines


def find_sanitizer() -> str | None:
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{toolkit}/bin" for toolkit in toolkits if toolkit)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_complaint(tool: str, root: Path) -> None:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    pytest_command = [sys.executable, "-m", "pytest", CASES, "-k", "every_kernel_on_a_small_case", "-q", "-x"]
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "66", *pytest_command, "-p", "no:cacheprovider"],
        cwd=root,
        # Without torch's own pool, every tensor is an allocation whose bounds the tool knows.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        check=False,
    )
    if any(refusal in done.stdout for refusal in REFUSALS):
        pytest.skip("compute-sanitizer does not support this device here")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
