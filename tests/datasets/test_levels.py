"""Smaller levels of a dataset: what they hold, where training finds them, and what is said when they are damaged."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import webdataset

from stylepipe.cli.main import main
from stylepipe.datasets import cache
from stylepipe.datasets.cache import dataset_for_training, levels_for_training
from stylepipe.datasets.levels import box_averages, build_levels, level_resolutions
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.reader import Reader
from stylepipe.datasets.shards import LEVELS_FOLDER, ShardDataset, open_dataset, stored_levels
from stylepipe.datasets.verifying import find_faults
from stylepipe.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep these tests out of the user's cache."""
    monkeypatch.setenv("STYLEPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def out(photos: Path, tmp_path: Path) -> Path:
    """Give the folder of 23 labelled images of 32 px with levels of 4, 8 and 16 px, in several shards."""
    prepare(
        photos,
        tmp_path / "out",
        Preparation(32, labels=True, levels=True, shard_mb=8192 / 2**20),
        workers=1,
        progress=False,
    )
    return tmp_path / "out"


@pytest.fixture
def plain(photos: Path, tmp_path: Path) -> Path:
    """Give the same folder without levels."""
    prepare(photos, tmp_path / "plain", Preparation(32, labels=True, shard_mb=8192 / 2**20), workers=1, progress=False)
    return tmp_path / "plain"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reference(images: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.float64]:
    """Average squares of [n, R, R, 3] to [n, side, side, 3] in double precision, halves to even."""
    n, R = images.shape[:2]
    blocks = images.reshape(n, side, R // side, side, R // side, 3).astype(np.float64)
    return np.rint(blocks.mean(axis=(2, 4)))


@pytest.mark.parametrize("resolution", [8, 64, 1024])
def test_a_level_is_the_box_average_rounded_once(resolution: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
    for pixels in (noise, np.full_like(noise, 255), noise % 2):
        averages = list(box_averages(pixels))
        assert [len(average) for average in averages] == level_resolutions(resolution)
        for average in averages:
            assert average.dtype == np.uint8
            assert (average == reference(pixels[None], len(average))[0]).all()


def test_which_levels_there_are() -> None:
    assert level_resolutions(1024) == [4, 8, 16, 32, 64, 128, 256, 512]
    assert level_resolutions(64, 16) == [16, 32]
    assert level_resolutions(8) == [4]
    assert level_resolutions(8, 8) == level_resolutions(8, 16) == []
    for lowest in (0, 2, 6):
        with pytest.raises(UserError, match=f"levels from {lowest} px: expected a power of two, 4 or more"):
            level_resolutions(64, lowest)


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_stored_levels_are_averages_of_the_stored_images(photos: Path, tmp_path: Path, image_format: str) -> None:
    prepare(
        photos,
        tmp_path / "o",
        Preparation(256, format=image_format, min_size=1, levels=True),
        workers=1,
        progress=False,
    )
    full = open_dataset(tmp_path / "o")
    assert stored_levels(full.levels) == [4, 8, 16, 32, 64, 128]
    images = full.read(range(23))
    for side in stored_levels(full.levels):
        level = full.level(side)
        assert level.manifest.image_format == (image_format if side > 64 else "ppm")
        difference = np.abs(level.read(range(23)) - reference(images, side))
        # Averages are taken before JPEG, at 128 px stored as JPEG again; quality 95 is off by a level or two.
        assert difference.max() == 0 if image_format == "png" else difference.mean() < 1


def same_but_for_resolution(level: ShardDataset, full: ShardDataset) -> None:
    ids = range(len(full))
    assert len(level) == len(full)
    assert (level.name, level.c_dim, level.manifest.classes) == (full.name, full.c_dim, full.manifest.classes)
    assert (level.labels(ids) == full.labels(ids)).all()
    assert (level.read(ids) == reference(full.read(ids), level.resolution)).all()


def test_labels_and_order_are_those_of_the_full_images(out: Path) -> None:
    full = open_dataset(out, 32)
    assert full.level(32) is full
    for resolution in (4, 8, 16):
        level = full.level(resolution)
        assert level.resolution == resolution
        assert (level.of_class(1) == full.of_class(1)).all()
        same_but_for_resolution(level, full)
        same_but_for_resolution(pickle.loads(pickle.dumps(level)), full)
    same_but_for_resolution(pickle.loads(pickle.dumps(full)).level(8), full)


def test_a_reader_of_a_level_gives_the_same_order_smaller(out: Path) -> None:
    full = open_dataset(out)
    order = full.order(0, seed=3)
    batches = [next(iter(Reader(d, order, batch_size=8, mirror=True, start=16))) for d in (full, full.level(8))]
    assert (batches[1].positions == batches[0].positions).all()
    assert (batches[1].labels == batches[0].labels).all()
    assert (batches[1].images.numpy() == reference(batches[0].images.numpy(), 8)).all()


def test_label_vectors_are_in_the_levels_too(
    photos: Path, tmp_path: Path, in_stored_order: Callable[[list[Any]], list[Any]]
) -> None:
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.*"))
    vectors = np.random.default_rng(0).normal(size=(23, 3)).astype(np.float32)
    pairs = [[name, vector.tolist()] for name, vector in zip(names, vectors, strict=True)]
    (photos / "dataset.json").write_text(json.dumps({"labels": pairs}))
    prepare(photos, tmp_path / "out", Preparation(32, labels=True, levels=True), workers=1, progress=False)
    full = open_dataset(tmp_path / "out")
    assert (full.labels(range(23)) == in_stored_order(list(vectors))).all()
    same_but_for_resolution(full.level(8), full)
    build_levels(full, tmp_path / "built", workers=1, progress=False)
    assert tree(tmp_path / "built") == tree(full.levels)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_streams_a_level(out: Path) -> None:
    level = open_dataset(out).level(8)
    tars = [str(tar) for tar in sorted(level.path.glob("*.tar"))]
    samples = list(
        webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil").to_tuple("ppm", "cls")
    )
    assert (np.stack([np.asarray(image) for image, _ in samples]) == level.read(range(23))).all()
    assert [label for _, label in samples] == level.labels(range(23)).argmax(1).tolist()
    gc.collect()


def test_the_number_of_workers_changes_no_byte(photos: Path, out: Path, plain: Path, tmp_path: Path) -> None:
    prepare(
        photos,
        tmp_path / "three",
        Preparation(32, labels=True, levels=True, shard_mb=8192 / 2**20),
        workers=3,
        progress=False,
    )
    assert tree(out) == tree(tmp_path / "three")
    assert len(list((out / "levels" / "0016").glob("*.tar"))) > 1
    # The full images are the same without levels, and from them come the same levels.
    assert {name: data for name, data in tree(out).items() if not name.startswith("levels")} == tree(plain)
    for workers in (1, 3):
        build_levels(open_dataset(plain), tmp_path / f"built{workers}", workers=workers, progress=False)
        assert tree(tmp_path / f"built{workers}") == tree(out / "levels")


def test_a_folder_without_levels_opens(plain: Path) -> None:
    assert find_faults(plain, workers=1, progress=False) == []
    dataset = open_dataset(plain, 32)
    assert dataset.level(32) is dataset
    for resolution in (8, 64):
        with pytest.raises(UserError, match=rf"plain/levels: holds no images of {resolution} px; prepare .* --levels"):
            dataset.level(resolution)


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def test_a_cut_level_is_named(out: Path) -> None:
    shard = out / "levels" / "0008" / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-100])
    full = open_dataset(out)
    full.level(16).read([22])
    message = rf"levels/0008: shard-00001\.tar has .* bytes instead of .*; remove {out}/levels, and training makes it"
    with pytest.raises(UserError, match=message):
        full.level(8)
    faults = find_faults(out, workers=1, progress=False)
    assert {fault.file for fault in faults} == {"levels/0008/shard-00001.tar", "levels/0008/index.npy"}


def test_a_damaged_image_of_a_level_is_named(out: Path) -> None:
    level = open_dataset(out).level(8)
    flip_byte(level.path / "shard-00000.tar", int(level._index[1]["offset"]) + 4)  # in the header of the PPM
    level.read([0, 2])
    with pytest.raises(
        UserError,
        match=r"0008/shard-00000\.tar: sample 00000001 cannot be read .*not those that were stored.*remove .*/levels,",
    ):
        level.read([0, 1])
    faults = find_faults(out, workers=1, progress=False)
    assert {(fault.file, fault.key) for fault in faults} == {
        ("levels/0008/shard-00000.tar", ""),
        ("levels/0008/shard-00000.tar", "00000001"),
    }


def test_a_level_of_other_images_is_refused(photos: Path, out: Path, tmp_path: Path) -> None:
    (photos / "cats" / "000.png").unlink()
    (photos / "cats" / "001.png").symlink_to(photos / "dogs" / "005.jpg")  # as many images, but others
    prepare(photos, tmp_path / "other", Preparation(32, labels=True, levels=True), workers=1, progress=False)
    shutil.rmtree(out / "levels" / "0008")
    shutil.copytree(tmp_path / "other" / "levels" / "0008", out / "levels" / "0008")
    shutil.rmtree(out / "levels" / "0004")
    shutil.copytree(out / "levels" / "0016", out / "levels" / "0004")
    for resolution in (8, 4):
        with pytest.raises(UserError, match=rf"levels/000{resolution}: holds no level of the images in {out}; remove"):
            open_dataset(out).level(resolution)


def levels_of(folder: Path, resolution: int, lowest: int) -> ShardDataset:
    """Open a dataset as growing training does."""
    return open_dataset(folder, resolution, levels=levels_for_training(folder, lowest, workers=1))


def test_photographs_are_prepared_with_their_levels(photos: Path, own_cache: Path) -> None:
    folder = dataset_for_training(photos, 32, workers=1, labels=True, levels=4)
    assert levels_for_training(folder, 4) == folder / LEVELS_FOLDER
    same_but_for_resolution(levels_of(folder, 32, 4).level(4), open_dataset(folder))
    assert dataset_for_training(photos, 32, workers=1, labels=True) == folder  # the same one does without growing
    assert len(list((own_cache / "datasets").glob("*.lock"))) == 1


def test_levels_are_added_in_the_cache_to_what_was_prepared_without(photos: Path) -> None:
    folder = dataset_for_training(photos, 32, workers=1)
    before = tree(folder)
    assert dataset_for_training(photos, 32, workers=1, levels=4) == folder
    full = levels_of(folder, 32, 4)
    assert tree(folder) == before
    same_but_for_resolution(full.level(16), full)


def test_a_prepared_folder_is_never_written_to(plain: Path, own_cache: Path) -> None:
    before = tree(plain)
    assert dataset_for_training(plain, 32, workers=1, levels=8) == plain
    levels = levels_for_training(plain, 8)
    assert levels.is_relative_to(own_cache)
    written = (levels / "0008" / "manifest.json").stat().st_mtime_ns
    full = levels_of(plain, 32, 4)  # made from 4 px up, whatever was asked for
    assert full.levels == levels
    assert (levels / "0008" / "manifest.json").stat().st_mtime_ns == written
    assert tree(plain) == before
    for resolution in (4, 8, 16):
        same_but_for_resolution(full.level(resolution), full)
    same_but_for_resolution(pickle.loads(pickle.dumps(full)).level(8), full)
    moved = shutil.copytree(plain, plain.with_name("copy"))
    assert levels_for_training(moved, 4) == levels


def test_levels_of_its_own_are_used_where_they_suffice(out: Path, own_cache: Path) -> None:
    assert dataset_for_training(out, 32, workers=1, levels=4) == out
    shutil.rmtree(out / "levels" / "0004")
    assert levels_for_training(out, 8) == out / "levels"
    assert levels_for_training(out, 32) == out / "levels"  # growing from the full resolution needs none
    assert not own_cache.exists()
    assert levels_for_training(out, 4, workers=1).is_relative_to(own_cache)


def test_drawn_faces_have_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cache.DRAWN_COUNTS, 64, 5)
    folder = dataset_for_training(None, 64, workers=1, levels=8)
    full = levels_of(folder, 64, 8)
    assert full.levels == folder / LEVELS_FOLDER
    assert stored_levels(full.levels) == [4, 8, 16, 32]
    same_but_for_resolution(full.level(8), full)


def test_bad_levels_are_refused_before_anything_is_written(photos: Path, plain: Path, own_cache: Path) -> None:
    for data in (photos, plain, None):
        with pytest.raises(UserError, match="levels from 6 px"):
            dataset_for_training(data, 32, levels=6)
    assert not own_cache.exists()


def test_a_damaged_image_makes_no_levels(plain: Path, own_cache: Path) -> None:
    row = open_dataset(plain)._index[2]
    flip_byte(plain / f"shard-{row['shard']:05d}.tar", int(row["offset"]) + 3)
    with pytest.raises(UserError, match=r"plain/shard-0000.\.tar: sample 00000002 cannot be read"):
        levels_for_training(plain, 4, workers=1)
    assert [path.suffix for path in (own_cache / "datasets").iterdir()] == [".lock"]


KILLED = """
import os, signal, sys
from pathlib import Path
from stylepipe.datasets.cache import levels_for_training
from stylepipe.datasets.levels import LevelsWriter
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare

add, added = LevelsWriter.add, []
def add_and_die(self, *arguments):
    add(self, *arguments)
    added.append(arguments)
    if len(added) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
LevelsWriter.add = add_and_die
source, out = map(Path, sys.argv[1:])
how = Preparation(32, levels=True)
prepare(source, out, how, workers=1) if source != out else levels_for_training(out, 4, workers=1)
"""


def test_killed_half_way_nothing_half_written_is_used(photos: Path, plain: Path, own_cache: Path) -> None:
    out = plain.with_name("killed")
    for source, target in ((photos, out), (plain, plain)):
        done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target)], capture_output=True, timeout=60)
        assert done.returncode == -signal.SIGKILL
    left = [path for path in (own_cache / "datasets").iterdir() if path.is_dir()]
    assert [path.name[0] for path in left] == ["."]
    assert out.with_name(".killed.partial").is_dir()
    assert not out.exists()
    full = levels_of(plain, 32, 4)
    same_but_for_resolution(full.level(4), full)
    prepare(photos, out, Preparation(32, levels=True), workers=1, progress=False)
    assert find_faults(out, workers=1, progress=False) == []
    assert not left[0].exists()
    assert not out.with_name(".killed.partial").exists()


def test_several_processes_make_levels_once(plain: Path, own_cache: Path) -> None:
    script = f"""
import logging
from pathlib import Path
from stylepipe.datasets.cache import levels_for_training
logging.basicConfig(level=logging.INFO)
print(levels_for_training(Path({str(plain)!r}), 4, workers=1))
"""
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({out for out, _ in outputs}) == 1
    assert sum("preparing data once" in err for _, err in outputs) == 1


def test_the_command_names_the_levels(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(photos), str(tmp_path / "out"), "--res", "16", "--workers", "1", "--levels"]) == 0
    assert " at 16 px in " in (printed := capsys.readouterr().out)
    assert " and from 4 to 8 px (0." in printed
    assert stored_levels(tmp_path / "out" / "levels") == [4, 8]
