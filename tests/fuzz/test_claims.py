"""Files that claim to be enormous, or have no end, are refused at once, and nothing points out of its folder."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Reading
from damage import Files, json_bytes
from PIL import Image
from targets import RES, TARGETS, photo

from stylepipe.datasets.manifest import Manifest
from stylepipe.datasets.sources.opening import open_source
from stylepipe.datasets.sources.tars import scan_tar

AT_ONCE_S = 20.0  # on a machine that is busy with other tests; a claim that is believed takes minutes or all memory
LITTLE = 96 << 20  # bytes

NETWORK = "progan.safetensors"
STATE = "state-000001.000/state.json"


def header_of(file: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a safetensors file with another header."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    change(header)
    text = json_bytes(header)
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


def tensor_of(files: Files, name: str, **says: Any) -> Files:
    """Return the network whose first tensor is another, as its header says."""
    return {name: header_of(files[name], lambda header: next(h for k, h in header.items() if k[0] != "_").update(says))}


def config_of(files: Files, **settings: Any) -> Files:
    """Return a network that has other settings in its header."""

    def change(header: dict[str, Any]) -> None:
        config = json.loads(header["__metadata__"]["config"]) | settings
        header["__metadata__"]["config"] = json.dumps(config)

    return {NETWORK: header_of(files[NETWORK], change)}


def manifest_of(files: Files, **says: Any) -> Files:
    return {**files, "manifest.json": json_bytes(json.loads(files["manifest.json"]) | says)}


def array_of(shape: str, version: bytes = b"\1\0", length: int | None = None) -> bytes:
    """Return the beginning of an array file."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = len(text) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2 if version == b"\1\0" else 4, "little") + text


def tar_header(name: bytes = b"a.png", size: int = 0, kind: bytes = b"0") -> bytes:
    """Return a header whose checksum is right, whatever its size."""
    header = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.USTAR_FORMAT)[:512])
    header[124:136] = (size % 2**88 | (0x80 if size >= 0 else 0xFF) << 88).to_bytes(12, "big")
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar_of(*parts: bytes) -> Files:
    end = bytes(1024)
    return {"shards/a.tar": tar_header(b"x.png", len(photo())) + photo().ljust(1024, b"\0") + b"".join(parts) + end}


def png_of(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def patched(content: bytes, *changes: tuple[bytes, bytes]) -> bytes:
    for before, after in changes:
        assert before in content
        content = content.replace(before, after, 1)
    return content


def database_of(files: Files, offset: int, number: int) -> Files:
    """Return a database in both heads of which another number stands."""
    content = bytearray(files["db/data.mdb"])
    for page in (0, 4096):
        content[page + offset : page + offset + 8] = number.to_bytes(8, "little")
    return {"db/data.mdb": bytes(content)}


def zip_of(**central: int) -> Files:
    """Return a zip that says something else of its one file in its central directory."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    changed = bytearray(content.getvalue())
    at = changed.find(b"PK\1\2")
    places = {"size": 24, "compressed": 20, "offset": 42}
    for name, number in central.items():
        changed[at + places[name] : at + places[name] + 4] = number.to_bytes(4, "little")
    return {"photos.zip": bytes(changed)}


def gzipped_zeros(size: int) -> bytes:
    content = io.BytesIO()
    with gzip.GzipFile(fileobj=content, mode="wb", compresslevel=1) as file:
        file.write(tar_header(size=size))
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    return content.getvalue()


DEEP = b"[" * 10**6 + b"]" * 10**6
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))

CLAIMS: dict[str, tuple[str, Callable[[Files], Files]]] = {
    "a network's header of an exabyte": ("network", lambda files: {NETWORK: b"\xff" * 7 + b"\0{" + files[NETWORK][9:]}),
    "a network's header of 99 MB": ("network", lambda files: {NETWORK: (99_000_000).to_bytes(8, "little") + b"{" + bytes(99)}),  # noqa: E501
    "a network's tensor that ends far away": ("network", lambda files: tensor_of(files, NETWORK, data_offsets=[0, 2**60])),  # noqa: E501
    "a network's tensor of 2^60 numbers": ("network", lambda files: tensor_of(files, NETWORK, shape=[2**30, 2**30])),
    "a network's tensor of more than 2^64 numbers": ("network", lambda files: tensor_of(files, NETWORK, shape=[2**40] * 3)),  # noqa: E501
    "a network of 2^30 px": ("network", lambda files: config_of(files, res=2**30)),
    "a network of many channels": ("network", lambda files: config_of(files, channel_base=2**24, channel_max=2**24)),
    "a network of many more channels": ("network", lambda files: config_of(files, channel_base=2**62, channel_max=2**62)),  # noqa: E501
    "a network of a large latent": ("network", lambda files: config_of(files, z_dim=2**50)),
    "a network of many labels": ("network", lambda files: config_of(files, c_dim=2**40)),
    "a network of many layers": (
        "network",
        lambda files: {
            "network-000001.000.safetensors": header_of(
                files["network-000001.000.safetensors"],
                lambda header: header["__metadata__"].update(config='{"res": 8, "mapping_layers": 1000000000}'),
            )
        },
    ),
    "a network's header in a million brackets": (
        "network",
        lambda files: {NETWORK: (len(DEEP) + 6).to_bytes(8, "little") + b'{"a":' + DEEP + b"}"},
    ),
    "a state.json in a million brackets": ("state", lambda files: {**files, STATE: DEEP}),
    "rows of 2^60 numbers": ("statistics", lambda files: {**files, "rows/more.npy": array_of(f"({2**60},)")}),
    "rows of more than 2^64 numbers": (
        "statistics",
        lambda files: {**files, "rows/more.npy": array_of(f"({2**40}, {2**40})")},
    ),
    "rows whose header has 4 GB": (
        "statistics",
        lambda files: {**files, "rows/more.npy": array_of("(1,)", b"\2\0", 2**32 - 1)},
    ),
    "rows whose header is deep": (
        "statistics",
        lambda files: {**files, "rows/more.npy": array_of("-" * 9000 + "1")},
    ),
    "images of 2^30 px": ("dataset", lambda files: manifest_of(files, resolution=2**30)),
    "2^60 images": ("dataset", lambda files: manifest_of(files, count=2**60)),
    "a manifest in a million brackets": ("dataset", lambda files: {**files, "manifest.json": b'{"format":' + DEEP + b"}"}),  # noqa: E501
    "a manifest of a number of 4,000 digits": ("dataset", lambda files: manifest_of(files, count=int("9" * 4000))),
    "a tar's file of 2^80 bytes": ("tar", lambda files: tar_of(tar_header(size=2**80), photo())),
    "a tar's file of less than no bytes": ("tar", lambda files: tar_of(tar_header(size=-2048), photo())),
    "a tar's name of 2^60 bytes": ("tar", lambda files: tar_of(tar_header(size=2**60, kind=b"L"), photo())),
    "a tar's pax header of 2^60 bytes": ("tar", lambda files: tar_of(tar_header(size=2**60, kind=b"x"), photo())),
    "a tar's pax header of digits": (
        "tar",
        lambda files: tar_of(*[tar_header(size=60_000, kind=b"x") + b"1" * 60_416] * 9),
    ),
    "a streamed file of 2^80 bytes": ("stream", lambda files: tar_of(tar_header(size=2**80), photo())),
    "a streamed file of less than no bytes": ("stream", lambda files: tar_of(tar_header(size=-2048), photo())),
    "a streamed tar that is a bomb": ("stream", lambda files: {"shards/a.tar": gzipped_zeros(600 << 20)}),
    "a zip's file of 4 GB": ("zip", lambda files: zip_of(size=2**32 - 2)),
    "a zip's file that begins far away": ("zip", lambda files: zip_of(offset=2**32 - 2)),
    "a zip's file that is larger than it claims": ("zip", lambda files: zip_of(size=10)),
    "a database whose root is far away": ("lmdb", lambda files: database_of(files, 128, 2**62)),
    "a database whose root is its head": ("lmdb", lambda files: database_of(files, 128, 0)),
    "a database of 2^60 keys": ("lmdb", lambda files: database_of(files, 120, 2**60)),
    "a PNG of 2^31 px": ("pictures", lambda files: {"a.png": png_of(2**31 - 1, 2**31 - 1)}),
    "a PNG of 60,000 px": ("pictures", lambda files: {"a.png": png_of(60_000, 60_000)}),
    "a JPEG of 65,500 px": (
        "pictures",
        lambda files: {"a.jpg": patched(files["a.jpg"], (b"\x08\0\x10\0\x10", b"\x08\xff\xdc\xff\xdc"))},
    ),
    "a GIF of 65,535 px": ("pictures", lambda files: {"a.gif": files["a.gif"][:6] + b"\xff" * 4 + files["a.gif"][10:]}),
    "a BMP of 2^30 px": (
        "pictures",
        lambda files: {"a.bmp": files["a.bmp"][:18] + struct.pack("<ii", 2**30, 2**30) + files["a.bmp"][26:]},
    ),
    "a PPM of 10^9 px": ("pictures", lambda files: {"a.ppm": b"P6\n1000000000 1000000000\n255\n" + bytes(99)}),
    "labels in a million brackets": ("labels", lambda files: {**files, "photos/dataset.json": DEEP}),
    "a class of 4,000 digits": (
        "labels",
        lambda files: {**files, "photos/dataset.json": b'{"labels": [["sub/0.png", ' + b"9" * 4000 + b"]]}"},
    ),
    "landmarks in a million brackets": ("labels", lambda files: {**files, "points.json": b'{"sub/0.png":' + DEEP + b"}"}),  # noqa: E501
    "settings that merge": ("config", lambda files: {"config.yaml": MERGES.encode()}),
    "settings of aliases": ("config", lambda files: {"config.yaml": ALIASES.encode()}),
    "settings in brackets": ("config", lambda files: {"config.yaml": b"kimg: " + DEEP[:20_000]}),
    "settings of a number of a megabyte": ("config", lambda files: {"config.yaml": b"kimg: 0x" + b"f" * 10**6}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of libraries, of what they read
@pytest.mark.parametrize("name", CLAIMS)
def test_what_claims_to_be_enormous_is_refused_at_once(name: str, tmp_path: Path) -> None:
    target, made = CLAIMS[name]
    reading = Reading(TARGETS[target], tmp_path)
    case = reading.read(made(reading.valid))
    assert case.wrong == ""
    assert case.seconds < AT_ONCE_S
    assert case.memory < LITTLE
    if not name.startswith("a tar's"):  # of which what is whole is read
        assert case.message is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": MERGES.encode()},
        {"config.yaml": ALIASES.encode()},
        {"config.yaml": b"a: " + b"- " * 100_000},
        {"stats.jsonl": DEEP + b"\n"},
        {"stats.jsonl": b'{"images_seen": ' + b"9" * 4000 + b', "a": ' + b"9" * 4000 + b"}\n"},
        {"metrics.jsonl": b'{"images_seen": 5, "metric": "m", "results": ' + DEEP + b"}\n"},
        {"state-000001.000/state.json": DEEP},
        {"grids/000001.000.png": png_of(12_000, 12_000)},
        {"log.txt": b"x" * 10**7},
    ],
)  # fmt: skip
def test_a_page_is_made_whatever_a_run_claims(files: Files, tmp_path: Path) -> None:
    reading = Reading(TARGETS["report"], tmp_path)
    case = reading.read(reading.valid | files)
    assert (case.wrong, case.message) == ("", None)
    assert case.seconds < AT_ONCE_S
    assert case.memory < LITTLE


def test_an_index_cannot_come_round_to_the_beginning(tmp_path: Path) -> None:
    """Offset and size of a row, added as what they are stored as, are small again."""
    reading = Reading(TARGETS["dataset"], tmp_path)
    index = np.load(io.BytesIO(reading.valid["index.npy"]))
    index["offset"][1] = 2**64 - 100
    content = io.BytesIO()
    np.save(content, index)
    case = reading.read(reading.valid | {"index.npy": content.getvalue()})
    assert case.wrong == ""
    assert "places sample 00000001 outside of its shard" in (case.message or "")


OUTSIDE = ("../a.png", "/etc/passwd", "a/../../b.png", "..", "../../x/c.png")


def test_names_in_archives_lead_nowhere(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in (*OUTSIDE, "in.png"):
            archive.writestr(name, photo())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (*OUTSIDE, "in.png"):
            info = tarfile.TarInfo(name)
            info.size = len(photo())
            tar.addfile(info, io.BytesIO(photo()))
    for name in ("a.zip", "a.tar"):
        source = open_source(tmp_path / name)
        assert source.files == ("in.png",)
        assert {skipped.reason for skipped in source.skipped} == {"outside the archive"}


def test_links_and_devices_in_archives_are_no_files(tmp_path: Path) -> None:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{number}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("in.png")
        info.size = len(photo())
        tar.addfile(info, io.BytesIO(photo()))
    members, faults = scan_tar(tmp_path / "a.tar")
    assert ([member.name for member in members], faults) == (["in.png"], [])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert open_source(tmp_path / "a.zip").read("link.png") == b"/etc/passwd", "its text, not what it points to"


@pytest.mark.parametrize("file", ["../x.tar", "/etc/passwd", "a/b.tar", "..", ".", "", "a\0b", 7, None, ["a.tar"]])
def test_a_manifest_names_files_of_its_folder_only(file: object, tmp_path: Path) -> None:
    reading = Reading(TARGETS["dataset"], tmp_path)
    values = json.loads(reading.valid["manifest.json"])
    for record in (values["shards"][0], values["index"], values["labels"]):
        changed = json.loads(json.dumps(values))
        next(one for one in (*changed["shards"], changed["index"], changed["labels"]) if one == record)["file"] = file
        with pytest.raises((ValueError, TypeError)):
            Manifest.from_json(json.dumps(changed))


@pytest.mark.parametrize("name", ["../x", "/x", "..", "", "a/b", "a\0b"])
def test_the_name_of_data_leads_nowhere(name: str, tmp_path: Path) -> None:
    """Runs have it in the names of their folders."""
    reading = Reading(TARGETS["dataset"], tmp_path)
    with pytest.raises(ValueError, match="a name or another text in it is none"):
        Manifest.from_json(json.dumps(json.loads(reading.valid["manifest.json"]) | {"name": name}))


def test_the_streamed_tar_may_be_compressed(tmp_path: Path) -> None:
    """What is refused of a bomb is its size, not that it is compressed."""
    reading = Reading(TARGETS["stream"], tmp_path)
    for pack in (gzip.compress, __import__("bz2").compress, __import__("lzma").compress):
        case = reading.read({"shards/a.tar": pack(reading.valid["shards/a.tar"])})
        assert (case.wrong, case.message) == ("", None)


def test_the_pictures_are_what_the_claims_change() -> None:
    """The claims are about the very bytes that say how large a picture is."""
    jpeg = patched(photo(1, "jpg", RES), (b"\x08\0\x10\0\x10", b"\x08\0\x20\0\x30"))
    assert Image.open(io.BytesIO(jpeg)).size == (0x30, 0x20)
