"""A preparation that is killed, interrupted or out of room: whole or absent, and gone on with to the same bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from plain_photo import photo

from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.errors import UserError


def leftovers(folder: Path, name: str) -> list[Path]:
    return list(folder.glob(f".{name}*"))


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


DAMAGED = {
    "a finished shard": "shard-00000.tar",
    "the shard begun": "shard-{begun:05d}.tar",
    "rows of the index": "index.partial",
    "the mark": "progress.json",
}


@pytest.mark.parametrize("between", ["nothing", *DAMAGED, "a shard lost", "another photograph"])
def test_what_was_done_is_kept_where_it_is_sound(
    photos_to_cut: Path, tmp_path: Path, between: str, caplog: pytest.LogCaptureFixture
) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    partial = tmp_path / ".out.partial"
    writer: dict[str, Any] = {"shards": []}
    while not (writer["shards"] and "shard" in writer):  # until a shard is finished, and another begun
        killed(photos_to_cut, out, 0.1)
        progress = json.loads((partial / "progress.json").read_text())["progress"]
        writer = progress["writer"]["full"]
    assert 0 < progress["done"] < 120
    if between in DAMAGED:
        file = partial / DAMAGED[between].format(begun=len(writer["shards"]))
        content = bytearray(file.read_bytes())
        content[20] ^= 1
        file.write_bytes(content)
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
    assert re.search(r"or take out the file that does it, one of: \d+\.png, ", message), message
    assert "Traceback" not in message
    assert {path.name for path in tmp_path.iterdir()} == {"many"}


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
