"""What pickles are read as: scalars, containers, and Records in place of objects.

Nothing here is imported or called on the word of a file; pickle_reader.py tells how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_INSTRUCTIONS = 2_000_000  # a StyleGAN2 checkpoint with its optimizers takes some 100,000
MAX_DEPTH = 100
MAX_NAME = 200

_KEY_TYPES = (str, int, float, type(None))  # bool is an int; a tuple's hash can take for ever
_MAX_INT_KEY = 2**60  # Python's hash repeats beyond: keys chosen to collide would take quadratic time


class RefusedError(Exception):
    """What is wrong with a file, without its name; whoever opened the file makes it a UserError."""


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to, `module.attribute`; inert."""

    name: str


@dataclass(eq=False)
class Record:
    """An object as plain data: its class by name, what it was made with, and its state (None if it has none)."""

    class_name: str
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True)
class Vocabulary:
    """The names that a pickle may use."""

    calls: Mapping[str, Callable[[tuple[Any, ...]], Any]]
    """Functions and classes, and what is called instead with the arguments: ours, which must take them for anything."""
    records: tuple[str, ...] = ()
    """Classes whose objects become Records; one that ends in a dot stands for all that begin so."""
    inert: frozenset[str] = frozenset()
    """Names that may be mentioned, and that nothing can be done with."""
    persistent: Callable[[Any], Any] | None = None
    """What a persistent id stands for; None: there may be none."""

    def has_record(self, name: str) -> bool:
        """Tell whether objects of this class become Records."""
        return any(name.startswith(known) if known.endswith(".") else name == known for known in self.records)


class Budget:
    """How many instructions may still be carried out, by all pickles of one file together."""

    def __init__(self, instructions: int = MAX_INSTRUCTIONS) -> None:
        self.left = instructions

    def spend(self, count: int = 1) -> None:
        """Take `count` off.

        Raises:
            RefusedError: nothing is left.
        """
        self.left -= count
        if self.left < 0:
            raise RefusedError(f"more than {MAX_INSTRUCTIONS:,} pickle instructions, far more than any network needs")


def checked_keys(items: list[Any]) -> list[Any]:
    """Return `items` if each may be a key of a dictionary or in a set: a string, a number of common size or None.

    Raises:
        RefusedError: one is something else.
    """
    for item in items:
        if not isinstance(item, _KEY_TYPES):
            raise RefusedError(f"a {type(item).__name__} as a key; expected strings and numbers")
        if isinstance(item, (int, float)) and not -_MAX_INT_KEY < item < _MAX_INT_KEY:
            raise RefusedError(f"the number {item:g} as a key; expected common ones")
    return items


def shown(name: str) -> str:
    """Return a string of a file as it may be printed: without control characters, and short."""
    text = ascii(name)[1:-1]
    return text if len(text) <= MAX_NAME else text[:MAX_NAME] + "..."


def check_nesting(value: Any) -> None:
    """See that no container is within itself, and none deeper than MAX_DEPTH: traversals may then recurse.

    The same container may be in many places, so they must still count their steps.

    Raises:
        RefusedError: it is not so.
    """
    heights: dict[int, int] = {}  # of those that have been gone through
    path = [(value, _children(value))]
    within = {id(value)}
    while path:
        container, children = path[-1]
        child = next((child for child in children if not isinstance(child, _LEAVES)), None)
        if child is None:
            path.pop()
            within.discard(id(container))
            heights[id(container)] = 1 + max((heights.get(id(c), 0) for c in _children(container)), default=0)
            deepest = len(path) + heights[id(container)]
        elif id(child) in within:
            raise RefusedError("a container within itself")
        elif id(child) in heights:
            deepest = len(path) + heights[id(child)]
        else:
            path.append((child, _children(child)))
            within.add(id(child))
            deepest = len(path)
        if deepest > MAX_DEPTH:
            raise RefusedError(f"more than {MAX_DEPTH} containers within one another")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return iter(value.values())  # the keys are scalars
    if isinstance(value, Record):
        return iter((value.args, value.state))
    return iter(value) if isinstance(value, (list, tuple)) else iter(())


_LEAVES = (str, int, float, type(None), memoryview, set, Global)
