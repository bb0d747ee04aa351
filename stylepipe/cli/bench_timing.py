"""The measuring part of `stylepipe bench ops`.

Everything that is compared runs in turns, so that a slow moment of the machine falls on all alike. A turn goes through
several sets of operands, together larger than the cache, so that each call reads from memory as a training does.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stylepipe.cli.bench_cases import Case, Level, Operands, differentiable
from stylepipe.kernels import build, native

OURS, EAGER, PLAIN, COMPILED, COPY = "stylepipe", "eager", "plain", "compile", "copy"
PASSES = ("forward", "forward+backward")

_COPY_BYTES = {"cuda": 2**29, "cpu": 2**27}
_CACHES_FILLED = 2  # by the sets together
_MOST_SETS = 16
_HOST_ROUNDS = 100
_WARM_UP_ROUNDS = 3  # a CPU's heap still grows in the first
_SLEEP_CYCLES_PER_S = 2e9  # about a GPU's clock

Call = Callable[[], object]


class Timing(NamedTuple):
    """Median seconds of one call.

    Attributes:
        seconds: by pass, then by what was run: OURS, EAGER, PLAIN and, where it was asked for and works, COMPILED.
        host: by pass, what the host spends on OURS around its kernels; None where it has none.
        copied: bytes per second, read and written, of a large copy that took its turns beside.
        complaint: why there is nothing of COMPILED, or "".
    """

    seconds: dict[str, dict[str, float]]
    host: dict[str, float | None]
    copied: float
    complaint: str


def time_case(
    case: Case, level: Level, repeats: int, *, compiled: bool = False, done: Callable[[], None] = lambda: None
) -> Timing:
    """Time an op, the same op without our kernels, its plain form and, if asked for, torch.compile of that.

    `done` is called len(PASSES) * (repeats + 1) times.
    """
    operands = [case.operands(level) for _ in range(_count_sets(case, level))]
    for each in operands:
        for tensor in differentiable(each):
            tensor.requires_grad_()
    with torch.no_grad():
        sets = [Set(each, [torch.randn_like(y) for y in case.plain(**each)]) for each in operands]
    functions = {OURS: case.op, EAGER: case.op, PLAIN: case.plain}
    complaint = ""
    if compiled:
        torch.compiler.reset()
        functions[COMPILED] = torch.compile(case.plain, dynamic=False)
        try:
            sets[0].forward_and_backward(functions[COMPILED])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a compiler is missing, say
            complaint = str(error).strip().splitlines()[0]
            del functions[COMPILED]
    copy = _Copy(level.device)
    seconds, host = {}, {}
    for name, run in zip(PASSES, (Set.forward, Set.forward_and_backward), strict=True):
        calls: dict[str, list[Call]] = {
            what: [partial(run, one, function) for one in sets] for what, function in functions.items()
        }
        calls[EAGER] = [partial(_without_kernels, call) for call in calls[EAGER]]
        host[name] = host_seconds(calls[OURS], level.dtype, level.device)
        seconds[name] = time_in_turns(calls | {COPY: [copy.run]}, repeats, level.device, done)
    took = statistics.median(medians.pop(COPY) for medians in seconds.values())
    return Timing(seconds, host, copy.moved / took, complaint)


def time_in_turns(
    calls: Mapping[str, Sequence[Call]], repeats: int, device: torch.device, done: Callable[[], None]
) -> dict[str, float]:
    """Return the median seconds of a call of each kind over `repeats` rounds, after some to warm up."""
    for _ in range(_WARM_UP_ROUNDS):
        for each in calls.values():
            _turn(each, device, 0)
    ahead = {name: _host_seconds(each, device) for name, each in calls.items()}
    done()
    order, rng = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        rng.shuffle(order)  # so that nothing always runs behind the copy, which leaves cold caches
        for name in order:
            seconds[name].append(_turn(calls[name], device, ahead[name]))
        done()
    return {name: statistics.median(each) for name, each in seconds.items()}


def host_seconds(calls: Sequence[Call], dtype: torch.dtype, device: torch.device) -> float | None:
    """Return the median seconds of a call whose kernels are not launched; None if it would have launched none."""
    libraries: dict[str, _Idle | None] = {}
    for source in build.CUDA_SOURCES.glob("*.cu"):
        library = native.library(source.stem, dtype, device)
        libraries[source.stem] = None if library is None else _Idle(library)
    seconds = []
    with native.use(lambda source, *_: libraries[source]):
        for _ in range(_HOST_ROUNDS):
            begin = time.perf_counter()
            calls[0]()
            seconds.append(time.perf_counter() - begin)
    launches = sum(library.launches for library in libraries.values() if library is not None)
    return statistics.median(seconds) if launches else None


class Set(NamedTuple):
    """Operands of one call, and the gradients by its outputs."""

    operands: Operands
    gradients: list[Tensor]

    def forward(self, function: Callable[..., tuple[Tensor, ...]]) -> object:
        """Run the forward pass as in a training, where it keeps what the backward pass needs."""
        return function(**self.operands)

    def forward_and_backward(self, function: Callable[..., tuple[Tensor, ...]]) -> object:
        """Run both and return the gradients by all that get one."""
        return torch.autograd.grad(function(**self.operands), differentiable(self.operands), self.gradients)


class _Idle:
    """Kernels that are not launched."""

    def __init__(self, library: native.Library) -> None:
        self.vector_bytes, self.threads, self.launches = library.vector_bytes, library.threads, 0

    def launch(self, *_: Any) -> None:
        self.launches += 1


class _Copy:
    """A copy that no cache holds."""

    def __init__(self, device: torch.device) -> None:
        count = _COPY_BYTES[device.type]
        self.moved = 2 * count
        self._from, self._to = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))

    def run(self) -> None:
        self._to.copy_(self._from)


def _without_kernels(call: Call) -> object:
    with native.use(lambda *_: None):
        return call()


def _count_sets(case: Case, level: Level) -> int:
    """Return how many sets of operands fill the cache, with what is read in a forward pass."""
    return min(max(1, -(-_CACHES_FILLED * _cache_bytes(level.device) // case.least(level).forward)), _MOST_SETS)


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except ValueError:  # the system does not tell
        return 2**25


def _turn(calls: Sequence[Call], device: torch.device, ahead_s: float) -> float:
    """Return the seconds per call of one turn.

    A GPU first sleeps for the `ahead_s` that the host takes to enqueue all, so that it never waits for the host.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(ahead_s * _SLEEP_CYCLES_PER_S))
    begin_event.record()
    for call in calls:
        call()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1000 / len(calls)


def _host_seconds(calls: Sequence[Call], device: torch.device) -> float:
    """Return the seconds that the host takes to enqueue all calls on a GPU, with something to spare."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for call in calls:
        call()
    return 1.5 * (time.perf_counter() - begin)
