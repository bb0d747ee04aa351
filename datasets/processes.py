"""Worker processes that end exactly when their parent wants it or dies.

Ctrl-C and a batch system's SIGTERM reach every process of a job. The parent decides what to do about
them; a worker that died of one at once would end it with a traceback. And a worker must not outlive a
parent that was killed, which a queue alone does not tell it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice, pairwise
from multiprocessing import resource_tracker
from typing import TypeVar

from stylepipe.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_TASK_PIXELS = 1 << 22  # pixels that a worker returns at a time: enough to hide the round trip, little to hold
_PENDING_PER_WORKER = 2  # keeps workers busy while bounding what waits in memory


def available_cpus() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _signals_held() -> Iterator[None]:
    """Start worker processes within: SIGINT and SIGTERM stay pending, in them until `_follow_parent` decides.

    A child inherits the blocked signals. Otherwise one that came while a worker still imports its modules would end it,
    with a traceback.
    """
    resource_tracker.ensure_running()  # before: where multiprocessing starts its tracker itself, it unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow_parent() -> None:
    """Call first in a worker process: ignore SIGINT, and SIGTERM but from the parent; end with the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(parent.join,), daemon=True).start()
    if not hasattr(signal, "sigwaitinfo"):  # macOS: SIGTERM keeps its default action
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_after, args=(_sigterm_from, parent.pid), daemon=True).start()


def task_size(resolution: int) -> int:
    """Return how many images of this resolution a worker makes at a time."""
    return min(max(_TASK_PIXELS // resolution**2, 1), 64)


def in_tasks(count: int, size: int) -> list[range]:
    """Cut range(count) into consecutive ranges of at most `size`."""
    return [range(a, b) for a, b in pairwise([*range(0, count, size), count])]


def map_in_order(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    name: Callable[[Task], str] | None = None,
) -> Iterator[Result]:
    """Yield function(task) for each task, in order, computed by `workers` processes (1: in this one).

    At most a few tasks per worker are under way or waiting at any time. `function` must be importable. `name` says what
    a task is about, for the error where a process was killed.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the caller may hold threads or a CUDA context.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    tasks = iter(tasks)
    pending: deque[tuple[Task, Future[Result]]] = deque()

    def submit(count: int) -> None:
        with _signals_held():  # submitting may start a process
            pending.extend((task, executor.submit(function, task)) for task in islice(tasks, count))

    try:
        submit(workers * _PENDING_PER_WORKER)
        while pending:
            result = pending[0][1].result()
            pending.popleft()
            submit(1)
            yield result
    except BrokenProcessPool as error:
        broken = (task for task, future in pending if future.done() and future.exception() is not None)
        at_work = [] if name is None else [name(task) for task in islice(broken, workers)]
        raise UserError(
            f"one of {workers} worker processes was killed, most likely for want of memory; "
            f"use fewer workers (--workers)"
            + (f", or take out the file that does it, one of: {'; '.join(at_work)}" if at_work else "")
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _end_after(wait: Callable[..., object], *args: object) -> None:
    wait(*args)
    os._exit(1)


def _sigterm_from(pid: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != pid:
        pass
