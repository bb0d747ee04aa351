"""From a folder of photographs to a dataset: the same for any number of workers, whole or absent, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw

from stylepipe.cli.main import main
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.manifest import Skipped
from stylepipe.datasets.photos import read_square
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.processes import in_tasks
from stylepipe.datasets.shards import file_sha256, open_dataset
from stylepipe.datasets.verifying import find_faults
from stylepipe.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def photo(path: Path, colour: str = "red", size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def leftovers(folder: Path, name: str) -> list[Path]:
    return list(folder.glob(f".{name}*"))


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


def test_a_smaller_least_size_keeps_small_photographs(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png", size=(9, 7))
    photo(tmp_path / "in" / "b.png", size=(64, 64))
    assert prepare(tmp_path / "in", tmp_path / "small", Preparation(32), workers=1, progress=False).count == 1
    assert prepare(tmp_path / "in", tmp_path / "all", Preparation(32, min_size=1), workers=1, progress=False).count == 2


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


def command(*arguments: object, before: str = "pass") -> list[str]:
    script = f"import sys; {before}; from stylepipe.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", script, "prepare", *map(str, arguments)]


def test_a_full_disk_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    # A limit on the size of files fails in the middle of a shard, as a full disk does.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = subprocess.run(
        command(photos, tmp_path / "out", "--res", 32, "--workers", 1, before=limit), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "out: cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


@pytest.fixture
def many_photos(tmp_path: Path) -> Path:
    """Give a folder that takes some seconds to prepare."""
    photo(tmp_path / "many" / "0000.png", size=(1200, 1200))
    for i in range(1, 400):
        os.link(tmp_path / "many" / "0000.png", tmp_path / "many" / f"{i:04d}.png")
    return tmp_path / "many"


def start_preparing(source: Path, out: Path) -> subprocess.Popen[str]:
    """Start prepare with two workers in a process group of its own and return when it is writing."""
    process = subprocess.Popen(
        command(source, out, "--res", 512, "--workers", 2), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while not any(shard.stat().st_size for shard in out.parent.glob(f".{out.name}*/*.tar")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    return process


OFTEN = "from stylepipe.datasets import resuming; resuming.MARK_EVERY_S = 0.02"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos_to_cut(tmp_path: Path) -> Path:
    """Give a folder of 120 photographs, some unreadable, that takes a second or two to prepare."""
    folder = tmp_path / "cut"
    for i in range(120):
        photo(folder / f"{i % 3}" / f"{i:03d}.png", f"rgb({2 * i},0,0)", (300, 300))
        if i % 17 == 0:
            (folder / f"{i % 3}" / f"{i:03d}.png").write_bytes(b"no image")
    return folder


CUT = ["--res", "128", "--levels", "--labels", "--shard-mb", "0.02", "--workers", "1"]


def killed(source: Path, out: Path, seconds: float, *more: str) -> None:
    """Prepare, and kill all processes some time after they have marked how far they are."""
    arguments = command(source, out, *CUT, *more, before=OFTEN)
    progress = out.parent / f".{out.name}.partial" / "progress.json"
    before = progress.stat().st_mtime_ns if progress.exists() else 0
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while process.poll() is None and not (progress.exists() and progress.stat().st_mtime_ns != before):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(photos_to_cut: Path, tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    how = Preparation(128, levels=True, labels=True, shard_mb=0.02)
    prepare(photos_to_cut, straight, how, workers=1, progress=False)
    for kill in range(8):
        if out.exists():
            break
        killed(photos_to_cut, out, 0.03 * kill)
    assert kill >= 3, "killed at least three times"
    if not out.exists():
        prepare(photos_to_cut, out, how, workers=2, progress=False)
    assert tree(out) == tree(straight)
    assert leftovers(tmp_path, "out") == []


@pytest.mark.parametrize("between", ["nothing", "a finished shard damaged", "a shard lost", "another photograph"])
def test_what_was_done_is_kept_where_it_is_sound(
    photos_to_cut: Path, tmp_path: Path, between: str, caplog: pytest.LogCaptureFixture
) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    partial = tmp_path / ".out.partial"
    progress = {"done": 0, "writer": {"full": {"shards": []}}}
    while not progress["writer"]["full"]["shards"]:  # until a shard is finished
        killed(photos_to_cut, out, 0.1)
        progress = json.loads((partial / "progress.json").read_text())
    assert 0 < progress["done"] < 120
    if between == "a finished shard damaged":
        shard = bytearray((partial / "shard-00000.tar").read_bytes())
        shard[700] ^= 1
        (partial / "shard-00000.tar").write_bytes(shard)
    if between == "a shard lost":
        (partial / "levels" / "0064" / "shard-00000.tar").unlink()
    if between == "another photograph":
        photo(photos_to_cut / "0" / "new.png", "blue", (300, 300))
    how = Preparation(128, levels=True, labels=True, shard_mb=0.02)
    prepare(photos_to_cut, straight, how, workers=1, progress=False)
    with caplog.at_level("INFO"):
        prepare(photos_to_cut, out, how, workers=1, progress=False)
    assert ("going on after" in caplog.text) == (between == "nothing")
    assert tree(out) == tree(straight)


def test_killed_half_way_it_leaves_nothing_that_looks_whole(many_photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with start_preparing(many_photos, out) as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        with pytest.raises(UserError, match="another process is writing it"):
            prepare(many_photos, out, Preparation(512), progress=False)
        process.kill()
    assert len(workers) >= 2
    psutil.wait_procs(workers, timeout=10)
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)
    assert not out.exists()
    # The next call for the same folder clears what was left and succeeds.
    assert len(leftovers(tmp_path, "out")) == 1
    photo(tmp_path / "in" / "a.png")
    prepare(tmp_path / "in", out, Preparation(32), workers=1, progress=False)
    assert leftovers(tmp_path, "out") == []


def test_ctrl_c_leaves_nothing_and_says_little(many_photos: Path, tmp_path: Path) -> None:
    with start_preparing(many_photos, tmp_path / "out") as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "interrupted\n"
    assert {path.name for path in tmp_path.iterdir()} == {"many"}


def test_a_killed_worker_gives_one_message(many_photos: Path, tmp_path: Path) -> None:
    with start_preparing(many_photos, tmp_path / "out") as process:
        spawned = [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
        spawned[0].kill()
        assert process.wait(timeout=20) == 2
        assert process.stderr is not None
        message = process.stderr.read()
    assert message.startswith("error: one of 2 worker processes was killed")
    assert "Traceback" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"many"}


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


def saved_as(path: Path, mode: str = "RGB", size: int = 32, **options: object) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path.read_bytes()


def test_kept_files_are_those_that_need_no_change(tmp_path: Path) -> None:
    source = tmp_path / "in"
    exif = Image.Exif()
    exif[0x0112] = 6
    kept = {
        "a.jpg": saved_as(source / "a.jpg", quality=60),
        "b.png": saved_as(source / "b.png"),
        "c.jpg": saved_as(source / "c.jpg", "L"),
        "misnamed.jpg": saved_as(source / "misnamed.jpg", format="PNG", compress_level=0),
    }
    changed = {
        "larger.jpg": saved_as(source / "larger.jpg", size=64),
        "turned.jpg": saved_as(source / "turned.jpg", exif=exif),
        "alpha.png": saved_as(source / "alpha.png", "RGBA"),
        "palette.png": saved_as(source / "palette.png", "P"),
        "cmyk.jpg": saved_as(source / "cmyk.jpg", "CMYK"),
        "other.webp": saved_as(source / "other.webp", lossless=True),
        "other.bmp": saved_as(source / "other.bmp"),
    }
    prepare(source, tmp_path / "keep", Preparation(32, format="keep", levels=True), workers=1, progress=False)
    prepare(source, tmp_path / "png", Preparation(32), workers=1, progress=False)
    keep, png = open_dataset(tmp_path / "keep"), open_dataset(tmp_path / "png")
    stored = []
    for row in keep._index:
        with open(keep.path / "shard-00000.tar", "rb") as file:
            file.seek(int(row["offset"]))
            stored.append(file.read(int(row["size"])))
    for name, data in kept.items():
        assert data in stored, name
    for name, data in changed.items():
        assert data not in stored, name
    kinds = Counter(data[:4] for data in stored)
    assert kinds == {b"\x89PNG": 2 + 4, b"\xff\xd8\xff\xe0": 2 + 3}
    difference = np.abs(keep.read(range(11)).astype(int) - png.read(range(11)))
    assert (difference.mean(axis=(1, 2, 3)) < 4).all(), "only what was a JPEG, and is one again, differs a little"
    assert sum(difference.mean(axis=(1, 2, 3)) == 0) == 11 - 3
    assert (keep.level(16).read(range(11)).shape) == (11, 16, 16, 3)
    assert find_faults(tmp_path / "keep", workers=1, progress=False) == []


def test_transparency_is_laid_over_the_colour_asked_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (16, 16), (200, 0, 0, 51)).save(tmp_path / "in" / "a.png")
    prepare(tmp_path / "in", tmp_path / "out", Preparation(16, background="#0040ff"), workers=1, progress=False)
    # By hand: a fifth of the image, four fifths of the background.
    assert open_dataset(tmp_path / "out").read([0])[0, 0, 0].tolist() == [40, 51, 204]


def test_without_a_crop_only_squares_are_taken(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "square.png", size=(40, 40))
    photo(tmp_path / "in" / "wide.png", size=(41, 40))
    manifest = prepare(tmp_path / "in", tmp_path / "out", Preparation(32, crop="none"), workers=1, progress=False)
    assert manifest.count == 1
    assert manifest.skipped == (Skipped("wide.png", "not square", "41x40"),)


@pytest.mark.parametrize("workers", [1, 3])
def test_more_bad_files_than_allowed_stop_it(photos: Path, tmp_path: Path, workers: int) -> None:
    photo(photos / "small.png", size=(5, 5))  # not bad, only small
    for index in range(3):
        (photos / f"{index}.jpg").write_text("no image")
    assert prepare(photos, tmp_path / "a", Preparation(16, max_bad=3), workers=workers, progress=False).count == 23
    with pytest.raises(UserError, match=r"--max-bad 2: .* more files that cannot be read, the last one found is \d"):
        prepare(photos, tmp_path / "b", Preparation(16, max_bad=2), workers=workers, progress=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "--min-size 0: expected 1 or more"),
        ({"background": "white"}, "--background white: expected a colour such as #ffffff"),
        ({"shard_mb": 0.0}, "--shard-mb 0: expected a number above 0"),
        ({"shard_mb": float("nan")}, "--shard-mb nan: expected a number above 0"),
        ({"shuffle_seed": -1}, "--shuffle-seed -1: expected 0 or more"),
        ({"max_bad": -1}, "--max-bad -1: expected 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(
    photos: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(photos, tmp_path / "out", Preparation(16, **options), progress=False)


def test_shards_are_of_the_size_asked_for(photos: Path, tmp_path: Path) -> None:
    manifest = prepare(photos, tmp_path / "out", Preparation(16, shard_mb=0.01), workers=1, progress=False)
    sizes = [record.bytes for record in manifest.shards]
    assert len(sizes) > 1
    assert max(sizes) <= 0.01 * 2**20
    assert min(sizes[:-1]) > 0.005 * 2**20


def test_copies_are_left_out_and_their_originals_named(tmp_path: Path) -> None:
    for index in range(12):
        face = draw_face(index, 128)
        (tmp_path / "in").mkdir(exist_ok=True)
        face.save(tmp_path / "in" / f"{index:02d}.png")
    draw_face(3, 128).save(tmp_path / "in" / "again.png")
    draw_face(5, 128).save(tmp_path / "in" / "compressed.jpg", quality=75)
    draw_face(7, 128).resize((300, 300), Image.Resampling.LANCZOS).save(tmp_path / "in" / "resized.png")
    everything = prepare(tmp_path / "in", tmp_path / "all", Preparation(128), workers=1, progress=False)
    assert everything.count == 15
    manifest = prepare(tmp_path / "in", tmp_path / "out", Preparation(128, dedupe=True), workers=2, progress=False)
    assert manifest.count == 12
    assert {skipped.reason for skipped in manifest.skipped} == {"duplicate"}
    pairs = {frozenset({s.file, s.detail.split(":")[0].removeprefix("of ")}) for s in manifest.skipped}
    assert pairs == {
        frozenset({"03.png", "again.png"}),
        frozenset({"05.png", "compressed.jpg"}),
        frozenset({"07.png", "resized.png"}),
    }
    exact = [s for s in manifest.skipped if "the same pixels" in s.detail]
    assert len(exact) == 1


@pytest.mark.slow
def test_copies_are_found_across_a_kill(photos_to_cut: Path, tmp_path: Path) -> None:
    """The photographs are of one colour each, all alike to a hash; the copies of each are found all the same."""
    for path in sorted(photos_to_cut.rglob("*.png"))[::5]:
        (path.parent / f"copy of {path.name}").write_bytes(path.read_bytes())
    for index, path in enumerate(sorted(photos_to_cut.rglob("*.png"))):
        if "copy" not in path.name and path.read_bytes() != b"no image":
            draw_face(index, 256).save(path, compress_level=1)
            if (copy := path.parent / f"copy of {path.name}").exists():
                draw_face(index, 256).save(copy, compress_level=1)
    straight, out = tmp_path / "straight", tmp_path / "out"
    how = Preparation(128, levels=True, labels=True, shard_mb=0.02, dedupe=True)
    manifest = prepare(photos_to_cut, straight, how, workers=1, progress=False)
    assert sum(s.reason == "duplicate" for s in manifest.skipped) >= 20
    for kill in range(3):
        killed(photos_to_cut, out, 0.1 * kill, "--dedupe")
    assert not out.exists()
    prepare(photos_to_cut, out, how, workers=2, progress=False)
    assert tree(out) == tree(straight)


def eyes_and_mouth(x: float, y: float, scale: float) -> list[list[float]]:
    face = [(-1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-0.8, 2.0), (0.8, 2.0)]
    return [[x + scale * dx, y + scale * dy] for dx, dy in face]


def test_aligned_photographs_show_the_face_at_one_place(tmp_path: Path) -> None:
    """A red and a blue dot for the eyes, wherever they are, come to the same places."""
    landmarks = {}
    for index, (x, y, scale) in enumerate([(150, 120, 20), (260, 300, 35), (200, 200, 25)]):
        picture = Image.new("RGB", (480, 520), "white")
        draw = ImageDraw.Draw(picture)
        points = eyes_and_mouth(x, y, scale)
        for (px, py), colour in zip(points, ["red", "blue", "white", "white", "white"], strict=True):
            draw.ellipse((px - scale / 4, py - scale / 4, px + scale / 4, py + scale / 4), fill=colour)
        (tmp_path / "in").mkdir(exist_ok=True)
        picture.save(tmp_path / "in" / f"{index}.png")
        landmarks[f"{index}.png"] = points
    Image.new("RGB", (480, 520)).save(tmp_path / "in" / "no face.png")
    Image.new("RGB", (480, 520)).save(tmp_path / "in" / "far.png")
    landmarks["far.png"] = eyes_and_mouth(200, 200, 2)
    (tmp_path / "faces.json").write_text(json.dumps(landmarks | {"absent.png": eyes_and_mouth(9, 9, 9)}))
    how = Preparation(64, crop="align", landmarks=str(tmp_path / "faces.json"))
    manifest = prepare(tmp_path / "in", tmp_path / "out", how, workers=2, progress=False)
    assert manifest.count == 3
    assert {s.file: s.reason for s in manifest.skipped} == {"no face.png": "no face", "far.png": "smaller than 64 px"}
    assert manifest.options["landmarks_sha256"] == file_sha256(tmp_path / "faces.json")
    assert "landmarks" not in manifest.options
    images = open_dataset(tmp_path / "out").read(range(3)).astype(int)
    for red, green, blue in ((255, 0, 0), (0, 0, 255)):
        distance = np.abs(images - np.array([red, green, blue])).sum(axis=-1)
        places = np.array([np.argwhere(d < 200).mean(axis=0) for d in distance])
        assert np.ptp(places, axis=0).max() < 1.5, places
    # By the formula: the eyes are 2 apart and the square is max(4, 3.6) * 2 sides... of 64 px, so 16 px.
    eyes = [np.argwhere(np.abs(image - np.array([255, 0, 0])).sum(axis=-1) < 200).mean(axis=0)[1] for image in images]
    assert np.mean(eyes) == pytest.approx(32 - 8, abs=1.5)


def test_landmarks_of_other_photographs_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "faces.csv").write_text("name,x1\nelse.png," + ",".join(["1,2"] * 5) + "\n")
    how = Preparation(16, crop="align", landmarks=str(tmp_path / "faces.csv"))
    with pytest.raises(UserError, match=r"names none of the photographs in .*, such as cats/000\.png"):
        prepare(photos, tmp_path / "out", how, workers=1, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "align"}, "--crop align: expected --landmarks FILE, or --detector"),
        ({"landmarks": "a.json"}, "--landmarks a.json: --crop centre makes no use of it"),
        ({"detector": "a:b", "crop": "none"}, "--detector a:b: --crop none makes no use of it"),
        ({"crop": "align", "landmarks": "a.json", "detector": "a:b"}, "--crop align: expected --landmarks FILE, or"),
        ({"crop": "align", "detector": "nowhere:f"}, "detector nowhere:f: nowhere cannot be imported"),
    ],
)
def test_alignment_needs_one_way_to_find_faces(
    photos: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(photos, tmp_path / "out", Preparation(16, **options), workers=1, progress=False)
