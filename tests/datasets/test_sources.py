"""Photographs in whatever holds them: the same dataset from each, and nothing lost without a word."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stylepipe.datasets.manifest import Skipped
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.shards import open_dataset
from stylepipe.datasets.sources import archive
from stylepipe.datasets.sources.opening import open_source
from stylepipe.datasets.sources.tars import scan_tar
from stylepipe.errors import UserError

PLAIN = Preparation(16)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def zipped(photos: Path, out: Path) -> Path:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name in reversed(files_of(photos)):
            file.write(photos / name, name)
    return out


def tarred(photos: Path, out: Path, names: Iterable[str] | None = None) -> Path:
    with tarfile.open(out, "w") as file:
        for name in reversed(files_of(photos)) if names is None else names:
            add(file, name, (photos / name).read_bytes())
    return out


def tar_shards(photos: Path, out: Path) -> Path:
    out.mkdir()
    names = files_of(photos)
    for number in range(3):
        tarred(photos, out / f"{number:03d}.tar", names[number::3])
    return out


def databased(photos: Path, out: Path) -> Path:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(out), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for name in files_of(photos):
            transaction.put(name.encode(), (photos / name).read_bytes())
    return out


HOLDERS: dict[str, Callable[[Path, Path], Path]] = {
    "photos.zip": zipped,
    "photos.tar": tarred,
    "photos": tar_shards,
    "photos.lmdb": databased,
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("labels", [False, True])
def test_whatever_holds_photographs_gives_the_same_dataset(
    photos: Path, tmp_path: Path, holder: str, labels: bool
) -> None:
    (photos / "notes.txt").write_text("no photograph")
    if labels:
        (photos / "notes.txt").unlink()
    how = Preparation(16, labels=labels)
    prepare(photos, tmp_path / "from folder", how, workers=1, progress=False)
    (tmp_path / "elsewhere").mkdir()
    held = HOLDERS[holder](photos, tmp_path / "elsewhere" / holder)
    prepare(held, tmp_path / "from it", how, workers=2, progress=False)
    assert contents(tmp_path / "from folder") == contents(tmp_path / "from it")


def test_a_label_file_within_a_zip(photos: Path, tmp_path: Path) -> None:
    (photos / "dataset.json").write_text(
        json.dumps({"labels": [[name, [float(i)]] for i, name in enumerate(files_of(photos))]})
    )
    manifest = prepare(
        zipped(photos, tmp_path / "a.zip"), tmp_path / "out", Preparation(16, labels=True), workers=1, progress=False
    )
    assert manifest.labels is not None
    assert not manifest.skipped
    assert open_dataset(tmp_path / "out").labels(range(23)).sum() == sum(range(23))


def test_a_label_file_is_no_photograph_that_failed(photos: Path, tmp_path: Path) -> None:
    (photos / "dataset.json").write_text("{}")
    assert not prepare(photos, tmp_path / "out", PLAIN, workers=1, progress=False).skipped


def webdataset_shards(tmp_path: Path, label: Callable[[int], tuple[str, bytes]]) -> Path:
    """Two shards of four samples: the label before the image, a caption beside it, dots in its name."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(4 * shard, 4 * shard + 4):
                picture = io.BytesIO()
                Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(picture, "PNG")
                suffix, text = label(i)
                add(tar, f"s/{i:03d}{suffix}", text)
                add(tar, f"s/{i:03d}.txt", b"a caption")
                add(tar, f"s/{i:03d}.seg.png", picture.getvalue()) if i == 7 else None
                add(tar, f"s/{i:03d}.png", picture.getvalue())
    return folder


def test_webdataset_shards_bring_their_classes(tmp_path: Path) -> None:
    folder = webdataset_shards(tmp_path, lambda i: (".cls", b"%d" % (i % 3)))
    manifest = prepare(folder, tmp_path / "out", Preparation(16, labels=True), workers=1, progress=False)
    dataset = open_dataset(tmp_path / "out")
    shades = dataset.read(range(9))[:, 0, 0, 0] // 10
    assert sorted(shades) == [0, 1, 2, 3, 4, 5, 6, 7, 7]
    assert dataset.labels(range(9)).argmax(axis=1).tolist() == (shades % 3).tolist()
    assert manifest.classes == ("0", "1", "2")
    assert not manifest.skipped


def test_webdataset_shards_bring_their_vectors(tmp_path: Path) -> None:
    folder = webdataset_shards(tmp_path, lambda i: (".json", json.dumps([i / 4, -1]).encode()))
    prepare(folder, tmp_path / "out", Preparation(16, labels=True), workers=1, progress=False)
    dataset = open_dataset(tmp_path / "out")
    shades = dataset.read(range(9))[:, 0, 0, 0] // 10
    assert (dataset.labels(range(9)) == np.stack([shades / 4, np.full(9, -1.0)], axis=1)).all()


def test_labels_beside_images_are_all_or_nothing(tmp_path: Path) -> None:
    folder = webdataset_shards(tmp_path, lambda i: (".cls" if i else ".other", b"1"))
    with pytest.raises(UserError, match=r"no label lies beside s/000\.png, though others have one"):
        prepare(folder, tmp_path / "out", Preparation(16, labels=True), workers=1, progress=False)


def test_a_label_that_is_none_is_named(tmp_path: Path) -> None:
    folder = webdataset_shards(tmp_path, lambda i: (".cls", b"cat"))
    with pytest.raises(UserError, match=r"the label of 's/000\.png' is \"cat\"; expected a class number"):
        prepare(folder, tmp_path / "out", Preparation(16, labels=True), workers=1, progress=False)


def test_equal_names_in_two_shards_are_two_images(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    names = files_of(photos)
    tarred(photos, folder / "a.tar", names[:3])
    tarred(photos, folder / "b.tar", [*names[2:5], names[3]])
    source = open_source(folder)
    assert set(source.files) == {*names[:3], f"b.tar/{names[2]}", *names[3:5]}
    assert source.skipped == (Skipped(names[3], "twice", "the archive holds another file of that name"),)


def test_splits_are_no_classes(photos: Path, tmp_path: Path) -> None:
    split = tmp_path / "data"
    shutil.copytree(photos, split / "train")
    shutil.copytree(photos, split / "validation")
    manifest = prepare(split, tmp_path / "out", Preparation(16, labels=True), workers=1, progress=False)
    assert (manifest.classes, manifest.count) == (("cats", "dogs"), 46)


def test_only_the_largest_copies_of_a_database_with_resolutions(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "db"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for side in (16, 32, 128):
            for i in range(3):
                picture = io.BytesIO()
                Image.new("RGB", (side, side), "red").save(picture, "JPEG")
                transaction.put(f"{side}-{i:05d}".encode(), picture.getvalue())
        transaction.put(b"length", b"3")
    source = open_source(tmp_path / "db")
    assert source.files == ("128-00000", "128-00001", "128-00002")
    assert {(s.file, s.reason) for s in source.skipped} == {
        (f"{side}-{i:05d}", "smaller copy") for side in (16, 32) for i in range(3)
    }
    image, pickled = source.read("128-00001"), pickle.dumps(source)
    del source  # a process opens a database once
    assert pickle.loads(pickled).read("128-00001") == image


def test_what_an_archive_holds_besides_is_named(photos: Path, tmp_path: Path) -> None:
    data = (photos / files_of(photos)[0]).read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("a.png", "../b.png", "/c.png", "__MACOSX/a.png", ".d/e.png", "cut.png"):
            file.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("a.png", data)
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    place = raw.rindex(data)  # the last but the duplicate is cut.png: of equal data, so count from the back
    place = raw.rindex(data, 0, place)
    raw[place + 5] ^= 1
    (tmp_path / "a.zip").write_bytes(raw)
    manifest = prepare(tmp_path / "a.zip", tmp_path / "out", PLAIN, workers=1, progress=False)
    assert manifest.count == 1
    assert {(s.file, s.reason) for s in manifest.skipped} == {
        *(("../b.png", "outside the archive"), ("/c.png", "outside the archive")),
        *(("__MACOSX/a.png", "hidden"), (".d/e.png", "hidden"), ("a.png", "twice"), ("cut.png", "unreadable")),
    }
    assert "CRC" in next(s.detail for s in manifest.skipped if s.file == "cut.png")


def test_an_encrypted_photograph_is_named(photos: Path, tmp_path: Path) -> None:
    zipped(photos, tmp_path / "a.zip")
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1  # in the central directory, of the first file
    (tmp_path / "a.zip").write_bytes(raw)
    (skipped,) = open_source(tmp_path / "a.zip").skipped
    assert (skipped.reason, skipped.detail) == ("unreadable", "encrypted")


def test_a_file_larger_than_it_claims_is_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_FILE_BYTES", 1000)
    (photos / "bomb.png").write_bytes(bytes(10**6))
    source = open_source(zipped(photos, tmp_path / "a.zip"))
    with pytest.raises(ValueError, match="larger than"):
        source.read("bomb.png")


BLOCK = 512


@pytest.fixture
def tar(photos: Path, tmp_path: Path) -> tuple[Path, list[str], list[int]]:
    """Give a tar of 23 photographs, their names, and where each header is."""
    path = tarred(photos, tmp_path / "a.tar", files_of(photos))
    with tarfile.open(path) as file:
        return path, file.getnames(), [member.offset for member in file.getmembers()]


def test_a_whole_tar_has_no_fault(tar: tuple[Path, list[str], list[int]]) -> None:
    path, names, _ = tar
    members, faults = scan_tar(path)
    assert [member.name for member in members] == names
    assert not faults


@pytest.mark.parametrize("lost", [0, 5, 22])
def test_a_flipped_bit_in_a_header_loses_one_file_and_says_so(
    tar: tuple[Path, list[str], list[int]], lost: int
) -> None:
    path, names, headers = tar
    raw = bytearray(path.read_bytes())
    raw[headers[lost] + 3] ^= 4
    path.write_bytes(raw)
    members, faults = scan_tar(path)
    assert [member.name for member in members] == [name for i, name in enumerate(names) if i != lost]
    assert faults == [f"no header at byte {headers[lost]:,}, where one should be"]


def test_a_tar_cut_between_two_files_says_so(tar: tuple[Path, list[str], list[int]], tmp_path: Path) -> None:
    path, names, headers = tar
    path.write_bytes(path.read_bytes()[: headers[9]])
    members, faults = scan_tar(path)
    assert [member.name for member in members] == names[:9]
    assert faults == ["its end is missing, and whatever stood before that"]
    manifest = prepare(path, tmp_path / "out", PLAIN, workers=1, progress=False)
    assert manifest.count == 9
    assert [(s.file, s.reason) for s in manifest.skipped] == [("a.tar", "damaged archive")]


def test_a_tar_cut_within_a_file_says_so(tar: tuple[Path, list[str], list[int]]) -> None:
    path, names, headers = tar
    for inside in (BLOCK + 1, BLOCK + 40):
        path.write_bytes(path.read_bytes()[: headers[9] + inside])
        members, faults = scan_tar(path)
        assert [member.name for member in members] == names[:9]
        assert faults == [f"cut within {names[9]}"]


def test_tars_in_one_file_are_all_read(tar: tuple[Path, list[str], list[int]], photos: Path, tmp_path: Path) -> None:
    path, names, _ = tar
    (photos / "more").mkdir()
    shutil.copy(photos / names[0], photos / "more" / "new.png")
    more = tarred(photos, tmp_path / "b.tar", ["more/new.png"])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + more.read_bytes())
    members, faults = scan_tar(path)
    assert [member.name for member in members] == [*names, "more/new.png"]
    assert faults == ["it goes on behind its end"]
    assert members[-1].offset == size + BLOCK


def test_long_names_and_links(photos: Path, tmp_path: Path) -> None:
    name = "x" * 150 + "/" + "y" * 120 + ".png"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, name, (photos / files_of(photos)[0]).read_bytes())
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(tmp_path / "a.tar")
    assert source.files == (name,)
    assert source.read(name) == (photos / files_of(photos)[0]).read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", bytes(2000), "is no tar archive"),
        ("a.tar", b"x" * 2000, "is no tar archive"),
        ("a.tar", b"", "is no tar archive"),
        ("a.tar.gz", b"\x1f\x8b" + bytes(100), "is compressed, .*decompress it first"),
        ("a.jpg", b"\xff\xd8" + bytes(100), "is a file of another kind; expected a folder of photographs, a zip"),
        ("a.zip", b"PK\x03\x04" + bytes(100), "is a file of another kind"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / name)
