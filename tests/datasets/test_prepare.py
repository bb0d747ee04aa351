"""From photographs to a dataset: the same for any number of workers, nothing lost without a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from plain_photo import photo

from stylepipe.cli.main import main
from stylepipe.datasets.manifest import Skipped
from stylepipe.datasets.photos import read_square
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.processes import in_tasks
from stylepipe.datasets.shards import open_dataset
from stylepipe.datasets.verifying import find_faults
from stylepipe.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_number_of_workers_changes_no_byte(photos: Path, tmp_path: Path) -> None:
    photo(photos / "small.png", size=(5, 5))
    (photos / "text.jpg").write_text("no image")
    for workers in (1, 2, 4):
        out = tmp_path / f"out{workers}"
        manifest = prepare(photos, out, Preparation(16, shard_mb=8192 / 2**20), workers=workers, progress=False)
        assert len(manifest.shards) > 1
        assert find_faults(out, workers=1, progress=False) == []
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") == contents(tmp_path / "out4")


def test_the_manifest_says_nothing_of_time_and_place(photos: Path, tmp_path: Path) -> None:
    prepare(photos, tmp_path / "a", Preparation(16), workers=1, progress=False)
    for path in photos.rglob("*"):
        os.utime(path, (1, 1))
    (tmp_path / "elsewhere").mkdir()
    moved = photos.rename(tmp_path / "elsewhere" / "photos")
    prepare(moved, tmp_path / "elsewhere" / "b", Preparation(16), workers=1, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "elsewhere" / "b")


def test_every_file_is_in_the_shards_or_named_with_its_reason(photos: Path, tmp_path: Path) -> None:
    photo(photos / "cats" / "small.png", size=(15, 99))
    photo(photos / ".hidden" / "a.png")
    photo(photos / "cats" / "._000.jpg.png")
    (photos / "notes.txt").write_text("not a photograph")
    (photos / "gone.jpg").symlink_to("nowhere")
    (photos / "loop").symlink_to(photos)
    os.mkfifo(photos / "pipe.jpg")
    manifest = prepare(photos, tmp_path / "out", Preparation(16), workers=2, progress=False)
    assert manifest.count == 23
    assert {(s.file, s.reason): s.detail for s in manifest.skipped} == {
        (".hidden", "hidden"): "",
        ("cats/._000.jpg.png", "hidden"): "",
        ("cats/small.png", "smaller than 16 px"): "15x99",
        ("gone.jpg", "unreadable"): "No such file or directory",
        ("loop", "loop"): "a symbolic link to a folder that holds it",
        ("notes.txt", "unreadable"): "not an image of a known format",
        ("pipe.jpg", "not a file"): "",
    }
    assert [s.file for s in manifest.skipped] == sorted(s.file for s in manifest.skipped)


def test_images_are_shuffled_once_from_the_order_of_the_bytes_of_their_names(
    tmp_path: Path, in_stored_order: Callable[[list[int]], list[int]]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    strange = os.fsdecode(b"caf\xe9.png")  # Latin-1, no UTF-8
    names = ["b.png", "a/z.png", "a.png", "B.png", "é.png", "顔 1.png", strange]
    shades = dict(zip(sorted(names, key=os.fsencode), range(0, 70, 10), strict=True))
    for name, shade in shades.items():
        photo(source / name, f"rgb({shade},0,0)")
    prepare(source, tmp_path / "out", Preparation(32), workers=1, progress=False)
    stored = open_dataset(tmp_path / "out").read(range(7))[:, 0, 0, 0].tolist()
    assert stored == in_stored_order(list(range(0, 70, 10))) != sorted(stored)
    prepare(source, tmp_path / "other", Preparation(32, shuffle_seed=1), workers=1, progress=False)
    other = open_dataset(tmp_path / "other").read(range(7))[:, 0, 0, 0].tolist()
    assert sorted(other) == sorted(stored)
    assert other != stored


def test_names_that_are_no_utf8_are_told(tmp_path: Path) -> None:
    source = tmp_path / "in"
    photo(source / "a.png")
    (source / os.fsdecode(b"bad\xff.png")).write_bytes(b"x")
    manifest = prepare(source, tmp_path / "out", Preparation(32), workers=1, progress=False)
    assert manifest.skipped == (Skipped("bad\\xff.png", "unreadable", "not an image of a known format"),)


def test_links_to_files_and_folders_are_followed(photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "links"
    source.mkdir()
    (source / "folder").symlink_to(photos / "cats")
    (source / "file.png").symlink_to(photos / "cats" / "000.png")
    assert prepare(source, tmp_path / "out", Preparation(16), workers=1, progress=False).count == 12 + 1


def test_labels_are_the_top_level_folders(tmp_path: Path) -> None:
    for name in ("b/x/1.png", "b/2.png", "a/3.png", "lost.png"):
        photo(tmp_path / "in" / name)
    manifest = prepare(tmp_path / "in", tmp_path / "out", Preparation(32, labels=True), workers=1, progress=False)
    assert manifest.classes == ("a", "b")
    assert manifest.skipped == (Skipped("lost.png", "without a class", "lies outside the sub-folders"),)
    assert open_dataset(tmp_path / "out").labels(range(3)).tolist() == [[1, 0], [0, 1], [0, 1]]


def test_labels_without_folders_are_refused(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match="no sub-folders to take labels from"):
        prepare(tmp_path / "in", tmp_path / "out", Preparation(32, labels=True), progress=False)


@pytest.mark.parametrize("resolution", [0, 4, 100, 2048, -8])
def test_only_powers_of_two(photos: Path, tmp_path: Path, resolution: int) -> None:
    with pytest.raises(UserError, match=rf"--res {resolution}: expected a power of two from 8 to 1024"):
        prepare(photos, tmp_path / "out", Preparation(resolution))


def test_a_source_that_cannot_be_is_named(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "file").write_text("x")
    for name, message in {
        "missing": "no such file or folder",
        "empty": "holds no files",
        "tars": "is no tar archive",
        "file": "is a file of another kind",
        "prepared": "is a prepared dataset already",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / name, tmp_path / "out", Preparation(16), progress=False)
        assert not (tmp_path / "out").exists()


def test_nothing_usable_leaves_nothing(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png", size=(16, 16))
    with pytest.raises(UserError, match=r"none of its 1 files.*a\.png: smaller than 32 px \(16x16\); use --min-size 1"):
        prepare(tmp_path / "in", tmp_path / "out", Preparation(32), workers=1, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_out_must_be_free_and_outside(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        with pytest.raises(UserError, match="exists already"):
            prepare(photos, tmp_path / name, Preparation(16), workers=1, progress=False)
    for inside in (photos, photos / "out", tmp_path / "full" / ".." / "photos" / "out"):
        with pytest.raises(UserError, match="lies inside SOURCE"):
            prepare(photos, inside, Preparation(16), workers=1, progress=False)
    (tmp_path / "vacant").mkdir()
    assert prepare(photos, tmp_path / "vacant", Preparation(16), workers=1, progress=False).count == 23
    assert (tmp_path / "full" / "x").read_text() == (tmp_path / "file").read_text() == "precious"


def test_out_below_a_file_cannot_be_written(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(photos, tmp_path / "file" / "out", Preparation(16), workers=1, progress=False)


def test_the_command_prints_one_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(photos / "small.png", size=(5, 5))
    (photos / "text.jpg").write_text("no image")
    out = tmp_path / "out"
    assert main(["prepare", str(photos), str(out), "--res", "16", "--workers", "1", "--format", "jpeg"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"23 images at 16 px in {out} (")
    assert printed.out.endswith("; skipped 1 smaller than 16 px, 1 unreadable (named in manifest.json)\n")
    assert json.loads((out / "manifest.json").read_text())["image_format"] == "jpeg"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--res", "100"], "--res 100: expected a power of two"),
        (["--res", "16", "--workers", "0"], "--workers 0: expected 1 or more"),
    ],
)
def test_mistakes_exit_with_two(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["prepare", str(photos), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--format", "gif"], ["--upscal"], []])
def test_unknown_options_exit_with_two(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["prepare", str(photos), str(tmp_path / "out"), *wrong])
    assert end.value.code == 2


def test_the_script_is_the_command(root: Path, photos: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(root / "launch" / "prepare.py")]
    arguments = [str(photos), str(tmp_path / "out"), "--res", "16", "--workers", "2"]
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("23 images at 16 px")


def test_tasks_cover_everything_once() -> None:
    for count, size in ((0, 3), (1, 3), (3, 3), (10, 3)):
        tasks = in_tasks(count, size)
        assert [i for task in tasks for i in task] == list(range(count))
        assert all(0 < len(task) <= size for task in tasks)


def test_awkward_photographs(shared: Path, tmp_path: Path) -> None:
    source = shared / "faces" / "awkward"
    manifest = prepare(source, tmp_path / "out", Preparation(64), workers=2, progress=False)
    assert find_faults(tmp_path / "out", workers=1, progress=False) == []
    reasons = [s.reason for s in manifest.skipped]
    assert manifest.count + len(reasons) == sum(path.is_file() for path in source.rglob("*")) == 58
    assert (reasons.count("unreadable"), reasons.count("smaller than 64 px"), reasons.count("hidden")) == (9, 5, 1)


def test_portraits_of_several_sizes(shared: Path, tmp_path: Path) -> None:
    source = shared / "faces" / "portraits_raw"
    manifest = prepare(source, tmp_path / "out", Preparation(256), workers=2, progress=False)
    # 22 portraits of 335x410 and one of 720x900 are large enough; the other 77 are 180 or 225 px wide.
    assert manifest.count == 23
    assert {s.detail for s in manifest.skipped} == {"225x275", "180x225"}
    names = [name for name in sorted(os.listdir(source)) if not name.startswith(".")]
    size = {s.file for s in manifest.skipped}
    stored = open_dataset(tmp_path / "out").read(range(23))
    for name in set(names) - size:
        square = np.asarray(read_square((source / name).read_bytes(), Preparation(256)).image)
        assert any((square == image).all() for image in stored), name
