"""Compiling kernels with the CUDA toolkit's nvcc: ahead of time for many architectures, or where NVRTC is missing."""

from __future__ import annotations

import functools
import os
import re
import select
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from stylepipe.kernels import build
from stylepipe.kernels.build import BuildError, Unit, device_flags, run_compiler, target_for
from stylepipe.kernels.cache import write_entry


class Usage(NamedTuple):
    """What a kernel takes of the device, as ptxas counts it."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


class Nvcc:
    """The nvcc at a path; it needs a C++ compiler beside it."""

    name = "nvcc"

    def __init__(self, path: str) -> None:
        self.path = path
        said = run_compiler([path, "--version"], "a question for its version")
        match = re.search(r"\bV(\d+(?:\.\d+)+)", said)
        self.version = match[1] if match else "unknown"
        archs = run_compiler([path, "--list-gpu-arch"], "a question for its architectures")
        self.supported = [int(arch) for arch in re.findall(r"compute_(\d+)", archs)]

    def target(self, capability: int) -> str:
        """Return what to compile for a device; its compute capability 9.0 is 90."""
        return target_for(capability, self.supported, f"nvcc {self.version}", "install an older CUDA toolkit")

    def flags(self, unit: Unit, target: str) -> list[str]:
        """Return the flags of all GPU compilers."""
        return device_flags(unit)

    def command(self, unit: Unit, target: str, output: str) -> list[str]:
        """Return the command that compiles a unit to a file."""
        kind = "--cubin" if target.startswith("sm_") else "--ptx"
        options = [*self.flags(unit, target), kind, f"--gpu-architecture={target}"]
        return [self.path, *options, str(unit.source), "-o", output]

    def compile(self, unit: Unit, target: str) -> bytes:
        """Return machine code, or PTX ended by a NUL."""
        with tempfile.TemporaryDirectory(prefix="stylepipe-kernels-") as folder:
            output = Path(folder, "unit")
            run_compiler(self.command(unit, target, str(output)), f"{unit.name} for {target}")
            return _image(output, target)

    def usage(self, unit: Unit, target: str) -> dict[str, Usage]:
        """Compile a unit for an architecture (`sm_90`) and return what each of its kernels takes."""
        with tempfile.TemporaryDirectory(prefix="stylepipe-kernels-") as folder:
            command = [*self.command(unit, target, f"{folder}/unit"), "--resource-usage"]
            return _parse_usage(run_compiler(command, f"{unit.name} for {target}"))


@functools.cache
def find_nvcc() -> Nvcc:
    """Return the nvcc of $CUDA_HOME, else of $PATH, else of /usr/local/cuda.

    Raises:
        BuildError: there is none, or it does not run.
    """
    home = os.environ.get("CUDA_HOME")
    for path in (home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        if path and (found := shutil.which(path)):
            return Nvcc(found)
    raise BuildError("no nvcc found (looked in $CUDA_HOME/bin, $PATH and /usr/local/cuda/bin)")


def build_all(nvcc: Nvcc, missing: Sequence[tuple[Unit, str, Path]], done: Callable[[], object]) -> None:
    """Compile units for targets into the cache, as many at once as ninja thinks fit for the cores.

    Every entry is kept as soon as it is made, so that an interrupted build goes on where it was.

    Args:
        nvcc: the compiler.
        missing: units, targets and entries, as missing_entries() gives them.
        done: called after each.

    Raises:
        BuildError: a unit did not compile; all others did. Or nothing was compiled for build.COMPILE_TIMEOUT_S.
        OSError: the cache cannot be written.
    """
    entries = {path.name: (target, path) for _, target, path in missing}
    with tempfile.TemporaryDirectory(prefix="stylepipe-kernels-") as folder:
        lines = ["rule nvcc", "  command = $command", "  description = $out"]
        for unit, target, path in missing:
            command = " ".join(_quoted(word) for word in nvcc.command(unit, target, f"{path.name}.part"))
            # The output is there only if whole.
            lines += [f"build {path.name}: nvcc", f"  command = {command} && mv {path.name}.part {path.name}"]
        Path(folder, "build.ninja").write_text("\n".join(lines) + "\n")
        for line in _ninja(folder):
            output = Path(folder, line)
            if line in entries and output.is_file():
                target, path = entries[line]
                write_entry(path, _image(output, target))
                done()


def _ninja(folder: str) -> Iterator[str]:
    """Run the folder's build.ninja and yield the lines that it says: an output's name when its command has ended."""
    from ninja import BIN_DIR

    command = [f"{BIN_DIR}/ninja", "-C", folder, "-k", "0"]
    environment = {**os.environ, "NINJA_STATUS": "", "TERM": "dumb"}
    log: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as ninja:
        assert ninja.stdout is not None
        try:
            for line in _lines(ninja.stdout.fileno(), build.COMPILE_TIMEOUT_S):
                log.append(line)
                yield line.strip()
        except TimeoutError as error:
            ninja.terminate()  # it ends what it has started
            message = f"nvcc has compiled nothing for {build.COMPILE_TIMEOUT_S:.0f} s"
            raise BuildError(message, command, "".join(log)) from error
    if ninja.returncode != 0:
        raise BuildError("nvcc failed to compile some units", command, "".join(log))


def _lines(file: int, quiet_s: float) -> Iterator[str]:
    """Yield the lines of a pipe until it is closed; raise TimeoutError where nothing comes for so long."""
    rest = b""
    while True:
        if not select.select([file], [], [], quiet_s)[0]:
            raise TimeoutError
        if not (chunk := os.read(file, 2**16)):
            break
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (f"{line.decode(errors='replace')}\n" for line in lines)
    if rest:
        yield rest.decode(errors="replace")


def _image(output: Path, target: str) -> bytes:
    """Read what nvcc has made; the driver takes PTX as a C string."""
    return output.read_bytes() if target.startswith("sm_") else output.read_bytes() + b"\0"


def _parse_usage(said: str) -> dict[str, Usage]:
    """Read what ptxas says of each kernel, in this order: its name, stack and spills, registers and shared memory."""
    usage = {}
    for part in said.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert spills is not None, said
        assert registers is not None, said
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = map(int, spills.groups())
        usage[part.partition("'")[0]] = Usage(int(registers[1]), int(shared[1]) if shared else 0, stack, stores, loads)
    return usage


def _quoted(word: str) -> str:
    """Quote a word for the shell, then for ninja."""
    return shlex.quote(word).replace("$", "$$")
