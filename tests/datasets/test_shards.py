"""The prepared dataset on disk: what it holds, and what is said when it is damaged."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.shard_files import LocalShards
from stylepipe.datasets.shards import ShardDataset, file_sha256, load_manifest, open_dataset
from stylepipe.datasets.verifying import find_faults
from stylepipe.errors import UserError


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_streams_the_tars(prepared: Path, dataset: ShardDataset) -> None:
    tars = [str(tar) for tar in sorted(prepared.glob("*.tar"))]
    assert len(tars) > 1
    samples = list(
        webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil").to_tuple("png", "cls")
    )
    assert len(samples) == len(dataset) == 23
    images = dataset.read(range(23))
    labels = dataset.labels(range(23))
    for i, (image, label) in enumerate(samples):
        assert (np.asarray(image) == images[i]).all()
        assert labels[i].argmax() == label
    gc.collect()


def test_random_access_in_any_order(dataset: ShardDataset) -> None:
    images = dataset.read(range(23))
    assert images.shape == (23, 16, 16, 3)
    assert images.dtype == np.uint8
    ids = [22, 0, 7, 7]
    assert (dataset.read(ids) == images[ids]).all()
    assert dataset.read([]).shape == (0, 16, 16, 3)


def test_labels_are_one_hot_in_the_order_of_the_class_names(
    dataset: ShardDataset, in_stored_order: Callable[[list[Any]], list[Any]]
) -> None:
    assert dataset.manifest.classes == ("cats", "dogs")
    assert dataset.c_dim == 2
    labels = dataset.labels(range(23))
    assert labels.dtype == np.float32
    assert labels.tolist() == in_stored_order([[1, 0]] * 12 + [[0, 1]] * 11)  # by path: cats/, then dogs/


def test_without_labels_c_dim_is_zero(photos: Path, tmp_path: Path) -> None:
    prepare(photos, tmp_path / "out", Preparation(8), workers=1, progress=False)
    dataset = open_dataset(tmp_path / "out", 8)
    assert dataset.c_dim == 0
    assert dataset.labels([0, 1]).shape == (2, 0)


def test_jpeg_shards(photos: Path, tmp_path: Path) -> None:
    prepare(photos, tmp_path / "jpeg", Preparation(32, format="jpeg"), workers=1, progress=False)
    prepare(photos, tmp_path / "png", Preparation(32), workers=1, progress=False)
    jpeg, png = (open_dataset(tmp_path / name).read(range(23)).astype(float) for name in ("jpeg", "png"))
    # Quality 95 at 4:4:4 on smooth pictures: an error of one or two levels.
    assert 0 < np.abs(jpeg - png).mean() < 2


def test_pickling_does_not_carry_the_index(dataset: ShardDataset) -> None:
    dataset.read([0])
    data = pickle.dumps(dataset)
    copy = pickle.loads(data)
    assert (copy.read([3, 22]) == dataset.read([3, 22])).all()


@pytest.mark.parametrize("field", ["offset", "shard"])
def test_an_index_that_points_outside_of_its_shard_is_refused(prepared: Path, field: str) -> None:
    path = prepared / "index.npy"
    index = np.load(path)
    index[field][17] += 10**6 if field == "offset" else 1
    np.save(path, index)
    with pytest.raises(UserError, match=r"index\.npy places sample 00000017 outside of its shard; copy"):
        open_dataset(prepared)


def test_a_manifest_that_counts_otherwise_than_its_shards_is_refused(prepared: Path) -> None:
    path = prepared / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][1]["samples"] += 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"manifest\.json counts 23 images and others by shard"):
        open_dataset(prepared)


def test_a_manifest_with_an_empty_shard_is_refused(prepared: Path) -> None:
    path = prepared / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][1]["samples"] = 0
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"manifest\.json names a shard without images"):
        open_dataset(prepared)


def test_images_of_another_size_than_the_manifest_says_are_told_at_once(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    dataset.check_headers()
    path = prepared / "manifest.json"
    path.write_text(path.read_text().replace('"resolution": 16', '"resolution": 32'))
    with pytest.raises(UserError, match=r"shard-00000\.tar: sample 00000000 cannot be read \(it is 16x16 pixels\)"):
        open_dataset(prepared).check_headers()


def test_the_header_of_an_image_of_every_shard_is_looked_at(prepared: Path, dataset: ShardDataset) -> None:
    first = dataset.ranges_of_shards()[2].start
    shard = prepared / dataset.manifest.shards[2].file
    data = bytearray(shard.read_bytes())
    data[int(dataset._index["offset"][first]) + 30] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=rf"{first:08d} cannot be read \(its bytes are not those that were stored\)"):
        open_dataset(prepared).check_headers()


def open_tars(folder: Path) -> int:
    return sum(file.path.startswith(f"{folder}/shard-") for file in psutil.Process().open_files())


def test_few_files_are_kept_open(prepared: Path, dataset: ShardDataset) -> None:
    images = dataset.read(range(23))
    dataset.close()
    assert open_tars(prepared) == 0
    shards = LocalShards(prepared, dataset.manifest.shards, limit=2)
    few = ShardDataset(prepared, dataset.manifest, shards=shards)
    ids = np.random.default_rng(0).integers(0, 23, 50)
    assert (few.read(ids) == images[ids]).all()
    assert open_tars(prepared) == 2
    held = [shards.open(shard) for shard in range(4)]
    assert [file.read(5, 257) for file in held] == [b"ustar"] * 4, "what is in use is not closed"
    assert open_tars(prepared) == 4
    del held, few, shards
    assert open_tars(prepared) == 0


def test_threads_read_side_by_side(prepared: Path, dataset: ShardDataset) -> None:
    images = dataset.read(range(23))
    few = ShardDataset(prepared, dataset.manifest, shards=LocalShards(prepared, dataset.manifest.shards, limit=1))
    ids = np.random.default_rng(0).integers(0, 23, (8, 200))
    with ThreadPoolExecutor(8) as pool:
        for read, wanted in zip(pool.map(few.read, ids), ids, strict=True):
            assert (read == images[wanted]).all()


def test_a_manifest_survives_json(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    assert manifest.from_json(manifest.to_json()) == manifest
    assert manifest.count == sum(shard.samples for shard in manifest.shards) == 23
    assert manifest.name == "photos"


def test_another_resolution_is_refused(prepared: Path) -> None:
    with pytest.raises(UserError, match=r"holds images of 16 px, and 64 px are asked for; use --res 16"):
        open_dataset(prepared, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text("x"), "is a file"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: (path.mkdir(), (path / "a.jpg").write_text("x")), "prepare it first"),
        (lambda path: (path.mkdir(), (path / "a.tar").write_text("x")), "not made by `stylepipe prepare`"),
        (lambda path: (path.mkdir(), (path / "manifest.json").write_text("{")), "is not the manifest"),
        (lambda path: (path.mkdir(), (path / "manifest.json").write_text("[]")), "is not the manifest"),
        (lambda path: (path.mkdir(), (path / "manifest.json").write_text('{"format": "x"}')), "is not the manifest"),
    ],
)
def test_what_is_no_dataset_is_named(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "data"
    make(path)  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as error:
        open_dataset(path)
    assert str(path) in str(error.value)


def edit_manifest(prepared: Path, **changes: object) -> None:
    path = prepared / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", [1, 2])
def test_folders_of_earlier_versions_are_read(prepared: Path, dataset: ShardDataset, version: int) -> None:
    """Their index has no CRC, and in version 1 the manifest has no key for label vectors."""
    images, labels = dataset.read(range(23)), dataset.labels(range(23))
    index = np.load(prepared / "index.npy")
    columns = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("label", "<i4")])
    old = np.empty(len(index), columns)
    for name in columns.names:
        old[name] = index[name]
    np.save(prepared / "index.npy", old)
    manifest = json.loads((prepared / "manifest.json").read_text())
    record = manifest["index"] | {"bytes": (prepared / "index.npy").stat().st_size}
    record["sha256"] = file_sha256(prepared / "index.npy")
    if version == 1:
        del manifest["labels"]
    manifest |= {"index": record, "format_version": version}
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    assert find_faults(prepared, workers=1, progress=False) == []
    before = open_dataset(prepared)
    assert (before.read(range(23)) == images).all()
    assert (before.labels(range(23)) == labels).all()


def test_the_index_has_the_crc_of_each_image(prepared: Path) -> None:
    for row in np.load(prepared / "index.npy"):
        with open(prepared / f"shard-{row['shard']:05d}.tar", "rb") as file:
            file.seek(int(row["offset"]))
            assert zlib.crc32(file.read(int(row["size"]))) == row["crc"]


def test_a_later_format_version_is_refused(prepared: Path) -> None:
    edit_manifest(prepared, format_version=4)
    with pytest.raises(UserError, match="format version 4, and this stylepipe reads versions up to 3"):
        open_dataset(prepared)


def test_a_manifest_cannot_point_outside(prepared: Path) -> None:
    record = json.loads((prepared / "manifest.json").read_text())["shards"][0]
    edit_manifest(prepared, shards=[record | {"file": "../shard-00000.tar"}])
    with pytest.raises(UserError, match="none within its folder"):
        open_dataset(prepared)


def test_a_missing_shard_is_named(prepared: Path) -> None:
    (prepared / "shard-00001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.tar is missing"):
        open_dataset(prepared)


@pytest.mark.parametrize("name", ["shard-00000.tar", "index.npy"])
def test_a_truncated_file_is_named(prepared: Path, name: str) -> None:
    data = (prepared / name).read_bytes()
    (prepared / name).write_bytes(data[:-100])
    with pytest.raises(UserError, match=f"{name} has .* bytes instead of {len(data):,}"):
        open_dataset(prepared)


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def test_a_damaged_sample_is_named(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    row = dataset._index[9]
    shard = prepared / dataset.manifest.shards[int(row["shard"])].file
    flip_byte(shard, int(row["offset"]) + 3)  # in the signature of the PNG
    dataset.read([8, 10])
    with pytest.raises(UserError, match=rf"{shard.name}: sample 00000009 cannot be read"):
        dataset.read([8, 9, 10])


def test_an_index_that_points_elsewhere_is_noticed(prepared: Path, tmp_path: Path) -> None:
    index = np.load(prepared / "index.npy")
    index["offset"][3] = index["offset"][4] + 1
    np.save(prepared / "index.npy", index)
    with pytest.raises(UserError, match=r"sample 00000003 cannot be read"):
        open_dataset(prepared).read([3])
    assert [fault.file for fault in find_faults(prepared, workers=1, progress=False)] == ["index.npy"]


def test_an_image_of_another_size_is_noticed(prepared: Path, photos: Path, tmp_path: Path) -> None:
    edit_manifest(prepared, resolution=32)
    with pytest.raises(UserError, match="it is 16x16 pixels"):
        open_dataset(prepared).read([0])


def test_a_shard_that_vanishes_while_training_is_named(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    shutil.rmtree(prepared)
    with pytest.raises(UserError, match=r"shard-00000\.tar: sample 00000000 cannot be read"):
        dataset.read([0])


def test_images_survive_without_loss(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "noise.png")
    prepare(tmp_path / "in", tmp_path / "out", Preparation(64), workers=1, progress=False)
    assert (open_dataset(tmp_path / "out").read([0])[0] == pixels).all()
