"""Damage of files: their bytes, or the values of the JSON in them; the same for the same generator."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import yaml

Files = dict[str, bytes]
"""What files of a folder hold, by their paths within it."""

_STRETCH = 64  # bytes that one change is of, at most
_BYTES = (0x00, 0xFF, 0x7F, 0x80, 0x20, 0x30, 0x39, 0x0A, 0x22, 0x2D)  # of which formats make much
_NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
_DEEP, _LESS_DEEP, _LONG = "@deep@", "@less deep@", "@long@"
_TEXTS = {
    f'"{_LESS_DEEP}"': "[" * 300 + "]" * 300,
    f'"{_DEEP}"': "[" * 50_000 + "]" * 50_000,
    f'"{_LONG}"': '"' + "A" * 200_000 + '"',
}
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, 10**400, -(10**400)),
    *(0.5, -0.0, 1e308, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan")),
    *("", "0", "\0", "..", "../../x", "/etc/passwd", "a/b", "²", "\ud800", "\x1b[2J", "<script>alert(1)</script>"),
    *([], {}, [[]], [1, "x"], {"a": 1}, {"": None}, _DEEP, _LESS_DEEP, _LONG),
)
"""What may stand in the place of any value."""
_YAML = (
    *(b"!!int ", b"!!float ", b"!!bool maybe ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!python/name:os.system "),
    *(b"&a ", b"*a ", b"{<<: *a} ", b"2001-99-99 ", b"2001-01-01 ", b"1:99:99 ", b"0x" + b"f" * 6000, b"1" * 6000),
    *(b"? ", b"- ", b"| ", b"--- ", b"... ", b"%YAML 9.9 ", b"[", b"{", b"'", b"# ", b"\t", b"\0", b"\xff", b".nan "),
    *(b"[" * 3000, b"- " * 3000, b"{" * 3000, b"\xef\xbb\xbf", b"\xe2\x80\xa8"),
)


def generator(seed: int, case: int) -> np.random.Generator:
    """Return the generator of one case."""
    return np.random.Generator(np.random.Philox(key=[seed, case]))


def damaged_files(files: Files, random: np.random.Generator) -> Files:
    """Damage one file, or two."""
    changed = dict(files)
    for name in random.permutation(sorted(files))[: 1 + (random.integers(4) == 0)]:
        changed[name] = damaged(name, files[name], random)
    return changed


def damaged_bytes(content: bytes, random: np.random.Generator) -> bytes:
    """Change bytes at one to four places: flip, overwrite, cut, remove, insert, repeat, move, write a large number."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(len(changed) + 1))
        size = int(random.integers(1, _STRETCH))
        kind = int(random.integers(12))
        if kind < 3 and at < len(changed):
            changed[at] ^= 1 << int(random.integers(8))
        elif kind < 5 and at < len(changed):
            changed[at] = _BYTES[int(random.integers(len(_BYTES)))]
        elif kind == 5:
            changed[at : at + size] = random.bytes(size)
        elif kind == 6:
            del changed[at : at + size]
        elif kind == 7:
            changed[at:at] = changed[at : at + size] * int(random.integers(1, 4))
        elif kind == 8:
            changed[at:at] = random.bytes(size)
        elif kind == 9:
            elsewhere = int(random.integers(len(changed) + 1))
            changed[at : at + size] = changed[elsewhere : elsewhere + size]
        elif kind == 10:
            order, width = ("little", "big")[int(random.integers(2))], (2, 4, 8)[int(random.integers(3))]
            number = _NUMBERS[int(random.integers(len(_NUMBERS)))] % 2 ** (8 * width)
            changed[at : at + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
        elif random.integers(3) == 0:
            del changed[at:]
    return bytes(changed)


def damaged_json(content: bytes, random: np.random.Generator) -> bytes:
    """Change one to three values of a JSON document, or the names of them; of several lines, one line."""
    lines = content.split(b"\n")
    number = int(random.integers(len(lines))) if _is_json(lines[0]) else None
    document = content if number is None else lines[number]
    if not _is_json(document):
        return damaged_bytes(content, random)
    changed = json_bytes(damaged_value(json.loads(document), random))
    if number is None:
        return changed
    return b"\n".join([*lines[:number], changed, *lines[number + 1 :]])


def damaged_yaml(content: bytes, random: np.random.Generator) -> bytes:
    """Change values of a YAML document, or put something that means more than it seems into it."""
    if random.integers(2):
        return json_bytes(damaged_value(yaml.safe_load(content), random))
    lines = content.split(b"\n")
    at = int(random.integers(len(lines)))
    key, colon, value = lines[at].partition(b": ")
    lines[at] = key + colon + _YAML[int(random.integers(len(_YAML)))] + (value if random.integers(2) else b"")
    return b"\n".join(lines)


def damaged_tar(content: bytes, random: np.random.Generator) -> bytes:
    """Change bytes of a header in a tar, whose checksum is right then."""
    changed = bytearray(content)
    headers = [at for at in range(0, len(content) - 511, 512) if content[at + 257 : at + 262] == b"ustar"]
    at = headers[int(random.integers(len(headers)))]
    header = bytearray(damaged_bytes(bytes(changed[at : at + 512]), random)[:512].ljust(512, b"\0"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    changed[at : at + 512] = header
    return bytes(changed)


def damaged_png(content: bytes, random: np.random.Generator) -> bytes:
    """Change bytes of a chunk of a PNG, whose checksum and size are right then; or repeat or leave out a chunk."""
    chunks, at = [], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += size + 12
    number = int(random.integers(len(chunks)))
    kind, data = chunks[number]
    times = (0, 1, 1, 1, 1, 2)[int(random.integers(6))]
    chunks[number : number + 1] = [(kind, damaged_bytes(data, random))] * times
    parts = [
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    ]
    return content[:8] + b"".join(parts)


def damaged_value(value: Any, random: np.random.Generator) -> Any:
    """Change one to three values within a value, or the names of them."""
    root = [value]
    for _ in range(random.integers(1, 4)):
        found = list(places(root))
        holder, key = found[int(random.integers(len(found)))]
        kind = int(random.integers(8))
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[("", "x", "..", "__class__")[int(random.integers(4))]] = holder.pop(key)
        elif kind == 2 and isinstance(holder, list) and holder is not root:
            holder[key:key] = [holder[key]] * int(random.integers(1, 50))
        else:
            holder[key] = json.loads(json.dumps(HOSTILE[int(random.integers(len(HOSTILE)))]))
    return root[0]


def json_bytes(value: Any) -> bytes:
    """Return JSON, with NaN and infinities as Python writes them, and what `HOSTILE` has names for."""
    text = json.dumps(value)
    for name, long in _TEXTS.items():
        text = text.replace(name, long)
    return text.encode()


def damaged(name: str, content: bytes, random: np.random.Generator) -> bytes:
    """Damage a file as its name suggests, or any bytes of it."""
    ways = _WAYS.get(name.rpartition(".")[2], [])
    change = [damaged_bytes, *ways][int(random.integers(1 + len(ways)))]
    return change(content, random)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a value in a container, as container and key."""
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(items):
        yield holder, key
        if isinstance(value, (dict, list)):
            yield from places(value)


_WAYS: dict[str, list[Callable[[bytes, np.random.Generator], bytes]]] = {
    "json": [damaged_json, damaged_json],
    "jsonl": [damaged_json, damaged_json],
    "yaml": [damaged_yaml],
    "tar": [damaged_tar],
    "png": [damaged_png],
}
