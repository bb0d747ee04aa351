"""What the tests of compiled kernels share: a cache of their own, and a small kernel in every form."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from stylepipe.kernels import build, cache, gxx, native, nvcc, nvrtc

sys.path.append(str(Path(__file__).parent))  # for shim_kernels; pytest's importlib mode leaves it out

if TYPE_CHECKING:
    from shim_kernels import Kernels

SCALE_CU = """
#include "common.cuh"
struct ScaleParams { const Scalar* x; Scalar* y; int64 count; float gain; };
KERNEL(scale, ScaleParams, 64) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < p.count) narrow(Real(p.gain) * widen(p.x[i]), p.y[i]);
}
"""


class ScaleParams(ctypes.Structure):
    """The parameters of the kernel `scale`: y = gain * x."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("count", ctypes.c_longlong),
        ("gain", ctypes.c_float),
    )


@pytest.fixture
def scale_params() -> type[ScaleParams]:
    """Give the parameters of the kernel `scale`."""
    return ScaleParams


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give an empty cache folder, and forget what was chosen and warned of before and after."""
    folder = tmp_path / "kernel-cache"
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(folder))
    monkeypatch.setattr(cache, "_warned", set())
    native.forget()
    yield folder
    native.forget()


@pytest.fixture
def cxx() -> tuple[str, ...]:
    """Give the command of the C++ compiler, or skip."""
    try:
        return gxx.host_shim().command
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def the_nvcc() -> nvcc.Nvcc:
    """Give nvcc, or skip."""
    try:
        return nvcc.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def the_nvrtc() -> nvrtc.Nvrtc:
    """Give NVRTC, or skip."""
    try:
        return nvrtc.find_nvrtc()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def sources(tmp_path: Path, cxx: tuple[str, ...]) -> Path:
    """Give a folder with the source of the kernel `scale`, and our own headers beside it."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    for header in ("common.cuh", "host_shim.h"):
        shutil.copy(build.CUDA_SOURCES / header, folder)
    (folder / "scale.cu").write_text(SCALE_CU)
    return folder


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder for compiled kernels that all workers of a session share."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled-kernels"


@pytest.fixture
def shim(compiled_folder: Path, monkeypatch: pytest.MonkeyPatch, cxx: tuple[str, ...]) -> Kernels:
    """Give the GPU's kernels, compiled for the CPU, for native.use()."""
    from shim_kernels import Kernels

    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(compiled_folder))
    return Kernels()


class TracedGraphs:
    """A backend of torch.compile that runs what it is given, and keeps the names of the ops in it."""

    def __init__(self) -> None:
        self.ops: dict[str, list[str]] = {"forward": [], "backward": []}
        self.backend = aot_autograd(
            fw_compiler=lambda graph, _: self._keep("forward", graph),
            bw_compiler=lambda graph, _: self._keep("backward", graph),
        )

    def _keep(self, direction: str, graph: torch.fx.GraphModule) -> Any:
        self.ops[direction] += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return make_boxed_func(graph.forward)

    def own(self, direction: str) -> list[str]:
        """Return the ops of ours, without their namespace."""
        return [op.removeprefix("stylepipe.") for op in self.ops[direction] if op.startswith("stylepipe.")]


@pytest.fixture
def traced() -> Iterator[TracedGraphs]:
    """Give a backend of torch.compile that keeps what it was given."""
    torch.compiler.reset()  # what it holds of another test was made for other kernels
    yield TracedGraphs()
    torch.compiler.reset()


@pytest.fixture(params=["torch", "shim"])
def either(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Put PyTorch's operations or the GPU's kernels under the ops."""
    chooser = request.getfixturevalue("shim") if request.param == "shim" else lambda *_: None
    with native.use(chooser):
        yield chooser
