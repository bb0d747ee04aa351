"""The report served: fresh, for this machine only, and never waiting for a slow round."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from made_runs import smooth_grid, stats_line, write_run

from stylepipe.errors import UserError
from stylepipe.report.page import make_report
from stylepipe.report.server import HOST, LiveReport, make_server


@contextmanager
def serving(live: LiveReport) -> Iterator[int]:
    """Serve on a free port."""
    server = make_server(live, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(port: int, path: str, host: str = HOST) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    try:
        connection.request("GET", path, headers={"Host": f"{host}:{port}"})
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


def version(port: int) -> dict[str, Any]:
    return json.loads(get(port, "/version.json")[2])


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_page_its_data_and_its_pictures(tmp_path: Path) -> None:
    with serving(LiveReport([write_run(tmp_path / "r")], 4_000_000)) as port:
        assert b"being read" in get(port, "/")[2]
        wait_for(lambda: version(port)["version"] is not None)
        status, kind, page = get(port, "/")
        assert (status, kind) == (200, "text/html; charset=utf-8")
        assert b"<title>r - stylepipe</title>" in page
        data = json.loads(get(port, "/data.json")[2])
        assert data["made"] == version(port)["version"]
        status, kind, picture = get(port, "/" + data["pictures"][data["runs"][0]["moments"][1]["picture"]])
        assert (status, kind) == (200, "image/png")
        assert picture == (tmp_path / "r/grids/000001.000.png").read_bytes()
        for path in ("/picture/", "/picture/../../etc/passwd", "/config.yaml", "/favicon.ico"):
            assert get(port, path)[0] == 404


def test_what_the_run_writes_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    with serving(LiveReport([folder], 4_000_000)) as port:
        wait_for(lambda: version(port)["version"] is not None)
        first = version(port)["version"]
        old = json.loads(get(port, "/data.json")[2])
        time.sleep(0.1)
        assert version(port)["version"] == first, "nothing is made anew while nothing changes"
        smooth_grid(16, 50).save(folder / "grids/000004.000.png")
        with open(folder / "stats.jsonl", "a") as file:
            file.write(stats_line(4000, Loss__G__adversarial=7.0))
        wait_for(lambda: version(port)["version"] != first)
        wait_for(lambda: json.loads(get(port, "/data.json")[2])["runs"][0]["seen"] == 4000)
        data = json.loads(get(port, "/data.json")[2])
        assert data["runs"][0]["moments"][-1]["x"] == 4000
        assert get(port, "/" + old["pictures"][old["runs"][0]["moments"][0]["picture"]])[0] == 200


def test_a_slow_round_blocks_nobody(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    go_on, rounds = threading.Event(), []

    def slow(*args: Any) -> Any:
        rounds.append(args)
        if len(rounds) > 1:
            assert go_on.wait(60)
        return make_report(*args)

    live = LiveReport([folder], 4_000_000, make=slow)
    with serving(live) as port:
        wait_for(lambda: version(port)["version"] is not None)
        first = version(port)["version"]
        (folder / "log.txt").write_text("     9.000 | new\n")
        wait_for(lambda: bool(version(port)) and len(rounds) == 2)
        for _ in range(3):
            assert version(port)["version"] == first
            assert b"<title>r" in get(port, "/")[2]
        assert len(rounds) == 2, "one round at a time"
        go_on.set()
        wait_for(lambda: version(port)["version"] != first)


def test_a_folder_that_goes_away_is_told_and_the_page_stays(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    with serving(LiveReport([folder], 4_000_000)) as port:
        wait_for(lambda: version(port)["version"] is not None)
        folder.rename(tmp_path / "gone")
        wait_for(lambda: "no such folder" in version(port)["problem"])
        assert b"<title>r" in get(port, "/")[2]
        (tmp_path / "gone").rename(folder)
        wait_for(lambda: version(port)["problem"] == "")


def test_a_defect_is_told_and_the_next_round_may_go_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rounds: list[int] = []

    def fragile(*args: Any) -> Any:
        rounds.append(1)
        if len(rounds) == 1:
            raise ZeroDivisionError("boom")
        return make_report(*args)

    with serving(LiveReport([write_run(tmp_path / "r")], 4_000_000, make=fragile)) as port:
        wait_for(lambda: version(port)["version"] is not None)
        assert version(port)["problem"] == ""
    assert "the report could not be made: boom" in caplog.text


def test_other_names_are_not_answered(tmp_path: Path) -> None:
    with serving(LiveReport([write_run(tmp_path / "r")], 4_000_000)) as port:
        assert get(port, "/version.json", host="localhost")[0] == 200
        assert get(port, "/version.json", host="evil.example")[0] == 403


def test_ports(tmp_path: Path) -> None:
    live = LiveReport([write_run(tmp_path / "r", moments=())], 4_000_000)
    with serving(live) as port, pytest.raises(UserError, match=f"--port {port}: is in use; .* --port 0"):
        make_server(live, port)
    with pytest.raises(UserError, match="--port 70000: expected a number from 0 to 65535"):
        make_server(live, 70000)
