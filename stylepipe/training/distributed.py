"""Processes: how many, on which device, and what they tell each other.

Accelerate starts them and finds the devices. Gradients are averaged here explicitly, since a wrapped network gives
every process its own gradients for R1 and for calls of a part such as `G.mapping`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from stylepipe.datasets.processes import available_cpus
from stylepipe.errors import ProcessLostError, UserError, of_file
from stylepipe.parsing import one_line
from stylepipe.training import activity

T = TypeVar("T")

_NO_LIMIT = timedelta(days=365)

# What is said where the other end is gone.
_OF_A_LINK = re.compile(r"\bgloo\b|connection|broken pipe|remote process|timed out|socket|aborted", re.IGNORECASE)

_hosts: dist.ProcessGroup | None = None  # where processes talk without their GPUs, if those are what they talk by


def make_accelerator() -> Accelerator:
    """Join the process group, if the launcher made one, and take this process's device.

    Without a GPU, Accelerate must be told so: else processes started by torchrun would train separately.
    """
    global _hosts
    # Precision is the networks' own; what accelerate is set to only selects it, see `stylepipe.cli.settling.settle`.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    if dist.is_initialized() and dist.get_backend() != "gloo":
        try:
            _hosts = dist.new_group(backend="gloo")
        except RuntimeError as error:
            raise UserError(
                f"the machines' processes cannot connect beside their GPUs ({one_line(error)}); set "
                f"GLOO_SOCKET_IFNAME to the network interface between them, such as eth0, on each"
            ) from error
    return accelerator


def wait_without_limit() -> None:
    """Have processes wait for one another without the limits of torch; for what ends those that wait for ever."""
    for group in filter(None, (dist.group.WORLD, _hosts)):
        _set_pg_timeout(_NO_LIMIT, group)


def use_all_cores() -> None:
    """Share the cores among this machine's processes, for a CPU; `accelerate launch` would leave one thread to each."""
    torch.set_num_threads(max(1, available_cpus() // local_processes()))


def local_processes() -> int:
    """Return how many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def together(what: str, kind: activity.Kind = "waiting") -> Iterator[None]:
    """Take part in something that all processes do, named in words that fit behind "waiting for".

    Args:
        what: they do.
        kind: "unlimited" where each may work on its own for long before.

    Raises:
        ProcessLostError: one of them has gone.
    """
    try:
        with activity.during(f"waiting for {what}" if kind == "waiting" else what, kind):
            yield
    except ProcessLostError:
        raise
    except RuntimeError as error:  # what torch.distributed raises is of several kinds
        if _OF_A_LINK.search(str(error)) is None:
            raise
        raise ProcessLostError(
            f"lost another process, while waiting for {what}: it has ended, which its own message tells of unless it "
            f"was killed, or its machine cannot be reached ({one_line(error).partition('. ')[0]})"
        ) from error


def sum_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over the processes."""
    if dist.is_initialized():
        with together("statistics"):
            dist.all_reduce(tensor)
    return tensor


def smallest(value: int, device: torch.device) -> int:
    """Return the smallest of the processes' numbers."""
    tensor = torch.tensor(value, device=device)
    if dist.is_initialized():
        with together("the least of all"):
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor)


def any_process(holds: bool) -> bool:
    """Tell whether something holds on any process. Hosts wait for one another here; their devices work on."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return holds
    vote = torch.tensor(float(holds))
    with together("the beginning of the next step"):
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=_hosts)
    return bool(vote)


def share_(tensors: Sequence[Tensor], values: T) -> T:
    """Replace each tensor by that of the main process, and return its values; all processes call this.

    Args:
        tensors: on this process's device.
        values: anything small.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    box = [values]
    with together("the state of the main process"):
        broadcast_object_list(box)
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
    return box[0]


def on_main_process(accelerator: Accelerator, function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` on the main process alone and return its result on every process.

    Raises:
        UserError: `function` raised it; the other processes exit quietly with code 2.
    """
    box = [_attempt(function, arguments) if accelerator.is_main_process else (None, None)]
    if accelerator.num_processes > 1:
        with together("the main process"):
            broadcast_object_list(box)
    result, failure = box[0]
    _fail_together(accelerator, failure)
    return cast(T, result)


def on_every_process(accelerator: Accelerator, function: Callable[..., T], *arguments: Any) -> T:
    """Call `function` on every process and return each its own result, if it succeeds on all of them.

    Raises:
        UserError: `function` raised it somewhere. The main process raises it, the others exit quietly with code 2.
    """
    result, failure = _attempt(function, arguments)
    failures = [failure]
    if accelerator.num_processes > 1:
        with together("what all processes are at"):
            failures = gather_object(failures)
    _fail_together(accelerator, next((f for f in failures if f is not None), None))
    return cast(T, result)


def _attempt(function: Callable[..., T], arguments: Sequence[Any]) -> tuple[T | None, str | None]:
    try:
        return function(*arguments), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, of_file(error)


def _fail_together(accelerator: Accelerator, failure: str | None) -> None:
    if failure is None:
        return
    if accelerator.is_main_process:
        raise UserError(failure)
    sys.exit(2)  # the message is the main process's to print


def leave(with_others: bool = True) -> None:
    """Leave the process group; without this, processes now and then abort at exit.

    Args:
        with_others: they do so as well. Else NCCL, which would wait for them, is left as it is.
    """
    if dist.is_initialized() and (with_others or dist.get_backend() == "gloo"):
        dist.destroy_process_group()
