"""What `stylepipe doctor` finds of one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]
"""In order; worth knowing; would stop or silently slow a training."""


@dataclass(frozen=True)
class Finding:
    """One line of the screen, and what to do where it is not in order."""

    name: str
    state: State
    text: str
    remedy: str = ""


def examine(name: str, probe: Callable[[], Finding]) -> Finding:
    """Return what a probe finds; one that fails finds that it failed, which says nothing about training."""
    try:
        return probe()
    except Exception as error:
        return Finding(name, "note", f"cannot be examined ({describe(error)})")


def describe(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
