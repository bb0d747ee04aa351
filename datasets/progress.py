"""Showing how far a long job is: a bar in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_LINE_EVERY_S = 30.0  # in a log file


def with_progress(items: Iterable[Item], total: int, what: str, show: bool = True) -> Iterator[Item]:
    """Yield the items, showing on stderr how many are done, their rate and the time left; nothing where not `show`."""
    if sys.stderr.isatty():
        bar = tqdm(items, what, total, unit="img", disable=not show)
    else:
        line = "{desc}: {n_fmt} of {total_fmt} images, {rate_fmt}, {remaining} left\n"
        bar = tqdm(
            items,
            what,
            total,
            unit="img",
            disable=not show,
            bar_format=line,
            delay=_LINE_EVERY_S,
            mininterval=_LINE_EVERY_S,
            maxinterval=_LINE_EVERY_S,
        )
    yield from bar
