"""JSON and YAML that anyone may have written, read within bounds; and texts of files as messages may show them."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 64
"""Containers within one another."""
MAX_BITS = 1024
"""Of a whole number in YAML: what is larger is larger than any float."""
SHOWN = 200
"""Characters of a text of a file in a message."""

_OPENING = re.compile(r"[\[{]")
_BREAK = re.compile(r"\s*[\n\r\t]\s*")


def parse_json(text: str | bytes) -> Any:
    """Return what JSON stands for.

    Raises:
        ValueError: it is none, no UTF-8, or nested too deeply.
    """
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    if len(_OPENING.findall(text)) > MAX_DEPTH:
        _check(value)
    return value


def parse_yaml(text: str) -> Any:
    """Return what YAML stands for.

    Raises:
        ValueError: it is none, nested too deeply, holds a number beyond all floats, or an alias: a few of them can
            stand for more than fits into memory.
    """
    import yaml  # it is only needed for settings

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(None, None, "an alias (*name)", self.peek_event().start_mark)
            if self.depth > MAX_DEPTH:
                raise RecursionError
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        value = yaml.load(text, Loader)
        _check(value)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    except Exception as error:  # its own kind, and whatever Python has against a date, a number or a key
        raise ValueError(one_line(error) or type(error).__name__) from error
    return value


def one_line(text: object, most: int = SHOWN) -> str:
    """Return a text as a message may show it: on one line, without control characters, and short."""
    line = _BREAK.sub(" ", str(text)[: 4 * most].strip())
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line[: most + 1])
    return shown if len(shown) <= most else shown[:most] + "..."


def _check(value: Any) -> None:
    """Raise ValueError where containers are nested too deeply, or a whole number is too large."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        for one in level:
            if isinstance(one, int) and one.bit_length() > MAX_BITS:
                raise ValueError(f"a whole number of {one.bit_length():,} bits")
        level = [inner for one in level for inner in _within(one)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _within(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, (list, tuple, set)) else []
