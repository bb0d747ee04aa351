"""What a run says of itself is shown as text, whatever it says, and to browsers of this machine only."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import make_run, score

from stylepipe.report.page import live_data, make_report, render
from stylepipe.report.server import HOST, LiveReport, make_server

NASTY = "</script><script>alert(1)</script><!--<img src=x onerror='alert(2)'>\"&amp;{{data}}\u2028\u2029\0\ud800\x1b[2J"


class Elements(HTMLParser):
    """Collects the elements of a page and the texts in its scripts and title."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags = [""]
        self.texts: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts[self.tags[-1]] = self.texts.get(self.tags[-1], "") + data


def hostile_run(folder: Path, text: str) -> Path:
    """Write a run that says a text wherever it says anything."""
    folder.mkdir()
    make_run(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"preset": text, text: text, "res": text, "kimg": text}))
    (folder / "log.txt").write_text(text + "\n", errors="replace")
    line = {"images_seen": 3000, f"Loss/{text}": 1.0, "Alarm/x": text, text: text}
    (folder / "stats.jsonl").write_text(json.dumps(line) + "\n")
    lines = [score(2000) | {"metric": text}, score(2000) | {"settings": {text: text, "data": {"name": text}}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = folder / "state-000001.000/state.json"
    state.write_text(json.dumps({"info": {"data": {"name": text, "images": 3, "digest": text}}}))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Elements:
    """Give the page of a run that says nothing special."""
    return Elements(render(make_report([hostile_run(tmp_path_factory.mktemp("runs") / "plain", "x")], 500_000)))


@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_no_text_becomes_an_element_of_the_page(
    plain: Elements, examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pieces = st.sampled_from(
        [*"<>/'\"&;=!-{}\\ \n\t\u2028\u2029\u202e", "<script>", "</script>", "<!--", "]]>", "{{data}}"]
    )
    folder = tmp_path_factory.mktemp("runs")

    @settings(max_examples=examples)
    @given(st.lists(pieces | st.text(max_size=3), max_size=12).map("".join) | st.just(NASTY))
    def check(text: str) -> None:
        run = hostile_run(folder / str(len(list(folder.iterdir()))), text)
        report = make_report([run], 500_000)
        page = render(report)
        assert page.isascii()
        found = Elements(page)
        assert found.tags == plain.tags
        assert found.texts["title"].startswith(run.name)
        assert json.loads(page.partition('id="data">')[2].partition("</script>")[0])["runs"]
        assert Elements(render(report, live=True)).tags == plain.tags
        assert not {"<", ">", "&"}.intersection(live_data(report))

    check()


def test_names_of_runs_are_texts_too(tmp_path: Path, plain: Elements) -> None:
    folders = [hostile_run(tmp_path / name, "x") for name in ("<script>alert(1)<!--", "'\"&{{data}}\n\u2028")]
    found = Elements(render(make_report(folders, 500_000)))
    assert found.tags == plain.tags
    assert "alert(1)" in found.texts["title"]


def test_the_scripts_of_the_page_make_elements_of_no_text() -> None:
    for path in resources.files("stylepipe.report").iterdir():
        if path.name.endswith(".js"):
            text = path.read_text(encoding="ascii")
            sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc|\.href\b"  # noqa: E501
            assert not re.search(sinks, text), path.name


def test_a_picture_that_is_a_program_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: run.append(arguments))
    folder = hostile_run(tmp_path / "run", "x")
    (folder / "grids/000001.000.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    (folder / "grids/000002.000.png").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    report = make_report([folder], 500_000)
    problems = "\n".join(report.data["runs"][0]["problems"])
    assert "grids/000001.000.png: is no whole picture" in problems
    assert "grids/000002.000.png: is no whole picture" in problems
    assert not run
    assert {picture.mime for picture in report.pictures.values()} <= {"image/png", "image/gif", "image/webp"}


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    folder = hostile_run(tmp_path / "run", "x")
    for name in ("stats.jsonl", "log.txt"):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
    problems = make_report([folder], 500_000).data["runs"][0]["problems"]
    assert "stats.jsonl: cannot be read (is no file)" in problems
    assert "log.txt: cannot be read (is no file)" in problems


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Serve a run; give the port."""
    live = LiveReport([hostile_run(tmp_path_factory.mktemp("runs") / "run", NASTY)], 500_000)
    server = make_server(live, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    live.look()
    end = time.monotonic() + 60
    while live.report is None and time.monotonic() < end:
        time.sleep(0.02)
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def ask(port: int, text: bytes) -> bytes:
    """Return what is answered to a request, whatever it is."""
    with socket.create_connection((HOST, port), timeout=20) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return answer


def test_only_this_machine_is_listened_to(port: int) -> None:
    assert HOST == "127.0.0.1"
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))  # which would be taken if it listened to all addresses


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1:80:evil", "evil@localhost"),
        *(
            "",
            " ",
            ":8321",
            "[::1]:8321",
            "0.0.0.0",
            "localhost/",
            "127.1",
            "localhost, evil.example",
            "LOCALHOST.evil",
        ),
    ],
)
def test_other_names_get_nothing_of_the_run(port: int, host: str) -> None:
    for path in ("/", "/data.json", "/version.json", "/picture/x"):
        answer = ask(port, f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.0 403 ")
        assert answer.endswith(b"answers to 127.0.0.1 and localhost only")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/../../etc/passwd",
            "/picture/../../../etc/passwd",
            "/picture/%2e%2e/%2e%2e/etc/passwd",
            "/picture//etc/passwd",
        ),
        *("/picture/..\\..\\x", "/config.yaml", "/./data", "/picture/", "//evil.example/", "http://evil.example/"),
        *("/<script>alert(1)</script>", "/picture/\0", "/%00", "/" + "a" * 60_000),
    ],
)
def test_paths_lead_nowhere(port: int, path: str) -> None:
    answer = ask(port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.0 404 ", b"HTTP/1.0 400 ")) or b"HTTP/1.1 400" in answer
    assert b"root:" not in answer
    assert b"<script>alert" not in answer


def test_other_requests_get_no_page(port: int) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "<script>"):
        assert b" 501 " in ask(port, f"{method} / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).partition(b"\r\n")[0]
    assert ask(port, b"GET /data.json\r\n\r\n").endswith(b"localhost only"), "a browser names the host"
    for text in (
        b"",
        b"\r\n\r\n",
        b"\0" * 100,
        b"GET",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200,
    ):
        assert b'"runs"' not in ask(port, text)


def test_answers_tell_browsers_what_they_are(port: int) -> None:
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    connection.request("GET", "/data.json", headers={"Host": f"localhost:{port}"})
    answer = connection.getresponse()
    data = json.loads(answer.read())
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert answer.headers["Access-Control-Allow-Origin"] is None
    connection.request("GET", "/" + next(iter(data["pictures"].values())), headers={"Host": "localhost"})
    answer = connection.getresponse()
    assert answer.headers["Content-Type"].startswith("image/")
    answer.read()
    connection.close()
