"""Gradients averaged over the processes, in buckets: where it pays, while the backward pass still runs.

A bucket is a part of a network's gradient buffer, so float32 is sent from where it lies. The buckets are the same
whether they are sent early or late, and so is every bit of the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stylepipe.config import ReduceType
from stylepipe.training.arena import Arena
from stylepipe.training.distributed import share_, together

BUCKET_BYTES = 25 * 2**20
"""What fills a bucket, as in PyTorch's DistributedDataParallel: beside its time, what a sum waits for costs little."""

_WHAT = "the gradients of all processes"

SENT_AS: Mapping[ReduceType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Handle(Protocol):
    """A sum that has begun."""

    def wait(self) -> object:
        """Return when what the device does next will find the sum."""
        ...


def start_sum(tensor: Tensor) -> Handle:
    """Begin to replace `tensor` by its sum over the processes."""
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    return work


@dataclass(frozen=True)
class Exchange:
    """How processes exchange gradients.

    Attributes:
        reduce_dtype: type that gradients are sent and added up in.
        overlap: whether to send them while the backward pass runs; None for where that pays, on GPUs. A CPU adds with
            the cores that the backward pass needs.
        start: begins a sum over the processes.
    """

    reduce_dtype: ReduceType = "fp32"
    overlap: bool | None = None
    start: Callable[[Tensor], Handle] = start_sum


class Averaging:
    """Averages the gradients of what a stage uses of one network.

    The loss of a phase does not say how many terms it will yield, so the first run of each tells how many gradients
    the last micro-batch gives each bucket, and in which order they are complete. From the second run on a bucket is
    sent when it is complete and those before it are sent, in the order that the main process found.

    Args:
        arena: of the network, with gradients.
        parameters, windows: what the stage uses of it.
        world_size: number of processes.
        exchange: how they exchange gradients.
    """

    def __init__(
        self,
        arena: Arena,
        parameters: Sequence[nn.Parameter],
        windows: Sequence[slice],
        world_size: int,
        exchange: Exchange,
    ) -> None:
        assert arena.grad is not None
        self._parameters, self._world_size, self._start = parameters, world_size, exchange.start
        self._sent_as = SENT_AS[exchange.reduce_dtype]
        places = [arena.windows([p])[0].start for p in parameters]
        parts = cut(windows, places, BUCKET_BYTES // arena.grad.itemsize)
        self._buckets = [arena.grad[part] for part in parts]
        self._bucket_of = [next(i for i, part in enumerate(parts) if part.start <= at < part.stop) for at in places]
        on_gpu = arena.grad.device.type == "cuda"
        # What fits one bucket is complete with the last gradient: there is nothing left to overlap with.
        self._overlap = len(parts) > 1 and (on_gpu if exchange.overlap is None else exchange.overlap)
        self._plans: dict[str, _Plan] = {}
        self._phase: str | None = None
        self._hooks: list[RemovableHandle] = []
        self._filled: list[int] = []  # the bucket of each gradient that has come
        self._missing: dict[int, int] = {}  # gradients by bucket
        self._waiting = deque(range(len(parts)))  # to be sent
        self._under_way: list[tuple[Handle, Tensor, Tensor]] = []

    def watch(self, phase: str) -> None:
        """Send buckets as the last micro-batch of a phase fills them. Its parameters are marked as trained by now."""
        if not self._overlap:
            return
        self._phase = phase
        if plan := self._plans.get(phase):
            self._missing, self._waiting = dict(plan.gradients), deque(plan.order)
        for p, bucket in zip(self._parameters, self._bucket_of, strict=True):
            self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._note, bucket)))

    def finish(self, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Send what is left, and leave the means over the processes in the arena; return the means of `averages`.

        These are float32 and travel as such, all in one piece.
        """
        for hook in self._hooks:
            hook.remove()
        assert not any(self._missing.values()), f"{self._phase}: other gradients than in its first run"
        while self._waiting:
            self._send(self._buckets[self._waiting.popleft()], self._sent_as)
        beside = torch.cat([value.flatten() for value in averages.values()]) if averages else None
        if beside is not None:
            self._send(beside, beside.dtype)
        for handle, sent, mean in self._under_way:
            with together(_WHAT):
                handle.wait()
            if sent is mean:
                mean /= self._world_size
            else:
                mean.copy_(sent)
        if self._phase is not None and self._phase not in self._plans:
            self._plans[self._phase] = share_([], self._plan())
        self._phase, self._waiting = None, deque(range(len(self._buckets)))
        self._hooks, self._filled, self._missing, self._under_way = [], [], {}, []
        if beside is None:
            return {}
        parts = beside.split([value.numel() for value in averages.values()])
        return {name: part.view_as(value) for part, (name, value) in zip(parts, averages.items(), strict=True)}

    def _note(self, bucket: int, p: Tensor) -> None:
        """Take note of a gradient of `p`, and send what is complete with it."""
        del p
        self._filled.append(bucket)
        if self._phase not in self._plans:
            return
        self._missing[bucket] -= 1
        while self._waiting and self._missing[self._waiting[0]] == 0:
            self._send(self._buckets[self._waiting.popleft()], self._sent_as)

    def _send(self, mean: Tensor, sent_as: torch.dtype) -> None:
        """Begin to average a tensor; in a smaller type it is divided first, while it has all of its digits."""
        sent = mean
        if sent_as != mean.dtype:
            sent = torch.div(mean, self._world_size, out=torch.empty_like(mean, dtype=sent_as))
        with together(_WHAT):
            self._under_way.append((self._start(sent), sent, mean))

    def _plan(self) -> _Plan:
        """Return what this run of a phase has shown."""
        last = {bucket: at for at, bucket in enumerate(self._filled)}
        buckets = range(len(self._buckets))
        gradients = {bucket: self._filled.count(bucket) for bucket in buckets}
        return _Plan(gradients, sorted(buckets, key=lambda bucket: last.get(bucket, -1)))


def cut(windows: Sequence[slice], places: Sequence[int], size: int) -> list[slice]:
    """Cut windows of an arena into buckets, from the end on: each begins with the parameter that fills it.

    Args:
        windows: what is in use.
        places: where each parameter in use begins.
        size: numbers that fill a bucket.
    """
    buckets = []
    for window in reversed(windows):
        stop = window.stop
        for place in sorted((at for at in places if window.start <= at < window.stop), reverse=True):
            if stop - place >= size or place == window.start:
                buckets.append(slice(place, stop))
                stop = place
    return buckets


@dataclass(frozen=True)
class _Plan:
    """What the last micro-batch of a phase does, in each of its runs.

    Attributes:
        gradients: how many each bucket gets.
        order: of the buckets, from the one that is complete first.
    """

    gradients: Mapping[int, int]
    order: Sequence[int]
