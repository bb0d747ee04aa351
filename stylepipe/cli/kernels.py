"""`stylepipe kernels`: compile the CUDA kernels ahead of time, list the compiled ones, remove them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from stylepipe.errors import UserError
from stylepipe.kernels import build, nvcc, nvrtc
from stylepipe.kernels.cache import FOLDER_VARIABLE, cache_folder, entry_lock, list_entries, remove_entries
from stylepipe.kernels.native import capability_of

DEFAULT_ARCHS = (80, 90, 100, 120)
LOCK_TIMEOUT_S = 1800.0
"""How long a build waits for another one; all files of four architectures take a minute on two cores."""


@dataclass(frozen=True)
class Build:
    """Compile the CUDA kernels ahead of time, for example on a login node whose cache folder the GPU nodes share.

    Without this, each kernel is compiled at its first use, for the GPU at hand. What is compiled already is left as it
    is. The last line tells what was done, in how many seconds.
    """

    arch: Annotated[str | None, tyro.conf.arg(metavar="80,90,...")] = None
    """GPU architectures, 90 being compute capability 9.0; PTX for GPUs newer than the newest of them is added. Default:
    those of this machine's GPUs; where there is none, 80,90,100,120."""
    compiler: Literal["nvcc", "nvrtc"] | None = None
    """nvcc comes with the CUDA toolkit and needs a C++ compiler, nvrtc comes with the CUDA builds of torch. Default:
    nvcc where it is found, else nvrtc."""


@dataclass(frozen=True)
class List:
    """List the compiled kernels, their sizes and their folder."""


@dataclass(frozen=True)
class Clean:
    """Remove all compiled kernels, and what killed builds left. They are compiled again when they are needed."""


COMMANDS: dict[str, Callable[..., Build | List | Clean]] = {"build": Build, "list": List, "clean": Clean}


def main(argv: Sequence[str] | None = None) -> None:
    """Build, list or remove."""
    args = list(sys.argv[1:] if argv is None else argv)
    chosen = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=args, prog="stylepipe kernels")
    if isinstance(chosen, Build):
        build_kernels(chosen)
    elif isinstance(chosen, List):
        list_kernels(cache_folder())
    else:
        count, size = remove_entries(cache_folder())
        print(f"removed {_files(count)} ({size / 1e6:.1f} MB) from {cache_folder()}")


def build_kernels(options: Build, sources: Path = build.CUDA_SOURCES) -> None:
    """Compile every unit of the source folder for every architecture asked for."""
    begin = time.perf_counter()
    try:
        compiler = _compiler(options.compiler)
        targets = _targets(options.arch, compiler)
        jobs = [(unit, target) for target in targets for unit in build.units(sources)]
        cache_folder().mkdir(parents=True, exist_ok=True)
        with entry_lock(cache_folder(), "all-kernels", _tell, timeout_s=LOCK_TIMEOUT_S):
            missing = build.missing_entries(jobs, compiler)  # what another build has made meanwhile is none of them
            with tqdm(total=len(missing), unit="file", disable=not sys.stderr.isatty()) as bar:
                if isinstance(compiler, nvcc.Nvcc):
                    nvcc.build_all(compiler, missing, bar.update)
                else:
                    nvrtc.build_all(compiler, missing, bar.update)
    except build.BuildError as error:
        if error.log:
            print(error.log, file=sys.stderr)
        raise UserError(str(error)) from error
    except OSError as error:
        remedy = f"name another folder in {FOLDER_VARIABLE}"
        raise UserError(f"{cache_folder()}: cannot write there ({error.strerror}); {remedy}") from error
    seconds = time.perf_counter() - begin
    print(
        f"{_files(len(missing))} compiled by {compiler.name} {compiler.version} for {', '.join(targets)} in "
        f"{seconds:.1f} s; {len(jobs) - len(missing)} were there already; all in {cache_folder()}"
    )


def list_kernels(folder: Path) -> None:
    """Print one line per compiled unit, and one for all."""
    entries = list_entries(folder)
    sizes = [path.stat().st_size for path in entries]
    for path, size in zip(entries, sizes, strict=True):
        print(f"{size / 1e3:8.1f} kB  {path.name}")
    print(f"{_files(len(entries))} ({sum(sizes) / 1e6:.1f} MB) in {folder}")


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _compiler(name: str | None) -> nvcc.Nvcc | nvrtc.Nvrtc:
    if name == "nvrtc":
        return nvrtc.find_nvrtc()
    try:
        return nvcc.find_nvcc()
    except build.BuildError as missing:
        if name == "nvcc":
            raise
        try:
            return nvrtc.find_nvrtc()
        except build.BuildError as error:
            raise build.BuildError(f"{missing}; {error}") from error


def _targets(arch: str | None, compiler: nvcc.Nvcc | nvrtc.Nvrtc) -> list[str]:
    """Return what to compile for: machine code for each architecture, and PTX, except for the GPUs at hand."""
    if arch is None and torch.cuda.is_available():
        devices = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
        return sorted({compiler.target(capability_of(device)) for device in devices})
    try:
        archs = sorted(set(DEFAULT_ARCHS if arch is None else map(int, arch.split(","))))
    except ValueError:
        archs = []
    if not archs or not set(archs) <= set(compiler.supported):
        known = ",".join(map(str, sorted(compiler.supported)))
        asked = ",".join(map(str, DEFAULT_ARCHS)) if arch is None else arch
        raise UserError(
            f"--arch {asked}: expected numbers with commas between them, of those that {compiler.name} "
            f"{compiler.version} compiles for: {known}"
        )
    return [*(f"sm_{each}" for each in archs), f"compute_{archs[-1]}"]


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"
