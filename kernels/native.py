"""Which implementation an op uses: compiled kernels, or PyTorch.

STYLEPIPE_KERNELS says what is wanted: `auto` (the default) takes compiled kernels where they can be had, and warns once
if a GPU has to do without; `cuda` makes that an error; `torch` never takes any. CPU tensors take compiled kernels where
there is a C++ compiler, and say nothing where there is none.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from stylepipe.errors import UserError
from stylepipe.kernels import build, gxx
from stylepipe.kernels.build import BuildError, Unit
from stylepipe.kernels.driver import Cubin
from stylepipe.kernels.host import SharedObject
from stylepipe.kernels.nvcc import find_nvcc
from stylepipe.kernels.nvrtc import find_nvrtc

VARIABLE = "STYLEPIPE_KERNELS"
MODES = ("auto", "cuda", "torch")

SCALAR_OF = {getattr(torch, scalar): scalar for scalar in build.SCALARS}
"""torch's type of every scalar type that kernels are compiled for."""

_log = logging.getLogger(__name__)


class Library(Protocol):
    """A compiled unit, on a GPU or the CPU."""

    @property
    def vector_bytes(self) -> int:
        """Bytes that a thread loads at once."""

    @property
    def threads(self) -> int:
        """Most threads of a block."""

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        params: ctypes.Structure,
        stream: int = 0,
    ) -> None:
        """Launch a kernel, its one argument `params`."""


Missed = Literal["ROCm", "building", "loading"]
_REMEDIES: dict[Missed, str] = {
    "building": "install a CUDA build of torch, which brings NVRTC, or build ahead of time: stylepipe kernels build",
    "loading": "install a newer NVIDIA driver",
}


@dataclass(frozen=True)
class Choice:
    """What an op of one type on one device uses, and why."""

    library: Library | None
    reason: str
    missed: Missed | None = None
    """Kernels are meant for this device and could not be had: what that is about."""


Chooser = Callable[[str, torch.dtype, torch.device], Library | None]

_choices: dict[tuple[str, torch.dtype, torch.device], Choice] = {}
_missed: dict[torch.device, Choice] = {}  # what keeps one unit from a device keeps all
_warned: set[Missed] = set()
_chooser: Chooser | None = None
_lock = threading.RLock()  # autograd runs backward passes in threads of its own


def library(source: str, dtype: torch.dtype, device: torch.device) -> Library | None:
    """Return the compiled kernels of cuda/`source`.cu or cpu/`source`.cpp, built if need be; None: use PyTorch.

    Raises:
        UserError: STYLEPIPE_KERNELS=cuda, and a GPU has to do without them; or it is no known word.
    """
    if _chooser is not None:
        return _chooser(source, dtype, device)
    choice = _choices.get((source, dtype, device))
    return choice.library if choice is not None else _first_choice(source, dtype, device).library


def explain(source: str, dtype: torch.dtype, device: torch.device) -> str:
    """Say in one line what library() would use, and why; build it if need be, but neither warn nor raise for lack."""
    device = _numbered(device)
    choice = _choices.get((source, dtype, device)) or _choose(source, dtype, device)
    return f"{'compiled' if choice.library else 'PyTorch'}: {choice.reason}"


def stream_of(device: torch.device) -> int:
    """Return what launch() takes as the current stream of a device; a CPU has none."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


@contextmanager
def use(chooser: Chooser) -> Iterator[None]:
    """Let another function choose, in all threads: tests put their own builds under the ops with it."""
    global _chooser
    before, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = before


def forget() -> None:
    """Forget all choices, so that the environment is looked at anew."""
    with _lock:
        _choices.clear()
        _missed.clear()
        _warned.clear()
        find_nvrtc.cache_clear()
        find_nvcc.cache_clear()


def mode() -> str:
    """Return what STYLEPIPE_KERNELS asks for."""
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in MODES:
        raise UserError(f"{VARIABLE}={asked}: expected one of {', '.join(MODES)}")
    return asked


def capability_of(device: torch.device) -> int:
    """Return a GPU's compute capability, 9.0 as 90."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _numbered(device: torch.device) -> torch.device:
    """Give the current GPU its number where the device has none."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _first_choice(source: str, dtype: torch.dtype, device: torch.device) -> Choice:
    """Choose, and keep the choice; say so where a GPU has to do without."""
    with _lock:
        device = _numbered(device)
        key = (source, dtype, device)
        if key in _choices:
            return _choices[key]
        choice = _choose(source, dtype, device)
        if choice.missed and mode() == "cuda":
            raise UserError(f"{VARIABLE}=cuda: {choice.reason}. {VARIABLE}=auto goes on with PyTorch's operations")
        if choice.missed:
            _missed[device] = choice
        if choice.missed and choice.missed not in _warned:
            _warned.add(choice.missed)
            warnings.warn(
                f"no CUDA kernels: {choice.reason}. PyTorch's own operations are used on {device} instead, which are "
                f"slower; `stylepipe doctor` tells more; {VARIABLE}=torch makes it the choice, without this warning",
                RuntimeWarning,
            )
        _choices[key] = choice
        return choice


def _choose(source: str, dtype: torch.dtype, device: torch.device) -> Choice:
    if mode() == "torch":
        return Choice(None, f"{VARIABLE}=torch")
    if dtype not in SCALAR_OF:
        return Choice(None, f"no kernels for {dtype}")
    if device in _missed:
        return _missed[device]
    if device.type == "cuda":
        return _choose_cuda(Unit(build.CUDA_SOURCES / f"{source}.cu", SCALAR_OF[dtype]), device)
    if device.type == "cpu":
        return _choose_cpu(Unit(build.CPU_SOURCES / f"{source}.cpp", SCALAR_OF[dtype]))
    return Choice(None, f"no kernels for {device.type}")


def _choose_cuda(unit: Unit, device: torch.device) -> Choice:
    if torch.version.hip:
        return Choice(None, "this is a ROCm build of torch", "ROCm")
    problems: list[str] = []
    missed: Missed = "building"
    for image, origin in _images(unit, capability_of(device), problems):
        try:
            return Choice(Cubin(image, device.index), origin)
        except RuntimeError as error:
            problems.append(f"{unit.name} ({origin}) does not load: {error}")
            missed = "loading"
    return Choice(None, "; ".join([*problems, _REMEDIES[missed]]), missed)


def _images(unit: Unit, capability: int, problems: list[str]) -> Iterator[tuple[bytes, str]]:
    """Yield all that a device of this capability may load, each thing once, and who made it; the first that loads is
    the best. What keeps a compiler from its part is added to the problems.
    """
    tried: list[bytes] = []
    for find in (find_nvrtc, find_nvcc):
        try:
            compiler = find()
            target = compiler.target(capability)
            if not build.entry_path(unit, target, compiler).is_file():
                yield from _stored(unit, target, tried, not_by=compiler.name)  # ahead of time, which spares compiling
            image = build.cached(unit, target, compiler, own=True)
        except BuildError as error:
            problems.append(str(error))
            _log.debug("%s\n%s", " ".join(error.command), error.log)
            continue
        if image not in tried:
            tried.append(image)
            yield image, f"{target}, {compiler.name} {compiler.version}"
    for target in build.runnable_targets(capability):  # perhaps another machine's
        yield from _stored(unit, target, tried)


def _stored(unit: Unit, target: str, tried: list[bytes], *, not_by: str = "") -> Iterator[tuple[bytes, str]]:
    """Yield what the cache holds beside what was tried, which it is then added to, and the files."""
    while found := build.stored(unit, target, build.device_flags(unit), but=tried, not_by=not_by):
        tried.append(found[0])
        yield found[0], str(found[1])


def _choose_cpu(unit: Unit) -> Choice:
    if not unit.source.is_file() or unit.scalar != "float32":  # half types would be converted one by one
        return Choice(None, "no compiled form for CPUs")
    try:
        compiler = gxx.native()
        shared_object = SharedObject(build.cached_path(unit, gxx.native_target(), compiler, _log.debug), native=True)
    except (BuildError, OSError) as error:
        _log.debug("no compiled CPU kernels: %s\n%s", error, getattr(error, "log", ""))
        return Choice(None, str(error))
    threads = "OpenMP" if "-fopenmp" in compiler.options else "one thread"
    return Choice(shared_object, f"{compiler.name} {compiler.version}, {threads}")
