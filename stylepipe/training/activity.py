"""What this process is doing at the moment, so that the others can be told where it does not get on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["working", "waiting", "unlimited"]


@dataclass(frozen=True)
class Activity:
    """Something that a process does.

    Attributes:
        what: in words that fit behind "has been at".
        kind: whether it works, waits for other processes, or works at something that may take any time.
        since: when it began or last got on, by the monotonic clock, in seconds.
    """

    what: str
    kind: Kind
    since: float


_now = Activity("its start", "unlimited", time.monotonic())


def now() -> Activity:
    """Return what this process is at."""
    return _now


def note(what: str) -> None:
    """Work at something, from now on."""
    global _now
    _now = Activity(what, "working", time.monotonic())


def get_on() -> None:
    """Note that work has got on."""
    global _now
    _now = replace(_now, since=time.monotonic())


@contextmanager
def during(what: str, kind: Kind = "working") -> Iterator[None]:
    """Be at something within this block, and then again at what was before."""
    global _now
    before = _now
    _now = Activity(what, kind, time.monotonic())
    try:
        yield
    finally:
        _now = replace(before, since=time.monotonic())
