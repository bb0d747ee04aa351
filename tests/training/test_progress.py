"""The bar, the lines, log.txt and stats.jsonl."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from stylepipe.training import progress as progress_module
from stylepipe.training.progress import Progress, RunLog


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_a_bar_that_leaves_nothing_behind() -> None:
    screen = Terminal()
    with Progress(2.0, images_seen=500, stream=screen) as progress:
        for images_seen in range(516, 2001, 16):
            progress.update(images_seen)
        progress.tick("a line for files", {"G": 0.7, "D": 1.25})
        progress.say("saved")
    shown = screen.getvalue()
    assert "1.988/2 kimg" in shown
    assert "s/kimg" in shown
    assert "left" in shown
    assert "G 0.700  D 1.250" in shown
    assert "saved\n" in shown
    assert "a line for files" not in shown
    assert shown.count("\n") == 1, "only what `say` printed stays"
    assert shown.endswith("\r")
    assert not shown.rpartition("\n")[2].split("\r")[-2].strip(), "the bar's line is wiped"


def test_elsewhere_one_line_per_tick() -> None:
    file = io.StringIO()
    with Progress(2.0, stream=file) as progress:
        progress.update(1000)
        progress.tick("kimg 1.0  G 0.7", {"G": 0.7})
        progress.say("saved")
    assert file.getvalue() == "kimg 1.0  G 0.7\nsaved\n"


def test_other_processes_are_silent() -> None:
    screen = Terminal()
    with Progress(2.0, shown=False, stream=screen) as progress:
        progress.update(1000)
        progress.tick("line", {"G": 0.7})
        progress.say("saved")
    assert screen.getvalue() == ""


def read_stats(out: Path) -> list[int]:
    return [json.loads(line)["images_seen"] for line in (out / "stats.jsonl").read_text().splitlines()]


def write_run(out: Path) -> None:
    log = RunLog(out)
    log.line("2 processes")
    for images_seen in (1000, 2000, 3000):
        log.stats(images_seen, {"Loss/G": 0.5})
        log.line(f"tick {images_seen}")
    log.close()


def test_every_line_is_written_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.line("first\nsecond")
    log.stats(16, {"Loss/G": 0.5, "device": "cpu", "bad": float("nan")})
    assert (tmp_path / "log.txt").read_text() == "     0.000 | first\n     0.000 | second\n"
    (line,) = (tmp_path / "stats.jsonl").read_text().splitlines()
    assert json.loads(line) == {"images_seen": 16, "Loss/G": 0.5, "device": "cpu", "bad": None}
    log.close()


def test_resuming_drops_what_came_later_and_half_a_line(tmp_path: Path) -> None:
    write_run(tmp_path)
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"images_seen": 1, "Lo')
    with open(tmp_path / "log.txt", "a") as file:
        file.write("     1.000 | tic")
    log = RunLog(tmp_path, resume_from_images_seen=2000)
    log.line("resumed")
    log.stats(2500, {})
    log.close()
    assert read_stats(tmp_path) == [1000, 2000, 2500]
    lines = [line.partition(" | ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == ["2 processes", "tick 1000", "tick 2000", "resumed"]


@pytest.mark.parametrize("resume_from", [None, 0])
def test_a_run_from_the_start_has_no_old_ticks(tmp_path: Path, resume_from: int | None) -> None:
    write_run(tmp_path)
    RunLog(tmp_path, resume_from).close()
    assert read_stats(tmp_path) == []
    assert (tmp_path / "log.txt").read_text() == ("" if resume_from is None else "     0.000 | 2 processes\n")


def test_resuming_without_old_files_starts_them(tmp_path: Path) -> None:
    log = RunLog(tmp_path, resume_from_images_seen=2000)
    log.line("resumed")
    log.close()
    assert (tmp_path / "log.txt").read_text() == "     2.000 | resumed\n"


class FullDisk:
    """A file that takes a number of bytes, and then none until there is room again."""

    def __init__(self, room: int) -> None:
        self.room, self.content = room, b""

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = data[: self.room]
        self.room -= len(taken)
        self.content += taken
        return len(taken)

    def close(self) -> None: ...


def test_lines_that_a_full_disk_does_not_take_are_written_later(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log._log.close()
    disk = log._log._file = FullDisk(30)  # type: ignore[assignment]
    log.line("the first line")
    assert log.failure is None
    log.line("the second, of which half has room")
    assert log.failure is not None
    log.line("the third")
    assert disk.content == b"     0.000 | the first line\n  "
    disk.room = 1000
    log.line("the fourth", images_seen=5000)
    assert log.failure is None
    told = ["the first line", "the second, of which half has room", "the third"]
    expected = [f"     0.000 | {line}" for line in told] + ["     5.000 | the fourth"]
    assert disk.content.decode().splitlines() == expected
    log.close()


def test_lines_that_are_kept_survive_a_rewind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path)
    log.line("the first")
    write, log._log._file.write = log._log._file.write, FullDisk(0).write  # type: ignore[method-assign, assignment]
    log.line("the second")
    log._log._file.write = write  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(progress_module, "_drop_later_lines", FullDisk(0).write)
        with pytest.raises((OSError, TypeError)):
            log.rewind(0)
    log.line("the third")
    log.rewind(0)
    log.close()
    lines = [line.partition("| ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == ["the first", "the second", "the third"]


@pytest.mark.parametrize("terminal", [True, False])
def test_where_nobody_reads_any_more_it_falls_silent(terminal: bool) -> None:
    class Gone(Terminal if terminal else io.StringIO):  # type: ignore[misc]
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress(2.0, stream=Gone()) as progress:
        for images_seen in range(0, 2000, 500):
            progress.update(images_seen)
            progress.tick("a line", {"G": 0.7})
            progress.say("saved")
