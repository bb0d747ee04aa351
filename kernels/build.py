"""Compiling kernels: what there is to compile, what a compiler is, and how its output is kept.

One source is built in three ways, each behind `Compiler`: NVRTC (nvrtc.py) and nvcc (nvcc.py) make code for GPUs, a C++
compiler (gxx.py) makes shared objects for the CPU. A unit is one source file compiled for one scalar type; a target
is `sm_90` (machine code of one GPU architecture), `compute_90` (PTX, which the driver translates for that
architecture and newer ones), or a name of gxx.py's own.

An entry of the cache is named, for example, `epilogue-float16-sm_90-0123456789abcdef.nvrtc-13.0.cubin`. The digits are
the hash of all sources, the flags and the target, so any change of these is another entry; the compiler and its
version follow. NVRTC and nvcc are given the same flags. Hence a process looks for the entry of its own compiler, at
exactly its version, then for one that the other compiler made, of whatever version: that is how what
`stylepipe kernels build` made ahead of time is found where the compiler is another one, or missing.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stylepipe.kernels.cache import Report, cache_folder, entry_lock, keep_entry, read_entry, warn

SCALARS = ("float16", "bfloat16", "float32", "float64")

INTEGRATED = (72, 87, 101, 110)
"""Chips with a CPU beside the GPU (Xavier, Orin, Thor by its two numbers); CUDA Programming Guide, "Binary
Compatibility": their machine code runs on no other, and no other's on them. PTX knows no such bounds."""

CUDA_SOURCES = Path(__file__).parent / "cuda"
CPU_SOURCES = Path(__file__).parent / "cpu"

COMPILE_TIMEOUT_S = 280.0
"""A compiler that takes longer hangs; less than the wait for a lock, so that its message comes first."""


@dataclass(frozen=True)
class Unit:
    """One source file, to be compiled for one scalar type."""

    source: Path
    scalar: str

    @property
    def name(self) -> str:
        """Such as `epilogue-float16`."""
        return f"{self.source.stem}-{self.scalar}"

    def inputs(self) -> list[Path]:
        """Return the files that may be part of it: its folder's, and those of `cuda` beside it, which cpu/ includes."""
        folders = {self.source.parent, self.source.parent.parent / "cuda"}
        return sorted(path for folder in folders for path in folder.glob("*") if path.is_file())


class Compiler(Protocol):
    """What compiles a unit for a target."""

    @property
    def name(self) -> str:
        """A word without spaces, such as `nvcc`."""

    @property
    def version(self) -> str:
        """As `13.0.88`."""

    def flags(self, unit: Unit, target: str) -> list[str]:
        """Return all that shapes the output beside sources, target, compiler and version."""

    def compile(self, unit: Unit, target: str) -> bytes:
        """Return the output, or raise BuildError."""


class BuildError(RuntimeError):
    """A compiler is missing or failed. The message holds the log's first errors; `command` and `log` hold all."""

    def __init__(self, message: str, command: Sequence[str] = (), log: str = "") -> None:
        errors = [line.strip() for line in log.splitlines() if re.search("error|undefined", line, re.IGNORECASE)]
        super().__init__("\n  ".join([message, *(errors or log.strip().splitlines())[:3]]))
        self.command = tuple(command)
        self.log = log


def units(folder: Path = CUDA_SOURCES, scalars: Iterable[str] = SCALARS) -> list[Unit]:
    """Return a unit for every source of GPU code in the folder and every scalar type."""
    return [Unit(source, scalar) for source in sorted(folder.glob("*.cu")) for scalar in scalars]


def cached(unit: Unit, target: str, compiler: Compiler, report: Report = warn, *, own: bool = False) -> bytes:
    """Return the compiled unit, from the cache where it is there, and keep it there where it is not.

    Args:
        unit: what to compile.
        target: what to compile it for.
        compiler: what compiles it.
        report: is told where the cache cannot be used.
        own: pass over what other compilers have made of it.

    Raises:
        BuildError: the compiler failed.
    """
    return _obtain(unit, target, compiler, report, own=own)[0]


def cached_path(unit: Unit, target: str, compiler: Compiler, report: Report = warn) -> Path:
    """Return a file that holds the compiled unit: the cache's own, or a private one that goes with this process."""
    payload, path = _obtain(unit, target, compiler, report)
    if path is None:
        path = _private_folder() / entry_path(unit, target, compiler).name
        path.write_bytes(payload)
    return path


def stored(
    unit: Unit, target: str, flags: Sequence[str], *, but: Container[bytes] = (), not_by: str = ""
) -> tuple[bytes, Path] | None:
    """Return the newest whole entry that any compiler made with these flags, and its file.

    Args:
        unit: what was compiled.
        target: what it was compiled for.
        flags: what a compiler's flags() gives.
        but: outputs to pass over.
        not_by: the name of a compiler to pass over.
    """
    return _newest(cache_folder(), _stem(unit, target, flags), _suffix(target), but, not_by)


def entry_path(unit: Unit, target: str, compiler: Compiler) -> Path:
    """Return where the cache keeps what this compiler makes of the unit."""
    stem = _stem(unit, target, compiler.flags(unit, target))
    return cache_folder() / f"{stem}.{compiler.name}-{compiler.version}{_suffix(target)}"


def missing_entries(jobs: Iterable[tuple[Unit, str]], compiler: Compiler) -> list[tuple[Unit, str, Path]]:
    """Return those units and targets whose entry by this very compiler is not there, and where it belongs."""
    paths = [(unit, target, entry_path(unit, target, compiler)) for unit, target in jobs]
    return [(unit, target, path) for unit, target, path in paths if read_entry(path) is None]


def run_compiler(command: Sequence[str], what: str) -> str:
    """Run a compiler and return what it said; raise BuildError with that where it fails, is missing or hangs."""
    try:
        done = subprocess.run(
            command,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=COMPILE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {COMPILE_TIMEOUT_S:.0f} s over {what}", command) from error
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({error.strerror})", command) from error
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed to compile {what}", command, done.stdout)
    return done.stdout


# --- GPU targets ---


def device_flags(unit: Unit) -> list[str]:
    """Return the flags of NVRTC and nvcc alike. Line numbers cost no speed; profilers and checkers show them."""
    return ["--std=c++17", f"--define-macro=SCALAR={unit.scalar}", "--generate-line-info"]


def best_target(capability: int, supported: Iterable[int]) -> str | None:
    """Return what a compiler for the `supported` architectures makes for a device (90 is compute capability 9.0).

    Machine code of the nearest architecture that the device runs, else PTX, which runs on all later ones. None: the
    device is older than all.
    """
    known = [arch for arch in supported if arch <= capability]
    if not known:
        return None
    runnable = [arch for arch in known if _runs(capability, arch)]
    return f"sm_{max(runnable)}" if runnable else f"compute_{max(known)}"


def target_for(capability: int, supported: Iterable[int], who: str, remedy: str) -> str:
    """Return best_target, or raise BuildError that says who compiles for what, and the remedy."""
    known = list(supported)
    target = best_target(capability, known)
    if target is None:
        oldest, asked = min(known) / 10, capability / 10
        raise BuildError(f"{who} compiles for compute capability {oldest} or newer, the device has {asked}; {remedy}")
    return target


def runnable_targets(capability: int) -> list[str]:
    """Return every target that a device can run, best first."""
    return [
        *(f"sm_{arch}" for arch in range(capability, 69, -1) if _runs(capability, arch)),
        *(f"compute_{arch}" for arch in range(capability, 69, -1)),
    ]


# --- private ---


def _runs(capability: int, arch: int) -> bool:
    """Tell whether a device runs the machine code of an architecture: its own, or an earlier one of its generation."""
    same_generation = arch // 10 == capability // 10 and arch <= capability
    return arch == capability or (same_generation and arch not in INTEGRATED and capability not in INTEGRATED)


def _obtain(
    unit: Unit, target: str, compiler: Compiler, report: Report, *, own: bool = False
) -> tuple[bytes, Path | None]:
    """Return the compiled unit and the file it is kept in, None where it could not be kept."""
    path = entry_path(unit, target, compiler)
    if found := _look_up(path, compiler, own=own):
        return found
    with entry_lock(path.parent, f"{unit.name}-{target}", report):
        if found := _look_up(path, compiler, own=own):  # who held the lock has made it
            return found
        payload = compiler.compile(unit, target)
        return payload, path if keep_entry(path, payload, report) else None


def _look_up(path: Path, compiler: Compiler, *, own: bool) -> tuple[bytes, Path] | None:
    """Find the compiler's own entry, else, unless only `own` will do, one that another made with the same flags."""
    if (payload := read_entry(path)) is not None:
        return payload, path
    if own:
        return None
    return _newest(path.parent, path.name.partition(".")[0], path.suffix, not_by=compiler.name)


def _newest(
    folder: Path, stem: str, suffix: str, but: Container[bytes] = (), not_by: str = ""
) -> tuple[bytes, Path] | None:
    """Return the newest whole entry that is named so up to its compiler; for the last two see stored()."""
    paths = [path for path in folder.glob(f"{stem}.*{suffix}") if not path.name.startswith(f"{stem}.{not_by}-")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        if (payload := read_entry(path)) is not None and payload not in but:
            return payload, path
    return None


def _stem(unit: Unit, target: str, flags: Sequence[str]) -> str:
    """Name an entry up to its compiler."""
    key = hashlib.sha256()
    for part in (target, *flags):
        key.update(f"{part}\0".encode())
    for source in unit.inputs():
        content = source.read_bytes()
        key.update(f"{source.parent.name}/{source.name}\0{len(content)}\0".encode())
        key.update(content)
    return f"{unit.name}-{target}-{key.hexdigest()[:16]}"


def _suffix(target: str) -> str:
    return {"sm": ".cubin", "compute": ".ptx"}.get(target.partition("_")[0], ".so")


@functools.cache
def _private_folder() -> Path:
    """Make a folder that is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="stylepipe-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
