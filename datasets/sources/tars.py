"""What a tar holds, and where it is damaged.

`tarfile` alone takes a header that it cannot read for the end, and an end that is missing for an end: what comes after
would be lost without a word. And it believes a header: a size below zero has it go round for ever, a long name of a
terabyte has it ask for as much memory. So only single headers are left to it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from stylepipe.datasets.sources import MAX_FILE_BYTES
from stylepipe.errors import UserError

BLOCK = tarfile.BLOCKSIZE

_MAX_SAID = 1 << 16  # bytes that may be said of one file: its name, above all
_MAX_OFFSET = 1 << 62  # what is more is no place in a file
_SKIPPED_AT_ONCE = 1 << 20
_COMPRESSED: Mapping[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
# Kinds of headers: of what is within links, folders and devices nothing is stored; others say more of the file behind.
_WITHOUT_DATA = {tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE}
_PAX = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}
_SAY_MORE = {*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_RECORD = re.compile(rb"([1-9][0-9]{0,5}) ")  # of pax: its length, then key=value and a line break
_SIZE = re.compile(rb"[0-9]{1,18}")
_SPARSE_GOES_ON, _MAP_GOES_ON = 482, 504  # bytes of a block that say whether another one of the map follows


class Member(NamedTuple):
    """A regular file in a tar: its name, where its data begins, its size in bytes."""

    name: str
    offset: int
    size: int


def scan_tar(path: Path) -> tuple[list[Member], list[str]]:
    """Return the regular files of an uncompressed tar, in order, and what is wrong with it.

    Behind damage it goes on at the next header that is one, so that nothing readable is lost. Links and special files
    are passed over, and so is a last file that is cut.

    Raises:
        UserError: the file cannot be read, or holds nothing that a tar does.
    """
    members: list[Member] = []
    faults: list[str] = []
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start: int | None = 0
            while start is not None:
                file.seek(start)
                walk = _Walk(file, start)
                members += walk.members()
                fault, start = _after(file, walk.at, size)
                faults += fault
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if members and members[-1].offset + members[-1].size > size:
        faults[-1:] = [f"cut within {members.pop().name}"]
    if not members:
        raise UserError(f"{path}: is no tar archive that can be read; a compressed one must be decompressed first")
    return members, faults


def stream_tar(file: io.BufferedReader) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the regular files of a tar, compressed or not, which is read from one end to the other.

    Raises:
        tarfile.ReadError: it is damaged, or a file in it is too large.
        OSError: it cannot be read.
    """
    beginning = file.peek(8)
    opened = next((kind for magic, kind in _COMPRESSED.items() if beginning.startswith(magic)), None)
    walk = _Walk(file if opened is None else cast(BinaryIO, opened(file)))
    try:
        for member in walk.members():
            if member.size > MAX_FILE_BYTES:
                raise tarfile.ReadError(f"{member.name} is larger than {MAX_FILE_BYTES >> 20} MiB")
            data = walk.read(member.size)
            if len(data) < member.size:
                raise tarfile.ReadError(f"it ends within {member.name}")
            yield member.name, data
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise tarfile.ReadError(f"its compression is damaged at byte {walk.at:,} ({error})") from error
    if not walk.at and not walk.block:
        raise tarfile.ReadError("empty file")
    if walk.block.strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {walk.at:,}, where one should be")


class _Walk:
    """Goes from header to header.

    Attributes:
        at: byte of the file that is read next; in the end that of the first block that is no header.
        block: that block.
    """

    def __init__(self, file: BinaryIO, at: int = 0) -> None:
        self._file, self.at, self.block = file, at, b""

    def members(self) -> Iterator[Member]:
        """Yield the regular files, each when its data can be read, up to the end or to the first damage."""
        said: dict[str, str] = {}
        while (header := self._header()) is not None:
            data, size = self.at, 0 if header.type in _WITHOUT_DATA else header.size
            if header.type in _SAY_MORE:
                said |= _said(header.type, self.read(min(size, _MAX_SAID)))
            else:
                if header.type == tarfile.GNUTYPE_SPARSE:
                    data += self._map_of_sparse()
                elif header.isreg():
                    size = int(said.get("size", size))
                    yield Member(said.get("path", header.name), data, size)
                said = {}
            self._skip_to(data + size + -size % BLOCK)

    def read(self, size: int) -> bytes:
        """Return bytes, fewer where the file ends."""
        data = self._file.read(size)
        self.at += len(data)
        return data

    def _header(self) -> tarfile.TarInfo | None:
        self.block = self.read(BLOCK)
        with suppress(tarfile.HeaderError):
            header = tarfile.TarInfo.frombuf(self.block, "utf-8", "surrogateescape")
            if header.size >= 0 and not (header.type in _SAY_MORE and header.size > _MAX_SAID):
                return header
        self.at -= len(self.block)
        return None

    def _map_of_sparse(self) -> int:
        """Go past the blocks that say where a file has holes; return their bytes."""
        start, goes_on = self.at, self.block[_SPARSE_GOES_ON]
        while goes_on and (block := self.read(BLOCK)):
            goes_on = block[_MAP_GOES_ON] if len(block) == BLOCK else 0
        return self.at - start

    def _skip_to(self, end: int) -> None:
        if self._file.seekable():
            self.at = self._file.seek(min(end, _MAX_OFFSET))
            return
        while self.at < end and self.read(min(end - self.at, _SKIPPED_AT_ONCE)):
            pass


def _said(kind: bytes, data: bytes) -> dict[str, str]:
    """Return what a header of this kind says of the file behind it: its path, its size."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": _name(data.partition(b"\0")[0])}
    said = {}
    at = 0
    while kind in _PAX and (found := _RECORD.match(data, at)):
        end = at + int(found[1])
        key, _, value = data[found.end() : end - 1].partition(b"=")
        if key == b"path" or (key == b"size" and _SIZE.fullmatch(value)):
            said[key.decode()] = _name(value)
        at = max(end, found.end())
    return said


def _name(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _after(file: BinaryIO, end: int, size: int) -> tuple[list[str], int | None]:
    """Return what is wrong where reading stopped, if anything, and where it goes on, if anywhere."""
    file.seek(end)
    block = file.read(BLOCK)
    if not block:
        return ["its end is missing, and whatever stood before that"], None
    following = _next_header(file, end + BLOCK, size)
    if block.strip(b"\0"):
        return [f"no header at byte {end:,}, where one should be"], following
    return (["it goes on behind its end"], following) if following is not None else ([], None)


def _next_header(file: BinaryIO, start: int, size: int) -> int | None:
    """Return where the next block that is a header begins."""
    file.seek(start)
    for offset in range(start, size - BLOCK + 1, BLOCK):
        block = file.read(BLOCK)
        if block[257:262] == b"ustar":
            with suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return offset
    return None
