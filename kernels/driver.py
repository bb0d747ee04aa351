"""Launching kernels on a GPU through the CUDA driver, libcuda.so.1, as torch does beneath its own kernels.

torch has initialised the driver before a tensor is on a device, so nothing is initialised here. A launch only calls
cuLaunchKernel: it neither waits nor allocates on the device, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_Handle = ctypes.c_void_p
_Argument = ctypes.c_void_p * 1

_SIGNATURES: dict[str, list[Any]] = {
    "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_Handle), ctypes.c_int],
    "cuCtxGetCurrent": [ctypes.POINTER(_Handle)],
    "cuCtxPushCurrent_v2": [_Handle],
    "cuCtxPopCurrent_v2": [ctypes.POINTER(_Handle)],
    "cuLibraryLoadData": [ctypes.POINTER(_Handle), ctypes.c_char_p, *(_Handle, _Handle, ctypes.c_uint) * 2],
    "cuLibraryGetKernel": [ctypes.POINTER(_Handle), _Handle, ctypes.c_char_p],
    "cuLaunchKernel": [_Handle, *(ctypes.c_uint,) * 7, _Handle, _Argument, _Handle],
}


class Driver:
    """The functions of the driver's library that launching needs.

    Raises:
        RuntimeError: there is no such library, or it is older than CUDA 12.
    """

    def __init__(self, path: str = "libcuda.so.1") -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(f"the CUDA driver cannot be loaded ({error}); install NVIDIA's driver") from error
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError as error:
                raise RuntimeError(f"the CUDA driver has no {name}; install a driver of CUDA 12 or newer") from error
            function.argtypes, function.restype = arguments, ctypes.c_int
        self.launch_kernel = self._library.cuLaunchKernel  # these two at hand, for they are called at every launch
        self.get_current_context = self._library.cuCtxGetCurrent
        # Tells the size of a kernel's parameters; drivers before CUDA 12.4 do not.
        self.get_param_info = getattr(self._library, "cuKernelGetParamInfo", None)

    def call(self, name: str, *arguments: Any, about: str = "") -> None:
        """Call a function of the driver; raise RuntimeError with the driver's own words where it fails."""
        self.check(getattr(self._library, name)(*arguments), f"{name}{about}")

    def check(self, result: int, what: str) -> None:
        """Raise RuntimeError if the result is an error."""
        if result != 0:
            name, text = (self._ask(question, result) for question in ("cuGetErrorName", "cuGetErrorString"))
            raise RuntimeError(f"{what}: {name}: {text}")

    def _ask(self, name: str, result: int) -> str:
        text = ctypes.c_char_p()
        getattr(self._library, name)(result, ctypes.byref(text))
        return text.value.decode() if text.value else f"error {result}"


@functools.cache
def default_driver() -> Driver:
    """Return the system's driver, loaded once."""
    return Driver()


class Cubin:
    """A compiled unit (machine code, or PTX ended by a NUL) on one device."""

    vector_bytes, threads = 16, 256  # VECTOR_BYTES of cuda/common.cuh, THREADS of cuda/sums.cuh

    def __init__(self, image: bytes, device: int = 0, driver: Driver | None = None) -> None:
        self._driver = driver or default_driver()
        self._library = _Handle()
        self._driver.call("cuLibraryLoadData", ctypes.byref(self._library), image, None, None, 0, None, None, 0)
        self._context = _Handle()  # torch's own; its counter of users only grows, as torch never lets go of it either
        self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._kernels: dict[str, int] = {}

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        params: ctypes.Structure,
        stream: int = 0,
    ) -> None:
        """Launch a kernel with these parameters, which may go once this returns, on a stream of the device.

        Raises:
            RuntimeError: the driver refused, or the kernel takes parameters of another size.
        """
        function = self._kernels.get(kernel)
        if function is None:
            function = self._look_up(kernel, params)
        arguments = (function, *grid, *block, 0, stream, _Argument(ctypes.addressof(params)), None)
        if stream:  # a stream knows its device
            result = self._driver.launch_kernel(*arguments)
        else:
            result = self._launch_in_context(arguments)
        if result:
            self._driver.check(result, f"cuLaunchKernel of {kernel}, grid {grid}, block {block}")

    def _launch_in_context(self, arguments: tuple[Any, ...]) -> int:
        """Launch on the default stream, which is the current context's: perhaps another device's, or there is none."""
        current = _Handle()
        self._driver.get_current_context(ctypes.byref(current))
        if current.value == self._context.value:
            return self._driver.launch_kernel(*arguments)
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            return self._driver.launch_kernel(*arguments)
        finally:
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(current))

    def _look_up(self, kernel: str, params: ctypes.Structure) -> int:
        handle = _Handle()
        about = f" of {kernel}"
        self._driver.call("cuLibraryGetKernel", ctypes.byref(handle), self._library, kernel.encode(), about=about)
        if self._driver.get_param_info is not None:
            offset, size = ctypes.c_size_t(), ctypes.c_size_t()
            result = self._driver.get_param_info(handle, ctypes.c_size_t(0), ctypes.byref(offset), ctypes.byref(size))
            self._driver.check(result, f"cuKernelGetParamInfo of {kernel}")
            if size.value != ctypes.sizeof(params):
                raise RuntimeError(
                    f"kernel {kernel} takes {size.value} bytes of parameters, {type(params).__name__} has "
                    f"{ctypes.sizeof(params)}"
                )
        assert handle.value is not None
        self._kernels[kernel] = handle.value
        return handle.value
