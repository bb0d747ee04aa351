"""What `--data` stands for, and what is kept in the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from stylepipe.datasets import cache
from stylepipe.datasets.cache import DRAWN_COUNTS, dataset_for_training
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.shards import open_dataset
from stylepipe.datasets.verifying import find_faults
from stylepipe.errors import UserError
from stylepipe.files import cache_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep these tests out of the user's cache."""
    monkeypatch.setenv("STYLEPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("STYLEPIPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/stylepipe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_folder() == Path("/home/user/.cache/stylepipe")


def test_a_prepared_folder_is_used_as_it_is(prepared: Path, own_cache: Path) -> None:
    assert dataset_for_training(str(prepared), 16, labels=True) == prepared
    assert not own_cache.exists()


def test_photographs_are_prepared_once(photos: Path, own_cache: Path) -> None:
    folder = dataset_for_training(photos, 16, workers=1)
    dataset = open_dataset(folder, 16)
    assert len(dataset) == 23
    assert dataset.name == "photos"
    assert folder.is_relative_to(own_cache)
    written = (folder / "manifest.json").stat().st_mtime_ns
    assert dataset_for_training(str(photos), 16, workers=2) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written


def test_they_are_prepared_again_when_anything_changes(photos: Path) -> None:
    folders = [dataset_for_training(photos, 16, workers=1)]
    folders.append(dataset_for_training(photos, 8, workers=1))
    folders.append(dataset_for_training(photos, 16, workers=1, labels=True))
    os.utime(photos / "cats" / "000.png", ns=(5, 5))
    folders.append(dataset_for_training(photos, 16, workers=1))
    (photos / "cats" / "000.png").rename(photos / "cats" / "new.png")
    folders.append(dataset_for_training(photos, 16, workers=1))
    assert len(set(folders)) == 5


def test_names_that_are_no_file_names_elsewhere(photos: Path) -> None:
    odd = photos.rename(photos.with_name("my: photos*顔"))
    assert open_dataset(dataset_for_training(odd, 16, workers=1)).name == "my: photos*顔"


def test_labels_that_are_absent_are_refused(photos: Path, tmp_path: Path) -> None:
    unlabelled = dataset_for_training(photos, 16, workers=1)
    with pytest.raises(UserError, match="has no labels; prepare it again with --labels"):
        dataset_for_training(unlabelled, 16, labels=True)
    with pytest.raises(UserError, match="no sub-folders to take labels from"):
        dataset_for_training(photos / "cats", 16, labels=True)
    with pytest.raises(UserError, match="built-in faces have no labels"):
        dataset_for_training(None, 16, labels=True)


def test_bad_data_is_refused_before_anything_is_written(prepared: Path, tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    for data, resolution, message in (
        (tmp_path / "missing", 16, "no such file or folder"),
        (tmp_path / "empty", 16, "holds no files"),
        (prepared, 32, "holds images of 16 px"),
        (None, 100, "--res 100: expected a power of two"),
    ):
        with pytest.raises(UserError, match=message):
            dataset_for_training(data, resolution)
    assert not own_cache.exists()


def test_a_cache_that_cannot_be_written_is_named(photos: Path, own_cache: Path) -> None:
    own_cache.write_text("a file")
    with pytest.raises(UserError, match="set STYLEPIPE_CACHE"):
        dataset_for_training(photos, 16, workers=1)


def test_enough_faces_are_drawn() -> None:
    assert list(DRAWN_COUNTS) == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert all(DRAWN_COUNTS[resolution] >= 4096 for resolution in (8, 16, 32, 64))


def test_drawn_faces_are_ordinary_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cache.DRAWN_COUNTS, 32, 40)
    folder = dataset_for_training(None, 32, workers=2)
    dataset = open_dataset(folder, 32)
    assert find_faults(folder, workers=1, progress=False) == []
    assert (len(dataset), dataset.name, dataset.c_dim) == (40, "drawn", 0)
    drawn = draw_face(39, 32)
    assert drawn.tobytes() == dataset.read([39]).tobytes()
    assert dataset_for_training(None, 32) == folder


def test_drawing_changed_faces_are_drawn_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(cache.DRAWN_COUNTS, 8, 4)
    folder = dataset_for_training(None, 8, workers=1)
    (tmp_path / "drawn.py").write_text("another way to draw")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    assert dataset_for_training(None, 8, workers=1) != folder


def test_several_processes_prepare_once(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.effect_noise((400, 400), 50).convert("RGB").save(tmp_path / "in" / f"{i}.png")
    script = f"""
import logging
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.cache import dataset_for_training
logging.basicConfig(level=logging.INFO)
print(dataset_for_training({str(tmp_path / "in")!r}, 256, workers=1))
"""
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({out for out, _ in outputs}) == 1
    assert sum("preparing data once" in err for _, err in outputs) == 1
    assert find_faults(outputs[0][0].strip(), workers=1, progress=False) == []
