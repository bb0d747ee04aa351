"""Showing how far a long job is: a bar in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_LINE_EVERY_S = 30.0  # in a log file


def with_progress(items: Iterable[Item], total: int, what: str, show: bool = True) -> Iterator[Item]:
    """Yield the items, showing on stderr how many are done, their rate and the time left; nothing where not `show`."""
    if not show:
        return iter(items)
    if sys.stderr.isatty():
        return iter(tqdm(items, what, total, unit="img"))
    return _with_lines(items, total, what)


def _with_lines(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            rate = done / (now - start)
            left = tqdm.format_interval((total - done) / rate)
            sys.stderr.write(f"{what}: {done:,} of {total:,} images, {rate:.1f} img/s, {left} left\n")
