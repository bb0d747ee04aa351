"""`stylepipe report`: where the page goes, what is refused, and serving until Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from stylepipe.cli.main import run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder of a run that has just begun, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/00000-auto"
    folder.mkdir(parents=True)
    (folder / "stats.jsonl").write_text('{"images_seen": 32, "Loss/G/adversarial": 1.5}\n')
    return folder


def test_the_page_goes_into_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", ["runs/00000-auto"]) == 0
    assert capsys.readouterr().out == "runs/00000-auto/report.html\n"
    page = (folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "Loss/G/adversarial" in page


def test_the_page_of_several_goes_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "b").mkdir()
    (folder.parent / "b/log.txt").touch()
    assert run("report", [str(folder), "runs/b"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert "00000-auto, b - stylepipe" in Path("report.html").read_text()


def test_out_is_a_file_or_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", [str(folder), "--out", "new/page.html"]) == 0
    assert run("report", [str(folder), "--out", "new"]) == 0
    assert capsys.readouterr().out == "new/page.html\nnew/report.html\n"
    assert {path.name for path in Path("new").iterdir()} == {"page.html", "report.html"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs"], "runs: is no run: .*; try runs/00000-auto"),
        (["runs/0000-auto"], "runs/0000-auto: there is no such folder; try runs/00000-auto"),
        (["runs/00000-auto", "--max-mb", "0.1"], "--max-mb 0.1: expected at least 0.5"),
        (["runs/00000-auto", "--max-mb", "nan"], "--max-mb nan: expected at least 0.5"),
        (["runs/00000-auto", "--port", "5"], "--port 5: a port is of --serve"),
        (["runs/00000-auto", "--serve", "--port", "-1"], "--port -1: expected a number from 0 to 65535"),
        (["runs/00000-auto", "--out", "runs/00000-auto/stats.jsonl/x"], "cannot write runs.*; give another place"),
    ],
)
def test_mistakes(folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", arguments) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: {message}", error)
    assert error.count("\n") == 1


def test_a_port_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run("report", [str(folder), "--serve", "--port", str(port)]) == 2
    assert f"--port {port}: is in use" in capsys.readouterr().err


def test_serving_until_ctrl_c(folder: Path) -> None:
    command = [sys.executable, "-m", "stylepipe", "report", str(folder), "--serve", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default_interrupt
    ) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
            with urllib.request.urlopen(address, timeout=20) as answer:
                assert b"stylepipe" in answer.read()
            server.send_signal(signal.SIGINT)
            out, err = server.communicate(timeout=20)
        finally:
            server.kill()
        assert (server.returncode, out, err) == (0, "", "")


def default_interrupt() -> None:
    """Let Ctrl-C end the process even where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_script_in_launch(folder: Path, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, root / "launch/report.py", folder],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{folder}/report.html\n"
