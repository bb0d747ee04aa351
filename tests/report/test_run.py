"""What is read of a run's folder, and what is said of what cannot be."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from made_runs import score, stats_line, write_run

from stylepipe.errors import UserError
from stylepipe.report.run import MAX_EVENTS, Event, check_runs, fingerprint, flat, read_run, read_runs


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", scores=[score(1000, 2.0)]))
    assert run.name == "r"
    assert run.problems == []
    assert run.config["loss"] == {"r1_gamma": 1}
    assert list(run.grids) == [0, 1000, 2000, 3000]
    assert run.real == tmp_path / "r/grids/real.png"
    assert run.log[-1].endswith("kimg 3.000")
    assert run.data["name"] == "faces"
    assert run.written == max((tmp_path / "r" / n).stat().st_mtime for n in ("stats.jsonl", "log.txt", "metrics.jsonl"))
    curve = run.curves["Loss/G/adversarial"]
    assert curve.x.tolist() == list(range(100, 3001, 100))
    assert curve.y[0] == 1.01
    assert run.scores[0].results == {"swd": 2.0, "swd_64": 2.0}


def test_a_state_knows_the_data_best(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", scores=[score(1000, 2.0)])
    for kimg, name in (("000001.000", "old"), ("000002.000", "new")):
        (folder / f"state-{kimg}").mkdir()
        info = {"data": {"name": name, "images": 7, "digest": "b" * 64}}
        (folder / f"state-{kimg}/state.json").write_text(json.dumps({"info": info}))
    assert read_run(folder).data["name"] == "new"


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "log.txt").touch()
    (tmp_path / "stats.jsonl").touch()
    run = read_run(tmp_path)
    assert (run.curves, run.grids, run.scores, run.real, run.log) == ({}, {}, [], None, [])
    assert run.problems == ["config.yaml: not there, so the settings are not known"]


def test_null_is_a_gap_and_text_an_event(tmp_path: Path) -> None:
    lines = [
        stats_line(10, a=1, Alarm__x="boo"),
        stats_line(20, a=None),
        '{"images_seen": 30, "a": NaN}\n',
        '{"images_seen": 40, "a": 1e999}\n',
        '{"images_seen": 50, "a": 1' + "0" * 400 + "}\n",
        stats_line(60, a=2, b=[1]),
    ]
    run = read_run(write_run(tmp_path / "r", stats=lines))
    assert run.curves["a"].x.tolist() == [10, 20, 30, 40, 50, 60]
    assert np.isnan(run.curves["a"].y).tolist() == [False, True, True, True, True, False]
    assert run.events == [Event(10, "Alarm/x", "boo")]
    assert run.problems == ["stats.jsonl: neither numbers nor texts, left out: b"]


def test_of_many_alarms_the_last_are_kept(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", stats=[stats_line(i, Alarm__x=str(i)) for i in range(1, MAX_EVENTS + 51)]))
    assert len(run.events) == MAX_EVENTS
    assert run.events[-1].text == str(MAX_EVENTS + 50)
    assert "only the last" in run.problems[0]


@pytest.mark.parametrize("damage", ["[1]", "{}", "x", '{"images_seen": "1"}', '{"images_seen": true}', "[" * 100_000])
def test_damaged_lines_are_named_and_the_others_read(tmp_path: Path, damage: str) -> None:
    folder = write_run(tmp_path / "r", stats=[stats_line(10, a=1), damage + "\n", stats_line(20, a=2), '{"images_se'])
    run = read_run(folder)
    assert run.curves["a"].y.tolist() == [1, 2]
    assert run.problems == [
        "stats.jsonl: the last line is half-written",
        "stats.jsonl: 1 line is damaged, first line 2",
    ]


def test_damaged_scores_are_named(tmp_path: Path) -> None:
    wrong = [
        '{"images_seen": 5}\n',
        score(5, 1.0, best="biggest"),
        '{"images_seen": 5, "metric": "m", "results": {}}\n',
    ]
    run = read_run(write_run(tmp_path / "r", scores=[score(1000, None), *wrong]))
    assert math.isnan(run.scores[0].results["swd"])
    assert len(run.scores) == 1
    assert run.problems == ["metrics.jsonl: 3 lines are no scores"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    (folder / "config.yaml").write_text("a: [1\nb")
    (folder / "grids/0x.png").touch()
    (folder / "network-best.safetensors").write_bytes(b"\xff" * 20)
    (folder / "state-000001.000").mkdir()
    (folder / "state-000001.000/state.json").write_bytes(b"\xff{")
    os.remove(folder / "log.txt")
    (folder / "log.txt").mkdir()
    run = read_run(folder)
    named = [problem.partition(":")[0] for problem in run.problems]
    assert named == [
        "config.yaml",
        "log.txt",
        "network-best.safetensors",
        "grids/0x.png",
        "state-000001.000/state.json",
    ]
    assert run.config_text.startswith("a: [1")
    assert list(run.grids) == [0, 1000, 2000, 3000]


def test_a_folder_that_is_no_run_names_the_runs_in_it(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/00000-auto")
    with pytest.raises(UserError, match=r"runs: is no run: it has no stats.jsonl, .* try .*runs/00000-auto"):
        check_runs([tmp_path / "runs"])
    with pytest.raises(UserError, match=r"00000-auot: there is no such folder; try .*runs/00000-auto$"):
        check_runs([tmp_path / "runs/00000-auot"])
    with pytest.raises(UserError, match=r"log.txt: is no folder"):
        check_runs([tmp_path / "runs/00000-auto/log.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: is no run: .* give the --out of a training"):
        check_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match="no RUN given"):
        check_runs([])


def test_a_run_given_twice_counts_once(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert check_runs([a, b, tmp_path / "b/../a"]) == [a, b]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, moments=()) for name in ("x/run", "y/run", "other")]
    assert [run.name for run in read_runs(folders)] == ["x/run", "y/run", "other"]


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    folder = write_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff")), moments=())
    assert read_runs([folder])[0].name == "r?"


def test_the_fingerprint_changes_with_what_a_run_writes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    with open(folder / "stats.jsonl", "a") as file:
        file.write(stats_line(4000, a=1))
    changed = fingerprint(folder)
    assert changed != before
    (folder / "grids/000004.000.png").touch()
    assert fingerprint(folder) != changed
    assert fingerprint(tmp_path / "gone") == fingerprint(tmp_path / "gone")


def test_flat() -> None:
    assert flat({"a": 1, "b": {"c": {"d": None}, "e": {}}}) == {"a": 1, "b.c.d": None, "b.e": {}}
