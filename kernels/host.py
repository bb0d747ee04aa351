"""Launching kernels that were compiled for the CPU."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

_Dim3 = ctypes.c_uint * 3

MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
MAX_BLOCK_THREADS = 1024
"""What every GPU can launch: CUDA Programming Guide, "Compute Capabilities"."""


class SharedObject:
    """A shared object of kernels: `void name(const unsigned grid[3], const unsigned block[3], const void* params)`.

    Args:
        path: the file.
        native: it holds CPU kernels (gxx.native()), whose blocks are one thread; else those of a GPU (gxx.host_shim()).

    Raises:
        OSError: the file cannot be loaded.
    """

    def __init__(self, path: Path, *, native: bool = False) -> None:
        self.path = path
        self._native = native
        # Of GPU kernels: VECTOR_BYTES of cuda/common.cuh, THREADS of cuda/sums.cuh.
        self.vector_bytes, self.threads = (1, 1) if native else (16, 256)
        self._library = ctypes.CDLL(str(path))
        self._kernels: dict[str, Any] = {}

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        params: ctypes.Structure,
        stream: int = 0,
    ) -> None:
        """Run all blocks of a kernel and return when they are done; `stream` means nothing here.

        Raises:
            RuntimeError: there is no such kernel, it takes parameters of another size, or no GPU would launch so much.
        """
        if not (self._native or _fits_a_gpu(grid, block)):
            raise RuntimeError(f"{self.path}: {kernel}, grid {grid}, block {block}: beyond what CUDA launches")
        function = self._kernels.get(kernel)
        if function is None:
            function = self._look_up(kernel, params)
        function(_Dim3(*grid), _Dim3(*block), ctypes.addressof(params))

    def _look_up(self, kernel: str, params: ctypes.Structure) -> Any:
        try:
            function = getattr(self._library, kernel)
        except AttributeError as error:
            raise RuntimeError(f"{self.path}: no kernel {kernel}") from error
        size = getattr(self._library, f"{kernel}_params_bytes", None)
        if size is not None and size() != ctypes.sizeof(params):
            raise RuntimeError(
                f"{self.path}: kernel {kernel} takes {size()} bytes of parameters, {type(params).__name__} has "
                f"{ctypes.sizeof(params)}"
            )
        function.argtypes, function.restype = [_Dim3, _Dim3, ctypes.c_void_p], None
        self._kernels[kernel] = function
        return function


def _fits_a_gpu(grid: tuple[int, int, int], block: tuple[int, int, int]) -> bool:
    """Tell whether the driver would take this grid and block, none of which may be empty."""
    sizes = zip((*grid, *block), (*MAX_GRID, *MAX_BLOCK), strict=True)
    return all(1 <= size <= most for size, most in sizes) and math.prod(block) <= MAX_BLOCK_THREADS
