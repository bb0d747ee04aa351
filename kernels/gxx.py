"""Compiling kernels for the CPU with g++ or clang++: the GPU's own source for tests, and CPU kernels for speed.

Both give shared objects for host.py. `host_shim` compiles cuda/*.cu, whose threads cuda/host_shim.h then runs one after
the other: slow, but checkable anywhere, by sanitizers too. `native` compiles cpu/*.cpp for exactly this processor.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stylepipe.kernels.build import BuildError, Unit, run_compiler

HOST_TARGET = "host"


@dataclass(frozen=True)
class HostCompiler:
    """Compiles a unit to a shared object; see host_shim() and native()."""

    command: tuple[str, ...]
    name: str
    version: str
    options: tuple[str, ...]
    libraries: tuple[str, ...] = ()

    def flags(self, unit: Unit, target: str) -> list[str]:
        """Return the options, which hold the libraries it is linked with."""
        scalar = f"-DSCALAR={unit.scalar}"
        return ["-std=c++17", "-fPIC", "-DSTYLEPIPE_HOST", scalar, *self.options, *self.libraries]

    def compile(self, unit: Unit, target: str) -> bytes:
        """Return the shared object.

        Compiled and linked apart: with -fopenmp, g++ would link its own libgomp beside torch's.
        """
        with tempfile.TemporaryDirectory(prefix="stylepipe-kernels-") as folder:
            compiled, linked = f"{folder}/unit.o", f"{folder}/unit.so"
            flags = [flag for flag in self.flags(unit, target) if flag not in self.libraries]
            source = ["-x", "c++", str(unit.source), "-o", compiled]
            run_compiler([*self.command, *flags, "-c", *source], f"{unit.name} for the CPU")
            unthreaded = [option for option in self.options if option != "-fopenmp"]
            output = ["-shared", compiled, *self.libraries, "-o", linked]
            run_compiler([*self.command, *unthreaded, *output], f"{unit.name} for the CPU")
            return Path(linked).read_bytes()


def host_shim(sanitizers: Sequence[str] = ()) -> HostCompiler:
    """Return the compiler of GPU source for the CPU, with sanitizers such as `address`, `undefined`.

    Raises:
        BuildError: there is no C++ compiler.
    """
    checks = [f"-fsanitize={','.join(sanitizers)}", "-fno-sanitize-recover=all", "-g"] if sanitizers else []
    return HostCompiler(*_find(), options=("-O1", "-Wall", "-Wextra", *checks))


def native() -> HostCompiler:
    """Return the compiler of CPU kernels: for this processor, with OpenMP where torch's own library can be shared.

    Two OpenMP libraries in a process are two pools of threads that fight for the cores, so a unit is linked with the
    very file that torch has loaded; where torch has none that the compiler can use, the unit gets no OpenMP.

    Raises:
        BuildError: there is no C++ compiler.
    """
    command, name, version = _find()
    options, libraries = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"], []
    if name == "g++" and (openmp := torch_openmp()):
        options.append("-fopenmp")
        libraries = [str(openmp), f"-Wl,-rpath,{openmp.parent}"]
    return HostCompiler(command, name, version, tuple(options), tuple(libraries))


def native_target() -> str:
    """Name this processor, as `cpu_` and a hash of what it can do: -march=native means another thing elsewhere."""
    return f"cpu_{hashlib.sha256(_processor().encode()).hexdigest()[:8]}"


def torch_openmp() -> Path | None:
    """Return the GNU OpenMP library that came with torch, as all its Linux wheels have one."""
    package = Path(torch.__file__).parent
    folders = [package / "lib", package.parent / "torch.libs"]
    return next((path for folder in folders for path in sorted(folder.glob("libgomp*.so*"))), None)


def _find() -> tuple[tuple[str, ...], str, str]:
    """Return command, name and version of $CXX, else of the first of g++ and clang++ that is there."""
    chosen = os.environ.get("CXX")
    for candidate in [chosen] if chosen else ["g++", "clang++"]:
        try:
            command = tuple(shlex.split(candidate))
        except ValueError as error:
            raise BuildError(f"$CXX, {candidate}, is no command ({error})") from error
        if command and shutil.which(command[0]):
            said = run_compiler([*command, "--version"], "a question for its version").partition("\n")[0]
            numbers = re.findall(r"\d+(?:\.\d+)+", said)
            return command, "clang++" if "clang" in said else "g++", numbers[-1] if numbers else "unknown"
    looked_for = f"{chosen}, as $CXX says" if chosen else "g++ and clang++; $CXX would name another"
    raise BuildError(f"no C++ compiler found (looked for {looked_for})")


def _processor() -> str:
    """Return the name and features of this processor, as the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = ("model name", "flags", "Features", "CPU part")  # x86 tells the first two, ARM the others
    return "\n".join(line for line in lines if line.startswith(told))
