"""The page: one file, complete, safe, and of the size that was asked for."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_runs import score, stats_line, write_run

from stylepipe.report.page import duration, live_data, make_report, render

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\"'&\u2028"


def data_of(page: str) -> dict[str, Any]:
    """Read what the page's scripts are given."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def page_of(*folders: Path, max_bytes: int = 4_000_000) -> str:
    page = render(make_report(folders, max_bytes))
    assert len(page.encode()) <= max_bytes
    return page


def test_a_run_with_everything(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", scores=[score(1000, 3.0), score(2000, 2.0)])
    data = data_of(page_of(folder))
    (run,) = data["runs"]
    facts = dict(run["facts"])
    assert facts["Resolution"] == "16 px"
    assert facts["Preset"] == "auto"
    assert facts["Data"] == "faces, 945 images, digest aaaaaaaaaaaa"
    assert facts["Processes"] == "2"
    assert facts["Speed"] == "13 s/kimg"
    assert (run["seen"], run["total"]) == (3000, 4000)
    assert "r1_gamma: 1" in run["config"]
    assert run["log"][-1].endswith("kimg 3.000")
    assert [moment["x"] for moment in run["moments"]] == [0, 1000, 2000, 3000]
    assert [moment["best"] for moment in run["moments"]] == ["", "", "best swd", ""]
    assert all(data["pictures"][moment["picture"]].startswith("data:image/") for moment in run["moments"])
    (metric,) = data["metrics"]
    best = {"x": 2000, "y": 2.0, "network": "network-000002.000.safetensors"}
    assert metric["runs"][0]["best"] == metric["runs"][0]["latest"] == best
    assert [group["title"] for group in data["groups"]] == ["Losses", "Time"]


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//|sendBeacon|WebSocket|XMLHttpRequest", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "connect-src" not in policy[1]
    assert page.isascii()


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    name = "<script>alert(1)<!--'\"&{{data}}"  # a slash cannot be in a name
    folder = write_run(
        tmp_path / name,
        config={"preset": HOSTILE, HOSTILE: HOSTILE},
        stats=[stats_line(5, **{f"Loss__{HOSTILE}": 1.0, "Alarm__x": HOSTILE})],
        scores=[score(1000, 1.0, note=HOSTILE)],
    )
    (folder / "log.txt").write_text(HOSTILE + "\n")
    page = page_of(folder)
    assert page.count("<script") == page.count("</script>") == 2, "those of the page itself"
    assert "<!--" not in page
    assert "<img" not in page
    assert f"<title>{html.escape(name)} - stylepipe</title>" in page
    (run,) = data_of(page)["runs"]
    assert run["name"] == name
    assert run["events"][0]["text"] == HOSTILE
    assert "".join(run["log"]) == HOSTILE.rstrip("\u2028")


def test_several_runs(tmp_path: Path) -> None:
    a = write_run(tmp_path / "x/run", scores=[score(1000, 3.0)])
    changed = {"loss": {"r1_gamma": 2}, "new": "yes"}
    b = write_run(tmp_path / "y/run", config=changed, scores=[score(1000, 1.0), score(2000, 9.0)])
    data = data_of(page_of(a, b))
    assert [run["name"] for run in data["runs"]] == ["x/run", "y/run"]
    assert data["differences"] == [
        {"option": "loss.r1_gamma", "values": ["1", "2"]},
        {"option": "new", "values": [None, "yes"]},
    ]
    (metric,) = data["metrics"]
    assert [run["best"]["y"] for run in metric["runs"]] == [3, 1]


def test_runs_that_do_not_say_their_settings_do_not_differ(tmp_path: Path) -> None:
    a, b, c = (write_run(tmp_path / name, config={"seed": name}) for name in "abc")
    (b / "config.yaml").unlink()
    differences = data_of(page_of(a, b, c))["differences"]
    assert differences == [{"option": "seed", "values": ["a", None, "c"]}]
    assert data_of(page_of(a, b))["differences"] == []


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "stats.jsonl").touch()
    (run,) = data_of(page_of(tmp_path))["runs"]
    assert (run["moments"], run["curves"], run["seen"], run["total"]) == ([], {}, 0, None)


def test_strange_settings_have_a_page(tmp_path: Path) -> None:
    config = {"res": "big", "kimg": "many", "network": 7, "seed": [1], "batch_size": {"a": 1}, "preset": None, 5: 6}
    (run,) = data_of(page_of(write_run(tmp_path / "r", config=config)))["runs"]
    assert dict(run["facts"])["Resolution"] == "big px"
    assert len(run["moments"]) == 4


def test_what_could_not_be_read_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    (folder / "grids/000001.000.png").write_bytes(b"half")
    with open(folder / "stats.jsonl", "a") as file:
        file.write('{"images_seen": 31')
    (folder / "config.yaml").unlink()
    (run,) = data_of(page_of(folder))["runs"]
    assert run["problems"] == [
        "config.yaml: not there, so the settings are not known",
        "stats.jsonl: the last line is half-written",
        "grids/000001.000.png: is no whole picture",
    ]


@pytest.mark.parametrize("runs", [1, 8])
def test_many_long_curves_leave_room_for_pictures(tmp_path: Path, runs: int) -> None:
    lines = [
        stats_line(i, **{f"Loss__{k}": (i * 7919 * (k + 1) % 1009) / 997 for k in range(40)}) for i in range(1, 1500)
    ]
    folders = [write_run(tmp_path / str(i), stats=lines) for i in range(runs)]
    data = data_of(page_of(*folders, max_bytes=1_500_000))
    points = [len(curve["x"]) for run in data["runs"] for curve in run["curves"].values()]
    assert len(points) == 40 * runs
    assert min(points) >= 58
    assert all(len(run["moments"]) >= 2 and run["real"] for run in data["runs"])


def test_a_live_page_takes_pictures_from_its_server(tmp_path: Path) -> None:
    report = make_report([write_run(tmp_path / "r")], 4_000_000)
    page = render(report, live=True)
    assert "data:image" not in page
    assert json.loads(live_data(report)) == data_of(page)
    assert set(data_of(page)["pictures"].values()) == {f"picture/{key}" for key in report.pictures}


def test_durations() -> None:
    assert [duration(s) for s in (5.25, 61, 3600, 86400, 200_000)] == [
        "5.25 s", "1 min 1 s", "1 h 0 min", "1 day 0 h", "2 days 8 h",
    ]  # fmt: skip
