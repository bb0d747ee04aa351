"""Other projects' checkpoint files, read as plain data: plain pickles, and torch.save's archives, old and new.

Neither torch.load nor pickle is used: pickle_reader.py has its own rules. A storage's bytes are read when a tensor of
it is asked for.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from stylepipe.errors import UserError
from stylepipe.interop.pickle_reader import read_pickle
from stylepipe.interop.plain_data import Budget, RefusedError, Vocabulary, shown
from stylepipe.interop.stored_tensors import CALLS, INERT, RECORDS, STORAGE_TYPES, Storage, storage_type

MAX_FILE_BYTES = 8 * 2**30
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before it wrote zip archives
_LEGACY_PROTOCOL = 1001
_LEGACY_START = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little")
_MAX_KEY = 20  # digits
_ZIP_START, _ZIP_DIRECTORY = b"PK\x03\x04", b"PK\x01\x02"
_MAX_ENTRIES = 20_000  # a checkpoint with its optimizers has some 2,000
_PICKLE_START = b"\x80"
_ZIP_ERRORS = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, OverflowError, struct.error,
    zlib.error,
)  # fmt: skip
"""What zipfile raises on damaged archives."""


def read_foreign(path: str | Path) -> Any:
    """Read a checkpoint: containers, scalars, StoredTensors and Records. Nothing in it is imported or run.

    Args:
        path: a plain pickle (protocols 2 to 5), or what torch.save wrote, in its zip or its older format.

    Raises:
        UserError: there is no such file, or it is damaged, of another kind, or holds what is not admitted.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(
                f"{path}: {path.stat().st_size:,} bytes; expected a checkpoint of at most {MAX_FILE_BYTES:,}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        if content.startswith(_ZIP_START):
            return _read_archive(content)
        if content.startswith(_LEGACY_START):
            return _read_legacy(memoryview(content), Vocabulary(CALLS, RECORDS, INERT), Budget())
        if content.startswith(_PICKLE_START):
            return _read_plain(memoryview(content))
    except RefusedError as error:
        raise UserError(f"{path}: {error}") from error
    raise UserError(f"{path}: neither a pickle nor an archive of torch.save; expected a checkpoint, .pkl or .pt")


def _read_plain(data: memoryview) -> Any:
    """Read a pickle that holds its tensors: each storage is a byte string in torch.save's older format."""
    budget = Budget()
    of_storages = Vocabulary({}, inert=frozenset(STORAGE_TYPES))
    storages: dict[int, tuple[memoryview, Storage]] = {}  # a byte string is read once, however often it is called on

    def storage(args: tuple[Any, ...]) -> Storage:
        match args:
            case (memoryview() as inner,):
                if id(inner) in storages:
                    return storages[id(inner)][1]
                found = _read_legacy(inner, of_storages, budget)
                if isinstance(found, Storage):
                    storages[id(inner)] = inner, found  # kept alive, so that its id stays its own
                    return found
        raise RefusedError("damaged: a storage that is not one")

    vocabulary = Vocabulary({**CALLS, "torch.storage._load_from_bytes": storage}, RECORDS, INERT)
    value, end = read_pickle(data, 0, vocabulary, budget)
    if end != len(data):
        raise RefusedError(f"damaged: {len(data) - end:,} bytes behind the end of the pickle")
    return value


def _read_legacy(data: memoryview, vocabulary: Vocabulary, budget: Budget) -> Any:
    """Read torch.save's older format: five pickles, of which the fourth is the object, then the storages in a row."""
    storages: dict[str, Storage] = {}
    places: dict[str, memoryview] = {}

    def find(key: str, nbytes: int) -> Callable[[], memoryview]:
        return lambda: places[key]  # known when the object's pickle has been read

    position = 0
    words = Vocabulary(vocabulary.calls, vocabulary.records, vocabulary.inert, partial(_persistent, storages, find))
    parts = []
    for _ in range(5):
        part, position = read_pickle(data, position, words, budget)
        parts.append(part)
    magic, protocol, system, value, keys = parts
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise RefusedError("damaged: not the start of a file of torch.save")
    if system.get("little_endian") is not True:
        raise RefusedError("written on a big-endian machine; load it with torch there and save it on a common one")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise RefusedError("damaged: the storages announced are not those that the tensors need")
    for key in keys:
        start = position + 8
        if start > len(data) or int.from_bytes(data[position:start], "little") != storages[key].count:
            raise RefusedError(f"damaged: storage {key} is not of the size announced, {storages[key].count:,} elements")
        position = start + storages[key].nbytes
        if position > len(data):
            raise RefusedError(f"cut short within storage {key}; copy or download it again")
        places[key] = data[start:position]
    if position != len(data):
        raise RefusedError(f"damaged: {len(data) - position:,} bytes behind the last storage")
    return value


def _read_archive(data: bytes) -> Any:
    """Read torch.save's zip format: the object in data.pkl, each storage a file of its own, none compressed."""
    if (found := data.count(_ZIP_DIRECTORY)) > _MAX_ENTRIES:  # before zipfile makes an object of each
        raise RefusedError(f"about {found:,} entries in the archive; expected at most {_MAX_ENTRIES:,}")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = archive.infolist()
    except _ZIP_ERRORS as error:
        raise RefusedError(f"damaged or cut short: {error}; copy or download it again") from error
    by_name = {entry.filename: entry for entry in entries}
    if len(by_name) != len(entries):
        raise RefusedError("two entries of one name in the archive")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise RefusedError("compressed entries in the archive; torch.save writes none")
    if sum(entry.file_size for entry in entries) > len(data):
        raise RefusedError("entries that overlap in the archive")
    main = [name for name in by_name if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(main) != 1:
        raise RefusedError("a zip archive, but not one of torch.save: expected one data.pkl in it")
    folder = main[0].removesuffix("data.pkl")

    def read(name: str) -> memoryview:
        try:
            return memoryview(archive.read(name))
        except _ZIP_ERRORS as error:
            raise RefusedError(f"damaged: {error}; copy or download it again") from error

    def find(key: str, nbytes: int) -> Callable[[], memoryview]:
        name = f"{folder}data/{key}"
        if name not in by_name or by_name[name].file_size != nbytes:
            raise RefusedError(f"damaged: storage {key} is not in the archive, or not of {nbytes:,} bytes")
        return cache(lambda: read(name))  # tensors may share it

    order = f"{folder}byteorder"
    if order in by_name and bytes(read(order)) != b"little":
        raise RefusedError("written on a big-endian machine; load it with torch there and save it on a common one")
    text = read(main[0])
    value, _ = read_pickle(text, 0, Vocabulary(CALLS, RECORDS, INERT, partial(_persistent, {}, find)), Budget())
    return value


def _persistent(
    storages: dict[str, Storage], find: Callable[[str, int], Callable[[], memoryview]], reference: Any
) -> Storage:
    """Return the storage that a persistent id of torch.save stands for, one for each key."""
    match reference:
        case ("storage", kind, str() as key, str(), int() as count):
            pass
        case ("storage", kind, str() as key, str(), int() as count, None):
            pass
        case _:
            raise RefusedError(
                "a persistent id that is no storage, or a view of one as very old versions of torch wrote"
            )
    if not (key.isascii() and key.isdecimal() and len(key) <= _MAX_KEY and count >= 0):
        raise RefusedError(
            f"damaged: a storage named {shown(key)} of {count:,} elements; expected a number as its name"
        )
    dtype = storage_type(kind)
    known = storages.get(key)
    if known is None:
        known = storages[key] = Storage(dtype, count, find(key, count * dtype.itemsize))
    if known.dtype != dtype or known.count != count:
        raise RefusedError(f"damaged: storage {key} has two types or sizes")
    return known
