"""What an LMDB holds and where in its file, found without LMDB's library: that one dies of damage, and we with it.

The file is pages, little-endian as 64-bit machines write them (LMDB 0.9, mdb.c). Each begins with its number u64, 2
bytes without use, and its kind u16. Then

    meta (0 and 1)     magic u32, version u32, 16 bytes, the tree of free pages, the main tree, last page u64,
                       transaction u64; the later transaction counts. A tree: page size u32, flags u16, depth u16,
                       numbers of branch, leaf and overflow pages u64 each, number of entries u64, page of the root u64
    branch and leaf    where the list of nodes ends u16, 2 bytes; the list: where in the page each node is, u16
    overflow           the number of pages u32 that a large value takes, and the value

A node of a branch is the page of a smaller tree in 48 bits, 2 bytes, and a key. One of a leaf is the size of its value
u32, flags u16, the size of its key u16, the key, and the value or, if it is large, the number of its overflow page u64.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_PAGE_SIZES = [1 << power for power in range(9, 17)]
_HEAD = 16  # bytes of a page before what it holds
_PAGE, _NODE = struct.Struct("<QHHHH"), struct.Struct("<IHH")
_META = struct.Struct("<II16x" + 2 * "IHHQQQQQ" + "QQ")
_KINDS, _BRANCH, _LEAF = 7, 1, 2
_PLAIN, _LARGE = 0, 1  # values here and elsewhere; others are databases, and several values of one key
_NO_PAGE = (1 << 64) - 1


class Entry(NamedTuple):
    """Where a value is in the file, in bytes."""

    offset: int
    size: int


def entries(path: Path) -> dict[bytes, Entry]:
    """Return where the value of each key is.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no LMDB, or damaged where its keys are.
    """
    with open(path, "rb") as file:
        page_size, count, root = _main_tree(file)
        found: dict[bytes, Entry] = {}
        left, seen = [] if root == _NO_PAGE else [root], set[int]()
        while left:
            number = left.pop()
            if number in seen:
                raise ValueError(f"page {number:,} has two places")
            seen.add(number)
            page = _read(file, number * page_size, page_size)
            own_number, _, kind, end, _ = _PAGE.unpack_from(page)
            if own_number != number or kind & _KINDS not in (_BRANCH, _LEAF) or not _HEAD <= end <= page_size:
                raise ValueError(f"page {number:,} is damaged")
            for node in struct.unpack_from(f"<{(end - _HEAD) // 2}H", page, _HEAD):
                if node + _NODE.size > page_size:
                    raise ValueError(f"page {number:,} is damaged")
                if kind & _BRANCH:
                    left.append(int.from_bytes(page[node : node + 6], "little"))
                else:
                    key, value = _entry(page, node, number * page_size)
                    found[key] = value
    if len(found) != count:
        raise ValueError(f"{len(found):,} of {count:,} keys are found")
    return found


def _main_tree(file: BinaryIO) -> tuple[int, int, int]:
    """Return the size of pages, and of the main tree the number of entries and the page of the root."""
    first = _META.unpack(_read(file, _HEAD, _META.size))
    page_size = first[2]
    if page_size not in _PAGE_SIZES:
        raise ValueError(f"pages of {page_size:,} bytes")
    metas = (first, _META.unpack(_read(file, page_size + _HEAD, _META.size)))
    if any(meta[:2] != (_MAGIC, _VERSION) for meta in metas):
        raise ValueError(f"its head is none of version {_VERSION}")
    *_, count, root, _, _ = max(metas, key=lambda meta: meta[-1])
    return page_size, count, root


def _entry(page: bytes, node: int, start: int) -> tuple[bytes, Entry]:
    """Return key and value of a node of a leaf that starts there in the file."""
    size, flags, key_size = _NODE.unpack_from(page, node)
    key = node + _NODE.size
    value = key + key_size
    if flags == _LARGE:
        number = int.from_bytes(page[value : value + 8], "little")
        return page[key:value], Entry(min(number, _NO_PAGE >> 17) * len(page) + _HEAD, size)
    if flags != _PLAIN or value + size > len(page):
        raise ValueError(f"the key at byte {start + node:,} has no single value")
    return page[key:value], Entry(start + value, size)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    """Return bytes; raise ValueError where the file ends before."""
    data = os.pread(file.fileno(), size, offset) if offset < 1 << 62 else b""
    if len(data) < size:
        raise ValueError(f"it ends before byte {offset + size:,}")
    return data
