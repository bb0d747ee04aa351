"""Compiling kernels with NVRTC, the compiler that comes with every CUDA build of torch: no nvcc, no C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from stylepipe.errors import UserError
from stylepipe.kernels.build import BuildError, Unit, device_flags, target_for
from stylepipe.kernels.cache import write_entry

LIBRARY_VARIABLE = "STYLEPIPE_NVRTC"
"""Names the library's file, where it is in none of the usual places (or not the one to use)."""

_log = logging.getLogger(__name__)


class Nvrtc:
    """An NVRTC library.

    Raises:
        OSError: the file cannot be loaded.
        BuildError: it is older than CUDA 11.2.
    """

    name = "nvrtc"

    def __init__(self, path: str) -> None:
        self.path = path
        # It looks for its built-in functions by file name alone, which fails outside of the loader's own folders.
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins*.so*")):
            if ".alt." not in builtins.name:
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(path)
        if not hasattr(self._library, "nvrtcGetSupportedArchs"):
            raise BuildError(f"{path} is too old: expected NVRTC of CUDA 11.2 or newer")
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        self.supported = self._supported()

    def target(self, capability: int) -> str:
        """Return what to compile for a device; its compute capability 9.0 is 90.

        A device newer than the library gets PTX, which its driver translates.
        """
        return target_for(capability, self.supported, f"NVRTC {self.version}", "install a torch of an older CUDA")

    def flags(self, unit: Unit, target: str) -> list[str]:
        """Return the flags of all GPU compilers."""
        return device_flags(unit)

    def compile(self, unit: Unit, target: str) -> bytes:
        """Return machine code, or PTX ended by a NUL. Headers are passed from memory, so that no path matters."""
        headers = [path for path in unit.inputs() if path.suffix in (".cuh", ".h")]
        contents = _strings(path.read_bytes() for path in headers)
        names = _strings(path.name.encode() for path in headers)
        program = ctypes.c_void_p()
        source = unit.source.read_bytes(), unit.source.name.encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), *source, len(headers), contents, names)
        try:
            options = [*self.flags(unit, target), f"--gpu-architecture={target}"]
            arguments = len(options), _strings(option.encode() for option in options)
            if self._library.nvrtcCompileProgram(program, *arguments) != 0:
                log = self._output("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
                raise BuildError(f"NVRTC {self.version} failed to compile {unit.name} for {target}", options, log)
            return self._output("nvrtcGetCUBIN" if target.startswith("sm_") else "nvrtcGetPTX", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _output(self, name: str, program: ctypes.c_void_p) -> bytes:
        """Call a pair of functions that tell a size and fill a buffer, such as nvrtcGetCUBINSize and nvrtcGetCUBIN."""
        size = ctypes.c_size_t()
        self._call(f"{name}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(name, program, buffer)
        return buffer.raw

    def _supported(self) -> list[int]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        return list(archs)

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            raise BuildError(f"{name}: {self._library.nvrtcGetErrorString(result).decode()}")


@functools.cache
def find_nvrtc() -> Nvrtc:
    """Return the first NVRTC that loads: $STYLEPIPE_NVRTC's, else torch's, else the CUDA toolkit's, else the loader's.

    Raises:
        UserError: $STYLEPIPE_NVRTC names a file that does not load.
        BuildError: there is none.
    """
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        try:
            return Nvrtc(chosen)
        except (OSError, BuildError) as error:
            raise UserError(f"{LIBRARY_VARIABLE}={chosen}: expected the file of an NVRTC library ({error})") from error
    for path in _candidates():
        try:
            return Nvrtc(path)
        except (OSError, BuildError) as error:
            _log.debug("%s: %s", path, error)
    raise BuildError(
        "no NVRTC library found (looked in torch and its dependencies, in $CUDA_HOME, /usr/local/cuda and the loader's "
        f"folders; {LIBRARY_VARIABLE} would name its file)"
    )


def build_all(nvrtc: Nvrtc, missing: Sequence[tuple[Unit, str, Path]], done: Callable[[], object]) -> None:
    """Compile units for targets into the cache, one per core at once; the arguments and errors are nvcc.build_all's."""

    def build(unit: Unit, target: str, path: Path) -> None:
        write_entry(path, nvrtc.compile(unit, target))
        done()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the library works outside of Python's lock
        waiting = [pool.submit(build, *one) for one in missing]
    for future in waiting:
        future.result()


def _candidates() -> Iterator[str]:
    """Name the files that may be it, best first: torch's own fits the driver that torch needs."""
    major = (torch.version.cuda or "13").partition(".")[0]
    package = importlib.util.find_spec("nvidia")
    for site in (package.submodule_search_locations or []) if package else []:
        for folder in (f"cu{major}/lib", "cuda_nvrtc/lib"):
            yield from _in_folder(Path(site, folder))
    yield from _in_folder(Path(torch.__file__).parent / "lib")
    try:
        pathfinder = importlib.import_module("cuda.pathfinder")  # comes with the CUDA builds of torch since 2.10
        yield str(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, RuntimeError) as error:  # it raises RuntimeErrors where it finds none
        _log.debug("cuda.pathfinder: %s", error)
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home:
            yield from _in_folder(Path(home, "lib64"))
    yield f"libnvrtc.so.{major}"


def _in_folder(folder: Path) -> list[str]:
    """Return the libraries of a folder; torch/lib holds it as libnvrtc-0123abcd.so.12."""
    patterns = ("libnvrtc.so.[0-9]*", "libnvrtc-[0-9a-f]*.so.[0-9]*")
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return [str(path) for path in paths if "builtins" not in path.name]


def _strings(values: Any) -> Any:
    """Return a C array of C strings."""
    values = list(values)
    return (ctypes.c_char_p * len(values))(*values)
