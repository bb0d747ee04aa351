"""Seeing that no process waits for ever for one that does not get on: a thread in each tells what it is at."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from stylepipe.errors import ProcessLostError
from stylepipe.training import activity
from stylepipe.training.activity import Activity
from stylepipe.training.distributed import together, wait_without_limit

T = TypeVar("T")

MAX_PERIOD_S = 5.0
EXIT_STALLED = 1


@dataclass(frozen=True)
class Beat:
    """What a process says of itself.

    Attributes:
        count: one higher each time.
        host: name of its machine.
        what, kind: as in `Activity`.
        age_s: how long it has been at that without getting on.
    """

    count: int
    host: str
    what: str
    kind: activity.Kind
    age_s: float


class Watchdog:
    """Within this context, a process that has not got on for too long ends, and says which one it is that holds all up.

    Devices that wait for one another raise no error, and a machine that is cut off answers nothing: without this, all
    others would wait for ever. Limits of torch, which knows nothing of data that takes hours to prepare, are lifted.
    One process alone is left alone.

    Args:
        limit_s: how long a process may be at one thing; 0 for no limit. What is of unlimited length, such as preparing
            data, only has to be alive.
        about: what to say of the limit, where it was reached.

    Attributes:
        remedy: what the user is to do where others have stalled or are lost.
    """

    def __init__(self, limit_s: float, about: str = "") -> None:
        self._limit_s, self._about = limit_s, about
        self.remedy = "start the same command again"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if dist.is_initialized() and dist.get_world_size() > 1:
            wait_without_limit()
            if self._limit_s > 0:
                period = min(MAX_PERIOD_S, self._limit_s / 10)
                with together("the store of all processes"):
                    board = _Board(period)
                self._thread = threading.Thread(target=self._watch, args=(board, period), name="watchdog", daemon=True)
                self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(MAX_PERIOD_S)  # it may be asking a machine that answers nothing
        if isinstance(error, ProcessLostError):
            raise ProcessLostError(f"{error}; {self.remedy}") from error

    def _watch(self, board: _Board, period: float) -> None:
        board.put(activity.now(), 0.0)
        woken = began = time.monotonic()  # what was before, while all processes were started, is not looked at
        heard = _Heard(began)
        while not self._stop.wait(period):
            now = time.monotonic()
            if now - woken > MAX_PERIOD_S + 3 * period:  # this process itself, or its machine, was halted
                began, heard = now, _Heard(now)
            mine = activity.now()
            age = now - max(mine.since, began)
            board.put(mine, age)
            if age < self._limit_s / 2:
                heard, woken = _Heard(now), time.monotonic()
                continue
            heard.note(board.read(), now)
            if age >= self._limit_s:
                silent = heard.silent(now, self._limit_s / 4)
                beats = None if now - heard.answered >= self._limit_s / 4 else heard.beats
                told = verdict(mine, age, dist.get_rank(), beats, silent, self._limit_s)
                if told is not None:
                    sys.stderr.write(f"error (process {dist.get_rank()}): {told}{self._about}; {self.remedy}\n")
                    os._exit(EXIT_STALLED)
            woken = time.monotonic()


class _Heard:
    """What the others have said, and when that was last something new.

    Attributes:
        beats: what each said last.
        answered: when they could last be asked.
    """

    def __init__(self, now: float) -> None:
        self.beats: dict[int, Beat] = {}
        self.answered = now
        self._news = dict.fromkeys(range(dist.get_world_size()), now)

    def note(self, beats: dict[int, Beat] | None, now: float) -> None:
        """Note what all say now; None where there was no answer, which tells nothing of any of them."""
        if beats is None:
            return
        for rank, beat in beats.items():
            if rank not in self.beats or self.beats[rank].count != beat.count:
                self._news[rank] = now
        self.beats, self.answered = beats, now

    def silent(self, now: float, after_s: float) -> dict[int, float]:
        """Return for how long those have said nothing new for whom it is that long."""
        return {rank: now - when for rank, when in self._news.items() if now - when >= after_s}


def verdict(
    mine: Activity,
    age_s: float,
    rank: int,
    beats: Mapping[int, Beat] | None,
    silent: Mapping[int, float],
    limit_s: float,
) -> str | None:
    """Return why a process that has not got on for too long is to end, in words; None where it is to wait on.

    Args:
        mine, age_s: what it is at, and for how long.
        rank: its number.
        beats: what the others last said, by their numbers; None where they cannot be asked.
        silent: for how many seconds some of them have said nothing.
        limit_s: how long is too long.
    """
    if mine.kind == "working":
        return f"this process has been at {mine.what} for {age_s:.0f} s without getting on"
    here = f"this one has been {'' if mine.kind == 'waiting' else 'at '}{mine.what} for {age_s:.0f} s"
    if beats is None:
        return f"the machine of process 0 cannot be reached, and {here}"
    told = []
    for other, seconds in sorted(silent.items()):
        last = f"({beats[other].host}) was at {beats[other].what}" if other in beats else "has not been heard of yet"
        told.append(f"process {other} {last} and has said nothing for {seconds:.0f} s")
    if mine.kind == "unlimited":
        return f"{'; '.join(told)}; {here}" if told else None
    loud = {other: beat for other, beat in beats.items() if other not in silent and other != rank}
    told += [
        f"process {other} ({beat.host}) has been at {beat.what} for {beat.age_s:.0f} s without getting on"
        for other, beat in sorted(loud.items())
        if beat.kind == "working" and beat.age_s >= limit_s / 2
    ]
    if told:
        return f"{'; '.join(told)}; {here}"
    if any(beat.kind != "waiting" for beat in loud.values()):
        return None
    return f"all processes wait for one another, as when the link between their machines is lost: {here}"


class _Board:
    """Where processes leave what they say of themselves: the store by which they found one another."""

    def __init__(self, timeout_s: float) -> None:
        # A connection of its own: that of the process group is held while a process waits in it.
        self._store = _get_default_store().clone()  # type: ignore[attr-defined] # missing in torch's stubs
        self._timeout_s = max(1.0, timeout_s)
        self._store.set_timeout(timedelta(seconds=self._timeout_s))
        self._count = 0
        self._all_begun = False
        self._asking: threading.Thread | None = None

    def put(self, mine: Activity, age_s: float) -> None:
        self._count += 1
        beat = Beat(self._count, socket.gethostname(), mine.what, mine.kind, age_s)
        self._asked(lambda: self._store.set(_key(dist.get_rank()), json.dumps(asdict(beat))))

    def read(self) -> dict[int, Beat] | None:
        """Return what the processes have said that have begun; None where they cannot be asked now."""
        return self._asked(self._read)

    def _read(self) -> dict[int, Beat]:
        keys = {rank: _key(rank) for rank in range(dist.get_world_size())}
        self._all_begun = self._all_begun or self._store.check(list(keys.values()))
        if not self._all_begun:
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        texts = self._store.multi_get(list(keys.values())) if keys else []
        return {rank: Beat(**json.loads(text)) for rank, text in zip(keys, texts, strict=True)}

    def _asked(self, ask: Callable[[], T]) -> T | None:
        """Return the answer of the store, or None where there is none in time.

        It is asked in a thread of its own: a machine that is cut off lets who asks it wait for many minutes.
        """
        if self._asking is not None and self._asking.is_alive():
            return None
        answers: list[T | None] = [None]

        def run() -> None:
            with contextlib.suppress(RuntimeError, ValueError):  # it cannot be reached, or is closed
                answers.append(ask())

        self._asking = threading.Thread(target=run, name="asking", daemon=True)
        self._asking.start()
        self._asking.join(self._timeout_s)
        return answers[-1]


def _key(rank: int) -> str:
    return f"stylepipe/beat/{rank}"
