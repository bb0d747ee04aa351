"""Processes: how many, on which device, and what they tell each other.

Accelerate starts them and finds the devices. Gradients are averaged here explicitly, since a wrapped network gives
every process its own gradients for R1 and for calls of a part such as `G.mapping`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from stylepipe.errors import UserError

T = TypeVar("T")


def make_accelerator() -> Accelerator:
    """Join the process group, if the launcher made one, and take this process's device.

    Without a GPU, Accelerate must be told so: else processes started by torchrun would train separately.
    """
    return Accelerator(cpu=not torch.cuda.is_available())


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the cores among this machine's processes; `accelerate launch` would leave one thread to each."""
    if accelerator.device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes()))


def local_processes() -> int:
    """Return how many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, all at once."""
    work = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for handle, tensor in zip(work, tensors, strict=True):
        handle.wait()
        tensor /= dist.get_world_size()


def sum_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over the processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def smallest(value: int, device: torch.device) -> int:
    """Return the smallest of the processes' numbers."""
    tensor = torch.tensor(value, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor)


def from_main_process(value: T) -> T:
    """Return the main process's `value` on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


def on_main_process(accelerator: Accelerator, function, *arguments):  # type: ignore[no-untyped-def]
    """Call `function` on the main process alone and return its result, or raise its UserError, on every process."""
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = function(*arguments)
        except UserError as error:
            failure = str(error)
    result, failure = from_main_process((result, failure))
    if failure is not None:
        raise UserError(failure)
    return result


def leave() -> None:
    """Leave the process group; without this, processes now and then abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
