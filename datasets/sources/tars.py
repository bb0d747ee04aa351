"""What a tar holds, and where it is damaged.

`tarfile` alone takes a header that it cannot read for the end, and an end that is missing for an end: what comes after
would be lost without a word.
"""

from __future__ import annotations

import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from stylepipe.errors import UserError

BLOCK = tarfile.BLOCKSIZE


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
                found, end = _read_run(file, start)
                members += found
                fault, start = _after(file, end, size)
                faults += fault
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if members and members[-1].offset + members[-1].size > size:
        faults[-1:] = [f"cut within {members.pop().name}"]
    if not members:
        raise UserError(f"{path}: is no tar archive that can be read; a compressed one must be decompressed first")
    return members, faults


def _read_run(file: BinaryIO, start: int) -> tuple[list[Member], int]:
    """Return the files from a header on up to the end or to the first damage, and where that is."""
    file.seek(start)
    members: list[Member] = []
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is the caller's
    except tarfile.TarError:
        return [], start
    with suppress(tarfile.TarError):  # data that ends too early
        for info in tar:  # each at once: reading on may fail
            if info.isreg():
                members += [Member(info.name, info.offset_data, info.size)]
    return members, int(tar.offset)


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
