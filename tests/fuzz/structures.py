"""Files that are well-formed as far as one looks, and hold anything: what bytes changed at random hardly ever reach."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from damage import HOSTILE, Files, json_bytes, places
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from targets import PHOTO_FORMATS

from stylepipe.datasets.shards import INDEX_DTYPE

_NUMBERS = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))
_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(HOSTILE)
)
_ANYTHING = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_NAMES = st.sampled_from(
    [
        b"a.png",
        b"../a.png",
        b"/etc/passwd",
        b"..",
        b".",
        b"",
        b"a/../../b.png",
        b"\xff.png",
        b"a\0b.png",
        b"x" * 120,
        b"b.cls",
    ]
)


@st.composite
def variants(draw: DrawFn, value: Any) -> Any:
    """Draw what a value is with one to three of the values in it replaced, left out, or under other names."""
    root = [json.loads(json.dumps(value))]
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(root))
        holder, key = found[draw(st.integers(0, len(found) - 1))]
        how = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "rename"]))
        if how == "leave out" and holder is not root:
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(draw(_ANYTHING))
    return root[0]


def json_files(valid: Files, *names: str) -> SearchStrategy[Files]:
    """Return files of which one that is JSON is a variant."""
    return st.one_of([variants(json.loads(valid[name])).map(_put(valid, name)) for name in names])


def json_lines(valid: Files, *names: str) -> SearchStrategy[Files]:
    """Return files of which one that has JSON in lines has variants of the first."""

    def lines(name: str) -> SearchStrategy[Files]:
        first = json.loads(valid[name].splitlines()[0])
        drawn = st.lists(variants(first).map(json_bytes) | st.binary(max_size=20), min_size=1, max_size=4)
        return drawn.map(lambda found: {**valid, name: b"\n".join(found) + b"\n"})

    return st.one_of(list(map(lines, names)))


def yaml_files(valid: Files) -> SearchStrategy[Files]:
    """Return files whose settings are YAML of any tokens, or of any values."""
    tokens = st.sampled_from(
        [*"[]{}:-?!&*|>'\"#%@,", "\n", "  ", "a", "kimg", "<<", "!!int", "!!timestamp", "1e5", "~"]
    )
    (name,) = (name for name in valid if name.endswith("config.yaml"))
    texts = st.lists(tokens, max_size=30).map("".join).map(str.encode) | st.dictionaries(
        st.sampled_from(["kimg", "res", "network", "loss", "data", "x"]), _ANYTHING
    ).map(json_bytes)
    return texts.map(lambda text: {**valid, name: text})


def safetensors_files(valid: Files) -> SearchStrategy[Files]:
    """Return one safetensors file whose header, or the JSON in it, is a variant; its length is right."""

    def of(name: str) -> SearchStrategy[Files]:
        content = valid[name]
        length = int.from_bytes(content[:8], "little")
        header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
        drawn = [variants(header)]
        for key, text in header.get("__metadata__", {}).items():
            if text.startswith("{"):
                drawn.append(variants(json.loads(text)).map(_within(header, key)))
        files = st.one_of(drawn).map(json_bytes).map(lambda text: len(text).to_bytes(8, "little") + text + body)
        others = {} if "ema/" not in name else valid
        return files.map(lambda file: {**others, name: file})

    return st.one_of([of(name) for name in sorted(valid) if name.endswith(".safetensors")])


@st.composite
def array_files(draw: DrawFn, valid: Files) -> Files:
    """Draw files of which an array has a header of any shape and type."""
    name = draw(st.sampled_from(sorted(name for name in valid if name.endswith(".npy"))))
    descr = draw(
        st.sampled_from(["'<f4'", "'<f8'", "'>f4'", "'|O'", "'<U9'", "[('a', '<f4')]", "'<M8[s]'", "''", "(" * 90])
    )
    shape = draw(
        st.sampled_from(
            ["(6, 4)", "()", "(0,)", "(-1,)", "(2**40,)", f"({2**60},)", f"({2**40}, {2**40})", "6", "-" * 3000 + "1"]
        )
    )
    text = f"{{'descr': {descr}, 'fortran_order': {draw(st.booleans())}, 'shape': {shape}, }}".encode()
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"
    return {**valid, name: header + draw(st.binary(max_size=200))}


@st.composite
def index_files(draw: DrawFn, valid: Files) -> Files:
    """Draw a prepared folder of which some rows of the index say anything; sizes and hashes are right."""
    name = "index.npy"
    index = np.load(io.BytesIO(valid[name]))
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.integers(0, len(index) - 1))
        field = draw(st.sampled_from(INDEX_DTYPE.names))
        index[field][row] = draw(_NUMBERS) % 2 ** (8 * INDEX_DTYPE[field].itemsize - (field == "label"))
    content = io.BytesIO()
    np.save(content, index)
    manifest = json.loads(valid["manifest.json"])
    manifest["index"] |= {"sha256": hashlib.sha256(content.getvalue()).hexdigest()}
    return {**valid, name: content.getvalue(), "manifest.json": json_bytes(manifest)}


@st.composite
def tar_files(draw: DrawFn, valid: Files) -> Files:
    """Draw a tar of headers whose checksums are right, and that say anything."""
    blocks = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(
            st.integers(0, 700).map(lambda n: b"%011o\0" % n)
            | st.integers(-(2**70), 2**80).map(
                lambda n: (n % 2**88 | (0x80 if n >= 0 else 0xFF) << 88).to_bytes(12, "big")
            )
            | st.binary(min_size=12, max_size=12)
        )
        kind = draw(
            st.sampled_from(
                [b"0", b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"S", b"L", b"K", b"x", b"g", b"X", b"Z"]
            )
        )
        header = bytearray(tarfile.TarInfo(draw(_NAMES)[:100].decode("latin-1")).tobuf(tarfile.GNU_FORMAT)[:512])
        header[124:136], header[156:157] = size, kind
        header[157:257] = draw(_NAMES)[:100].ljust(100, b"\0")
        header[482:483] = draw(st.sampled_from([b"\0", b"\1"]))
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        said = draw(st.binary(max_size=600) | _records() | st.sampled_from(list(valid.values())))
        blocks.append(bytes(header) + said + bytes(-len(said) % 512))
    end = draw(st.sampled_from([bytes(1024), b"", b"x" * 512]))
    return {"shards/a.tar": b"".join(blocks) + end}


def _records() -> SearchStrategy[bytes]:
    """Return the text of a pax header."""
    key = st.sampled_from([b"path", b"size", b"linkpath", b"GNU.sparse.map", b"hdrcharset"])
    value = _NAMES | st.sampled_from([b"-5", b"99999999999999999999", b"3", b"1e9", b""])
    length = st.integers(0, 60) | st.sampled_from([0, 10**5])
    record = st.tuples(length, key, value).map(lambda r: b"%d %s=%s\n" % r)
    return st.lists(record, max_size=4).map(b"".join)


@st.composite
def zip_files(draw: DrawFn, valid: Files) -> Files:
    """Draw a zip of any names, of links too, whose central directory may say something else than the files in it."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for number in range(draw(st.integers(0, 4))):
            info = zipfile.ZipInfo("x")
            info.filename = f"{number}" + draw(_NAMES).decode("latin-1").replace("\0", "")
            info.external_attr = draw(st.sampled_from([0, 0o120777 << 16, 0o060666 << 16, 0o40755 << 16]))
            info.compress_type = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
            archive.writestr(info, draw(st.binary(max_size=100)))
    changed = bytearray(content.getvalue())
    at = changed.find(b"PK\x01\x02")
    for _ in range(draw(st.integers(0, 3)) if at >= 0 else 0):
        field, width = draw(st.sampled_from([(6, 2), (8, 2), (10, 2), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)]))
        changed[at + field : at + field + width] = (draw(_NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
    return {"photos.zip": bytes(changed)}


@st.composite
def database_files(draw: DrawFn, valid: Files) -> Files:
    """Draw an LMDB of which some pages say anything of themselves or of their nodes."""
    (name,) = valid
    content = bytearray(valid[name])
    for _ in range(draw(st.integers(1, 4))):
        page = draw(st.integers(0, len(content) // 4096 - 1))
        field, width = draw(
            st.sampled_from(
                [(0, 8), (10, 2), (12, 2), (14, 2), (16, 2), (18, 2), (40, 4), (72, 8), (120, 8), (128, 8), (144, 8)]
            )
        )
        number = draw(_NUMBERS | st.integers(0, 8))
        content[4096 * page + field : 4096 * page + field + width] = (number % 2 ** (8 * width)).to_bytes(
            width, "little"
        )
    return {name: bytes(content)}


@st.composite
def png_files(draw: DrawFn, valid: Files) -> Files:
    """Draw a PNG of chunks whose checksums are right, of any size and kind."""
    side = st.sampled_from([0, 1, 16, 2**14, 2**20, 2**31 - 1, 2**32 - 1])
    depth, color = draw(st.sampled_from([1, 2, 4, 8, 16, 3])), draw(st.sampled_from([0, 2, 3, 4, 6, 1]))
    head = struct.pack(">IIBBBBB", draw(side), draw(side), depth, color, 0, 0, draw(st.integers(0, 1)))
    kinds = st.sampled_from(
        [b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"zTXt", b"IHDR", b"gAMA"]
    )
    data = st.binary(max_size=60) | st.binary(max_size=60).map(zlib.compress) | st.just(zlib.compress(bytes(10**5)))
    chunks = [(b"IHDR", head), *draw(st.lists(st.tuples(kinds, data), max_size=5)), (b"IEND", b"")]
    return {"a.png": b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)}


@st.composite
def picture_files(draw: DrawFn, valid: Files) -> Files:
    """Draw a picture in whose head 16-bit or 32-bit numbers are others, in either order of bytes."""
    name = draw(st.sampled_from([f"a.{suffix}" for suffix in PHOTO_FORMATS]))
    content = bytearray(valid[name])
    for _ in range(draw(st.integers(1, 4))):
        at, width = draw(st.integers(0, min(len(content), 100))), draw(st.sampled_from([2, 4]))
        number = draw(_NUMBERS) % 2 ** (8 * width)
        content[at : at + width] = number.to_bytes(width, draw(st.sampled_from(["little", "big"])))
    return {name: bytes(content)}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _put(valid: Files, name: str) -> Callable[[Any], Files]:
    return lambda value: {**valid, name: json_bytes(value)}


def _within(header: Any, key: str) -> Callable[[Any], Any]:
    return lambda value: {**header, "__metadata__": {**header["__metadata__"], key: json_bytes(value).decode()}}


STRUCTURES: dict[str, tuple[str, Callable[[Files], SearchStrategy[Files]]]] = {
    "state.json": ("state", lambda valid: json_files(valid, "state-000001.000/state.json")),
    "headers of networks": ("network", safetensors_files),
    "headers of averages": ("averages", safetensors_files),
    "arrays of statistics": ("statistics", array_files),
    "manifests": ("dataset", lambda valid: json_files(valid, "manifest.json", "levels/0004/manifest.json")),
    "arrays of datasets": ("dataset", array_files),
    "rows of the index": ("dataset", index_files),
    "headers of tars": ("tar", tar_files),
    "headers of tars that are streamed": ("stream", tar_files),
    "zips": ("zip", zip_files),
    "pages of databases": ("lmdb", database_files),
    "labels and landmarks": ("labels", lambda valid: json_files(valid, "photos/dataset.json", "points.json")),
    "chunks of PNGs": ("pictures", png_files),
    "heads of pictures": ("pictures", picture_files),
    "settings": ("config", yaml_files),
    "settings of a run": ("report", yaml_files),
    "lines of a run": ("report", lambda valid: json_lines(valid, "stats.jsonl", "metrics.jsonl")),
    "lines of a run that goes on": ("logs", lambda valid: json_lines(valid, "stats.jsonl", "metrics.jsonl")),
}
"""By what they are structures of: the target that reads them, and what draws them given valid files."""
