"""The kernels of a folder, compiled for the CPU and put under the ops, with every launch counted and checked."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from stylepipe.kernels import build, gxx, native
from stylepipe.kernels.host import SharedObject


def kernel_names(folder: Path = build.CUDA_SOURCES) -> set[str]:
    """Return the names of all kernels in the sources."""
    pattern = re.compile(r"^(?:COOPERATIVE_)?KERNEL\((\w+),", re.MULTILINE)
    return {name for source in folder.glob("*.cu") for name in pattern.findall(source.read_text())}


class Recorder:
    """A library of kernels that counts launches, and refuses those that a GPU would refuse, or that fault there."""

    def __init__(self, library: SharedObject, scalar: str, launched: Counter[tuple[str, str]]) -> None:
        self.vector_bytes, self.threads = library.vector_bytes, library.threads
        self._library, self._scalar, self._launched = library, scalar, launched

    def launch(self, kernel: str, grid: Any, block: Any, params: ctypes.Structure, stream: int = 0) -> None:
        assert min(*grid, *block) > 0, (kernel, grid, block)
        assert math.prod(block) <= self.threads, (kernel, block)
        assert grid[0] < 2**31, (kernel, grid)
        assert max(grid[1:]) < 2**16, (kernel, grid)
        if self.threads > 1:
            self._check_alignment(kernel, params)
        self._launched[kernel, self._scalar] += 1
        self._library.launch(kernel, grid, block, params, stream)

    def _check_alignment(self, kernel: str, params: ctypes.Structure) -> None:
        if "_vector" in kernel or kernel.startswith(("fir_epilogue", "act_fir")):
            names = ("x", "y", "ref", "dy", "dx")
        elif "_planes_" in kernel and getattr(params, "aligned", False):
            names = ("x",)
        else:
            return
        for of in (params, getattr(params, "fir", None)):
            for name in names:
                address = getattr(of, name, None) or 0
                assert address % self.vector_bytes == 0, f"{kernel}: {name} is not aligned to its vectors"


class Kernels:
    """What native.use() takes: the kernels of a folder, compiled for the CPU.

    Args:
        kind: `shim`, the GPU's kernels; `native`, the CPU's own.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.
        sources: the folder `cuda` or `cpu`, other than ours.
    """

    def __init__(self, kind: str = "shim", *, sanitize: bool = False, sources: Path | None = None) -> None:
        self.launched: Counter[tuple[str, str]] = Counter()
        self.native = kind == "native"
        self._folder = sources or (build.CPU_SOURCES if self.native else build.CUDA_SOURCES)
        self._compiler = gxx.native() if self.native else gxx.host_shim(("address", "undefined") if sanitize else ())
        if self.native and sanitize:
            checks = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
            self._compiler = dataclasses.replace(self._compiler, options=(*self._compiler.options, *checks))
        self._libraries: dict[tuple[str, torch.dtype], Recorder | None] = {}

    def __call__(self, source: str, dtype: torch.dtype, device: torch.device) -> Recorder | None:
        key = source, dtype
        if key not in self._libraries:
            self._libraries[key] = self._load(source, native.SCALAR_OF[dtype])
        return self._libraries[key]

    def _load(self, source: str, scalar: str) -> Recorder | None:
        path = self._folder / f"{source}.{'cpp' if self.native else 'cu'}"
        if not path.is_file():
            return None
        target = gxx.native_target() if self.native else gxx.HOST_TARGET
        library = SharedObject(build.cached_path(build.Unit(path, scalar), target, self._compiler), native=self.native)
        return Recorder(library, scalar, self.launched)


def in_torch(*_: Any) -> None:
    """Choose PyTorch's operations; for native.use()."""
