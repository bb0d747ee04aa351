"""Labels of photographs: from dataset.json or from folders, as numbers or vectors, on disk and back."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from stylepipe.datasets.cache import dataset_for_training, label_dimensions
from stylepipe.datasets.labels import LABEL_FILE
from stylepipe.datasets.manifest import Manifest
from stylepipe.datasets.order import GlobalOrder
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.reader import Reader
from stylepipe.datasets.shards import ShardDataset, open_dataset
from stylepipe.datasets.verifying import find_faults
from stylepipe.errors import UserError

NAMES = ("a/0.png", "a/1.png", "b/0.png", "c.png")
VECTORS = ([0.1, -2], [1e-8, 3.5], [0, 0], [1, 1e30])


def photo(path: Path, size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((size, size), 50).convert("RGB").save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Give a folder of the photographs NAMES."""
    for name in NAMES:
        photo(tmp_path / "in" / name)
    return tmp_path / "in"


def label(source: Path, labels: object) -> None:
    """Write the label file."""
    (source / LABEL_FILE).write_text(json.dumps({"labels": labels}))


def prepared(source: Path, **options: object) -> ShardDataset:
    out = source.parent / "out"
    prepare(source, out, Preparation(16, labels=True, **options), workers=1, progress=False)
    assert find_faults(out, workers=1, progress=False) == []
    return open_dataset(out)


def test_class_numbers_of_a_label_file(source: Path, in_stored_order: Callable[[list[int]], list[int]]) -> None:
    label(source, list(zip(NAMES[::-1], (2, 0, 1, 0), strict=True)))
    dataset = prepared(source)
    assert dataset.manifest.classes == ("0", "1", "2")
    expected = in_stored_order([0, 1, 0, 2])
    assert dataset.labels(range(4)).argmax(axis=1).tolist() == expected
    assert dataset.of_class(0).tolist() == [sample for sample, number in enumerate(expected) if number == 0]
    assert dataset.manifest.skipped == ()  # the label file is no photograph that failed


def test_vectors_of_a_label_file(source: Path, in_stored_order: Callable[[list[Any]], list[Any]]) -> None:
    label(source, list(zip(NAMES, VECTORS, strict=True)))
    dataset = prepared(source)
    assert (dataset.c_dim, dataset.manifest.classes) == (2, None)
    labels = dataset.labels([3, 0, 0])
    assert labels.dtype == np.float32
    assert (labels == np.array(in_stored_order(VECTORS), dtype=np.float32)[[3, 0, 0]]).all()
    assert dataset.labels([]).shape == (0, 2)
    batch = next(iter(Reader(dataset, GlobalOrder(len(dataset), 0), batch_size=4)))
    assert sorted(batch.labels[:, 1].tolist()) == sorted(np.float32([v[1] for v in VECTORS]).tolist())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_streams_vectors_without_loss(source: Path) -> None:
    label(source, list(zip(NAMES, VECTORS, strict=True)))
    dataset = prepared(source, shard_mb=4096 / 2**20)
    tars = [str(tar) for tar in sorted(dataset.path.glob("*.tar"))]
    assert len(tars) > 1
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode().to_tuple("json"))
    assert (np.array([vector for (vector,) in samples], dtype=np.float32) == dataset.labels(range(4))).all()
    gc.collect()


def test_a_manifest_of_another_version_or_kind_is_refused(source: Path) -> None:
    label(source, list(zip(NAMES, VECTORS, strict=True)))
    manifest = json.loads((prepared(source).path / "manifest.json").read_text())
    for damaged in (manifest | {"format_version": 1}, [manifest], "a"):
        with pytest.raises(ValueError, match=r"it names labels, which format version 1 has not|it is no JSON object"):
            Manifest.from_json(json.dumps(damaged))


def test_damaged_vectors_are_named(source: Path) -> None:
    label(source, list(zip(NAMES, VECTORS, strict=True)))
    path = prepared(source).path
    data = (path / "labels.npy").read_bytes()
    (path / "labels.npy").write_bytes(data[:-8] + data[:8])
    assert [fault.file for fault in find_faults(path, workers=1, progress=False)] == ["labels.npy"]
    np.save(path / "labels.npy", np.zeros((2, 4), dtype=np.float32))  # of the same number of bytes
    with pytest.raises(UserError, match=r"labels\.npy does not hold 4 label vectors"):
        open_dataset(path)
    (path / "labels.npy").unlink()
    with pytest.raises(UserError, match=r"labels\.npy is missing"):
        open_dataset(path)


def entries(*labels: object) -> str:
    return json.dumps({"labels": list(zip(NAMES, labels, strict=True))})


MISTAKES = {
    "no JSON": ("{", "is not JSON"),
    "no UTF-8": ("\udcff", "is not JSON"),
    "deeper than JSON is read": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "has no list of 'labels'"),
    "null, as unlabelled data have it": ('{"labels": null}', "has no list of 'labels'"),
    "no entries": ('{"labels": []}', "has no list of 'labels'"),
    "another entry": ('{"labels": [["a/0.png"]]}', r'an entry of \'labels\' is \["a/0.png"\]'),
    "named twice": (entries(0, 1, 1, 0).replace('"c.png"', '"a/0.png"'), r"more than once: a/0\.png"),
    "a photograph missed": (json.dumps({"labels": [[n, 0] for n in NAMES[:2]]}), r"has no label for b/0\.png, c\.png;"),
    "no such photograph": (entries(0, 1, 1, 0).replace("c.png", "d.png"), r"not in the folder: d\.png"),
    "negative": (entries(0, 1, -1, 0), r"label of 'b/0\.png' is -1; expected a class number from 0"),
    "gaps": (entries(0, 1, 3, 0), "no photograph has the label 2, but some have 3"),
    "gaps, far": (entries(0, 1, 10**15, 0), "no photograph has the label 2, but some have 10"),
    "no zero": (entries(1, 2, 3, 3), "no photograph has the label 0"),
    "a fraction": (entries(0, 1, 1.5, 0), "label of 'b/0.png' is 1.5"),
    "true": (entries(0, 1, True, 0), "label of 'b/0.png' is true"),
    "text": (entries("cat", "dog", "dog", "cat"), "label of 'a/0.png' is \"cat\""),
    "nothing": (entries(0, None, 1, 0), "label of 'a/1.png' is null"),
    "an empty vector": (entries([], [], [], []), r"label of 'a/0.png' is \[\]"),
    "not a number": (entries([0.0], [1], [float("nan")], [2]), r"label of 'b/0.png' is \[NaN\]"),
    "infinite": (entries([0.0], [1], [float("-inf")], [2]), r"label of 'b/0.png' is \[-Infinity\]"),
    "beyond float32": (entries([0.0], [1], [1e39], [2]), r"label of 'b/0.png' is \[1e\+39\]"),
    "mixed": (entries(0, 1, [0.5], 0), "'b/0.png' is a list of 1 and that of 'a/0.png' a class number"),
    "two lengths": (entries([0], [1, 2], [3], [4]), "'a/1.png' is a list of 2 and that of 'a/0.png' a list of 1"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_labels_that_do_not_fit_are_refused(source: Path, text: str, message: str) -> None:
    (source / LABEL_FILE).write_bytes(os.fsencode(text))
    with pytest.raises(UserError, match=message) as error:
        prepared(source)
    assert str(source / LABEL_FILE) in str(error.value)
    assert not (source.parent / "out").exists()


def test_what_is_no_photograph_needs_no_label(source: Path) -> None:
    (source / "notes.txt").write_text("not a photograph")
    photo(source / "small.png", size=5)
    label(source, [[name, 0] for name in (*NAMES, "small.png")])
    manifest = prepared(source).manifest
    assert manifest.count == 4
    assert {s.file: s.reason for s in manifest.skipped} == {
        "notes.txt": "unreadable",
        "small.png": "smaller than 16 px",
    }


def test_names_that_are_no_utf8_can_be_labelled(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    photo(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.png").rename(tmp_path / "in" / name)
    label(tmp_path / "in", [[name, 0]])
    assert prepared(tmp_path / "in").c_dim == 1


def test_a_class_of_which_nothing_is_left_is_named(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    photo(source / "b" / "0.png", size=5)
    (source / "c.png").unlink()
    with caplog.at_level(logging.WARNING, "stylepipe"):
        assert prepared(source).manifest.classes == ("a", "b")
    assert "none of the photographs gives an image of class b" in caplog.text


def test_the_label_file_is_part_of_what_the_cache_goes_by(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEPIPE_CACHE", str(tmp_path / "cache"))
    c_dims = []
    for labels in ((0, 0, 0, 0), (0, 1, 0, 1), VECTORS):
        label(source, list(zip(NAMES, labels, strict=True)))
        os.utime(source / LABEL_FILE, ns=(0, len(c_dims)))
        c_dims.append(open_dataset(dataset_for_training(source, 16, workers=1, labels=True)).c_dim)
        assert label_dimensions(source) == c_dims[-1]
    assert c_dims == [1, 2, 2]
    with pytest.raises(UserError, match="built-in faces have no labels"):
        label_dimensions(None)
