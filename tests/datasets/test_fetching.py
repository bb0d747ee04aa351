"""Downloads that are tried again, continued, and right when they have their name."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from faulty_server import Fault, FaultyServer

from stylepipe.datasets import fetching
from stylepipe.datasets import store as stores
from stylepipe.datasets.fetching import RetryPolicy, fetch, part_path
from stylepipe.datasets.store import RemoteError, Store, open_store
from stylepipe.errors import UserError

pytest.importorskip("aiohttp", reason="needs the remote packages: pip install 'stylepipe[remote]'")

CONTENT = bytes(i * i % 251 for i in range(10_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
STALL_S = 0.2
QUICK = RetryPolicy(tries=3, first_wait_s=0.001, longest_wait_s=0.002)
RANGES = ["bytes=0-3999", "bytes=4000-7999", "bytes=8000-9999"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(stores, "RANGE_BYTES", 4000)
    with FaultyServer() as server:
        server.files["a.tar"] = CONTENT
        yield server


@pytest.fixture
def web(server: FaultyServer) -> Store:
    return open_store(server.url, stall_s=STALL_S)


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "a.tar"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the seconds that were waited, none of them in truth."""
    seconds: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            seconds.append(timeout)
            return False

    monkeypatch.setattr(fetching, "threading", SimpleNamespace(Event=Event))
    return seconds


def get(store: Store, to: Path, policy: RetryPolicy = QUICK, content: bytes = CONTENT) -> None:
    fetch(store, "a.tar", to, size=len(content), sha256=hashlib.sha256(content).hexdigest(), policy=policy)


def assert_whole(to: Path) -> None:
    assert to.read_bytes() == CONTENT
    assert [path.name for path in to.parent.iterdir()] == ["a.tar"]


def refusal(store: Store, to: Path, policy: RetryPolicy = QUICK, content: bytes = CONTENT) -> RemoteError:
    with pytest.raises(RemoteError, match=r"a\.tar") as caught:
        get(store, to, policy, content)
    assert not to.exists()
    return caught.value


def test_a_file_comes_in_ranges(web: Store, server: FaultyServer, to: Path) -> None:
    get(web, to)
    assert_whole(to)
    assert server.ranges("a.tar") == RANGES


def test_an_empty_file(web: Store, to: Path) -> None:
    get(web, to, content=b"")
    assert to.read_bytes() == b""


@pytest.mark.parametrize(
    "fault", [Fault(cut_after=700), Fault(status=503), Fault(stall_after=700), Fault(cut_after=700, no_length=True)]
)
def test_a_failure_is_tried_again_where_it_stopped(web: Store, server: FaultyServer, to: Path, fault: Fault) -> None:
    server.plan("a.tar", Fault(), fault, fault)
    get(web, to)
    assert_whole(to)
    assert server.ranges("a.tar") == [RANGES[0], RANGES[1], RANGES[1], *RANGES[1:]]


def test_it_is_given_up_after_so_many_tries(web: Store, server: FaultyServer, to: Path) -> None:
    server.plan("a.tar", Fault(), *[Fault(status=503)] * 9)
    error = refusal(web, to)
    assert server.ranges("a.tar") == [RANGES[0], *RANGES[1:2] * 3]
    assert (error.status, error.retry) == (503, True)
    assert f"{server.url}/a.tar: HTTP 503 Service Unavailable (3 tries in 0.0 s); check the network" in str(error)
    assert part_path(to).read_bytes() == CONTENT[:4000]


def test_getting_further_begins_the_count_again(web: Store, server: FaultyServer, to: Path) -> None:
    down = Fault(status=503)
    server.plan("a.tar", down, down, Fault(), down, down, Fault(), down, down)
    get(web, to)
    assert_whole(to)


def test_what_cannot_mend_is_not_tried_again(web: Store, server: FaultyServer, to: Path, waits: list[float]) -> None:
    for fault in (Fault(status=404), Fault(status=403), Fault(status=401), Fault(ignore_range=True)):
        server.requests.clear()
        server.plan("a.tar", fault)
        error = refusal(web, to)
        assert error.status == (fault.status or 200)
        assert "(1 try in 0.0 s)" in str(error)
        assert len(server.requests) == 1
    server.files["a.tar"] = CONTENT[:5000]
    assert "the remote file has 5,000 bytes, fewer than the manifest says" in str(refusal(web, to))
    assert waits == []


def test_waits_double_up_to_a_limit(web: Store, server: FaultyServer, to: Path, waits: list[float]) -> None:
    server.always["a.tar"] = Fault(status=500)
    refusal(web, to, RetryPolicy(tries=8, first_wait_s=0.5, longest_wait_s=10))
    for wait, full in zip(waits, (0.5, 1, 2, 4, 8, 10, 10), strict=True):
        assert full / 2 <= wait <= full
    assert len({wait / full for wait, full in zip(waits, (0.5, 1, 2, 4, 8, 10, 10), strict=True)}) > 1, "jitter"


def test_a_server_says_how_long(web: Store, server: FaultyServer, to: Path, waits: list[float]) -> None:
    server.plan("a.tar", *(Fault(status=503, retry_after=after) for after in ("7", "0", "86400")))
    get(web, to, RetryPolicy(tries=4, first_wait_s=1))
    assert waits[0] == 7
    assert 1 <= waits[1] <= 2
    assert waits[2] == 600
    assert_whole(to)


def test_what_has_come_is_kept_for_the_next_call(web: Store, server: FaultyServer, to: Path) -> None:
    part_path(to).write_bytes(CONTENT[:3456])
    get(web, to)
    assert_whole(to)
    assert server.ranges("a.tar") == ["bytes=3456-7455", "bytes=7456-9999"]


def test_a_part_that_has_all(web: Store, server: FaultyServer, to: Path) -> None:
    part_path(to).write_bytes(CONTENT)
    get(web, to)
    assert_whole(to)
    assert server.requests == []


@pytest.mark.parametrize("part", [b"?" * 3456, CONTENT + b"?", b"?" * len(CONTENT)])
def test_a_part_that_is_wrong_is_thrown_away(web: Store, server: FaultyServer, to: Path, part: bytes) -> None:
    part_path(to).write_bytes(part)
    get(web, to)
    assert_whole(to)
    assert server.ranges("a.tar")[-3:] == RANGES


def test_damage_on_the_way(web: Store, server: FaultyServer, to: Path) -> None:
    server.plan("a.tar", Fault(), Fault(content=bytes(10_000)))
    get(web, to)
    assert_whole(to)
    assert server.ranges("a.tar") == RANGES * 2


def test_another_file_than_that_of_the_manifest(web: Store, server: FaultyServer, to: Path) -> None:
    server.always["a.tar"] = Fault(content=bytes(10_000))
    error = refusal(web, to)
    found = hashlib.sha256(bytes(10_000)).hexdigest()
    assert "the remote file differs from the manifest" in str(error)
    assert found[:12] in str(error)
    assert SHA256[:12] in str(error)
    assert server.ranges("a.tar") == RANGES * 2
    assert list(to.parent.iterdir()) == [], "nothing to go on from"


def test_a_folder_that_cannot_be_written(web: Store, to: Path) -> None:
    to.parent.joinpath("a.tar.part").mkdir()
    with pytest.raises(UserError, match=r"a\.tar: cannot be written \(Is a directory\); make room"):
        get(web, to)


def test_a_disk_that_takes_no_more(web: Store, to: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=r"a\.tar: cannot be written \(File too large\); make room"):
            get(web, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not to.exists()
    get(web, to)
    assert_whole(to)


def test_it_is_on_the_disk_before_it_has_its_name(web: Store, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        steps.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    get(web, to)
    assert steps == ["fsync a.tar.part", "rename", f"fsync {to.parent.name}"]


def test_a_killed_process_is_continued(server: FaultyServer, to: Path) -> None:
    server.plan("a.tar", Fault(), Fault(stall_after=1000))
    program = (
        "import sys; from pathlib import Path; from stylepipe.datasets import fetching, store\n"
        "store.RANGE_BYTES = 4000\n"
        "fetching.fetch(store.open_store(sys.argv[1]), 'a.tar', Path(sys.argv[2]), size=10000, sha256=sys.argv[3])"
    )
    command = [sys.executable, "-c", program, server.url, str(to), SHA256]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 20
        while len(server.requests) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not to.exists()
    assert part_path(to).read_bytes() == CONTENT[:4000]
    subprocess.run(command, check=True, timeout=20)
    assert_whole(to)
    assert server.ranges("a.tar") == [RANGES[0], RANGES[1], *RANGES[1:]]


# Commands: no ranges


def failing_once(tmp_path: Path, failure: str) -> Store:
    """Return a store whose command fails the first time, after half of the file."""
    (tmp_path / "source").write_bytes(CONTENT)
    half = f"touch {tmp_path}/tried; head -c 5000 {tmp_path}/source; {failure}"
    whole = f"cat {tmp_path}/source"
    return open_store(
        f"pipe:echo . >> {tmp_path}/tries; if [ -e {tmp_path}/tried ]; then {whole}; else {half}; fi; :",
        stall_s=STALL_S,
    )


@pytest.mark.parametrize("failure", ["exit 3", "sleep 60", "exit 0"])
def test_a_command_that_fails_starts_from_zero(tmp_path: Path, failure: str) -> None:
    to = tmp_path / "cache" / "a.tar"
    to.parent.mkdir()
    part_path(to).write_bytes(b"left by another process")
    get(failing_once(tmp_path, failure), to)
    assert_whole(to)
    assert len((tmp_path / "tries").read_text().split()) == 2, "nor does the hash remember the first try"


def test_a_command_that_always_fails(tmp_path: Path, to: Path) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    command = f"echo . >> {tmp_path}/tries; head -c 5000 {tmp_path}/source; echo broken >&2; exit 3; :"
    error = refusal(open_store(f"pipe:{command}"), to)
    assert error.status == 3
    assert "exit status 3, stderr: broken (3 tries in" in str(error)
    # The first got further than none before.
    assert len((tmp_path / "tries").read_text().split()) == 3


def test_a_command_that_gives_too_much(tmp_path: Path, to: Path) -> None:
    error = refusal(open_store("pipe:yes; :", stall_s=STALL_S), to)
    assert "more than the 10,000 bytes of the manifest came" in str(error)
    assert not error.retry
