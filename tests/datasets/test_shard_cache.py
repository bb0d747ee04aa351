"""Shards on a local disk: each downloaded once per node, ahead of its use, within a limit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_server import Fault, FaultyServer

from stylepipe.datasets import shard_cache, store
from stylepipe.datasets.fetching import RetryPolicy
from stylepipe.datasets.manifest import FileRecord
from stylepipe.datasets.shard_cache import ShardCache
from stylepipe.datasets.store import RemoteError, open_store
from stylepipe.errors import UserError

pytest.importorskip("aiohttp", reason="needs the remote packages: pip install 'stylepipe[remote]'")

SIZE = 1000
CONTENTS = [bytes([i]) * SIZE for i in range(8)]
RECORDS = [FileRecord(f"shard-{i:05d}.tar", SIZE, hashlib.sha256(CONTENTS[i]).hexdigest(), 1) for i in range(8)]
QUICK = RetryPolicy(tries=2, first_wait_s=0.001, longest_wait_s=0.002)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FaultyServer() as server:
        server.files.update({record.file: content for record, content in zip(RECORDS, CONTENTS, strict=True)})
        yield server


@pytest.fixture
def new(server: FaultyServer, tmp_path: Path) -> Iterator[Callable[..., ShardCache]]:
    """Give what makes a cache, as each process of a node does, of a limit in shards."""
    made: list[ShardCache] = []

    def new(limit: int | None = None) -> ShardCache:
        limit_bytes = None if limit is None else limit * SIZE
        store = open_store(server.url, stall_s=10)
        cache = ShardCache(store, RECORDS, tmp_path / "cache", limit_bytes, policy=QUICK)
        made.append(cache)
        return cache

    yield new
    server.stopping.set()
    for cache in made:
        cache.close()


def content(cache: ShardCache, shard: int) -> bytes:
    return cache.open(shard).read(2 * SIZE, 0)


def on_disk(folder: Path, suffix: str = ".tar") -> list[int]:
    return sorted(int(path.name[6:11]) for path in folder.glob(f"shard-*{suffix}"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def requested(server: FaultyServer) -> list[int]:
    """Return the shards that were asked for, in order."""
    return [int(one.path[-9:-4]) for one in server.requests]


def test_a_shard_is_downloaded_when_it_is_asked_for(
    new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path
) -> None:
    cache = new()
    assert server.requests == []
    assert content(cache, 3) == CONTENTS[3]
    assert content(new(), 3) == CONTENTS[3], "a later process finds it"
    assert requested(server) == [3]
    assert on_disk(tmp_path / "cache") == [3]
    assert on_disk(tmp_path / "cache", ".part") == []


def test_a_shard_that_is_not_whole_is_replaced(new: Callable[..., ShardCache], tmp_path: Path) -> None:
    cache = new()
    (tmp_path / "cache" / "shard-00002.tar").write_bytes(CONTENTS[2][:-1])
    assert content(cache, 2) == CONTENTS[2]


def test_a_shard_that_is_removed_at_the_last_moment(
    new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new().open(2)
    flock = shard_cache.fcntl.flock
    left = [tmp_path / "cache" / "shard-00002.tar"]

    def removed_before(descriptor: int, how: int) -> None:
        if how == shard_cache.fcntl.LOCK_SH and left:
            left.pop().unlink()
        flock(descriptor, how)

    cache = new()
    monkeypatch.setattr(shard_cache.fcntl, "flock", removed_before)
    assert content(cache, 2) == CONTENTS[2]
    assert requested(server) == [2, 2]


def test_a_window_comes_in_the_background(new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path) -> None:
    cache = new()
    cache.prefetch([4, 1, 6])
    wait_for(lambda: on_disk(tmp_path / "cache") == [1, 4, 6])
    for shard in (1, 4, 6):
        assert content(cache, shard) == CONTENTS[shard]
    assert requested(server) == [4, 1, 6]
    cache.prefetch([1, 6, 2])
    assert content(cache, 2) == CONTENTS[2]
    assert requested(server) == [4, 1, 6, 2]


def test_prefetching_does_not_wait(new: Callable[..., ShardCache], server: FaultyServer) -> None:
    server.plan(RECORDS[0].file, Fault(stall_after=0))
    cache = new()
    began = time.monotonic()
    cache.prefetch([0, 1])
    assert time.monotonic() - began < 1
    wait_for(lambda: requested(server) == [0])
    # What is needed now overtakes what waits behind a slow one.
    assert content(cache, 1) == CONTENTS[1]
    assert requested(server) == [0, 1]


def test_a_shard_under_way_is_waited_for(new: Callable[..., ShardCache], server: FaultyServer) -> None:
    server.plan(RECORDS[0].file, Fault(delay_s=0.03))
    cache = new()
    cache.prefetch([0])
    wait_for(lambda: requested(server) == [0])
    assert content(cache, 0) == CONTENTS[0]
    assert requested(server) == [0]


def test_errors_of_the_background_are_raised_where_the_shard_is_used(
    new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path
) -> None:
    server.plan(RECORDS[5].file, Fault(status=404))
    cache = new()
    cache.prefetch([5, 6])
    wait_for(lambda: on_disk(tmp_path / "cache") == [6])
    assert content(cache, 6) == CONTENTS[6]
    with pytest.raises(RemoteError, match=r"shard-00005\.tar: HTTP 404"):
        cache.open(5)
    assert requested(server) == [5, 6]
    assert content(cache, 5) == CONTENTS[5], "the next call tries again"


def test_a_shard_that_failed_is_prefetched_again(
    new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path
) -> None:
    server.plan(RECORDS[5].file, Fault(status=404))
    cache = new()
    cache.prefetch([5, 6])
    wait_for(lambda: on_disk(tmp_path / "cache") == [6])
    cache.prefetch([5])
    assert content(cache, 5) == CONTENTS[5]


def test_the_background_cannot_write(new: Callable[..., ShardCache], tmp_path: Path) -> None:
    cache = new()
    (tmp_path / "cache" / "shard-00001.tar.lock").symlink_to(tmp_path / "gone" / "lock")
    cache.prefetch([1])
    wait_for(lambda: cache._thread is None)
    for _ in range(2):
        with pytest.raises(UserError, match=r"cannot be used as a cache \(No such file or directory\)"):
            cache.open(1)


def test_windows_that_are_past_are_not_downloaded(new: Callable[..., ShardCache], server: FaultyServer) -> None:
    server.plan(RECORDS[0].file, Fault(delay_s=0.02))
    cache = new()
    cache.prefetch([0, 1])
    wait_for(lambda: requested(server) == [0])
    cache.prefetch([2])
    cache.prefetch([3])
    assert content(cache, 3) == CONTENTS[3]
    wait_for(lambda: cache._thread is None)
    assert sorted(requested(server)) == [0, 2, 3]


def test_least_recently_used_shards_make_room(
    new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path
) -> None:
    cache = new(limit=3)
    for shard in (0, 1, 2, 0, 3):
        cache.open(shard)
    assert on_disk(tmp_path / "cache") == [0, 2, 3]
    cache.open(4)
    assert on_disk(tmp_path / "cache") == [0, 3, 4]
    assert content(cache, 1) == CONTENTS[1]
    assert on_disk(tmp_path / "cache") == [1, 3, 4]
    assert requested(server) == [0, 1, 2, 3, 4, 1]


def test_a_window_is_used_until_it_is_past(new: Callable[..., ShardCache], tmp_path: Path) -> None:
    cache = new(limit=5)
    cache.prefetch([0])
    for shard in (0, 1, 2):
        cache.open(shard)
    cache.prefetch([3])
    cache.prefetch([4])  # now 0 is past, and 1 was before
    for shard in (3, 4, 5):
        cache.open(shard)
    assert on_disk(tmp_path / "cache") == [0, 2, 3, 4, 5]


def test_a_place_is_reserved_before_the_next_looks(
    new: Callable[..., ShardCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RemoteError(f"reserved: {on_disk(tmp_path / 'cache', '.part')}")

    cache = new(limit=2)
    monkeypatch.setattr(shard_cache, "fetch", fails)
    with pytest.raises(RemoteError, match=r"reserved: \[3\]"):
        cache.open(3)


def test_without_a_limit_all_stay(new: Callable[..., ShardCache], tmp_path: Path) -> None:
    cache = new()
    for shard in range(8):
        cache.open(shard)
    assert on_disk(tmp_path / "cache") == list(range(8))


def test_windows_are_kept(new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path) -> None:
    cache = new(limit=5)
    cache.prefetch([0, 1])
    cache.prefetch([2, 3])
    wait_for(lambda: on_disk(tmp_path / "cache") == [0, 1, 2, 3])
    for shard in (2, 3, 0, 1):  # 2 and 3 are now the least recently used
        cache.open(shard)
    for other in (4, 5, 6, 7):
        cache.open(other)
        assert on_disk(tmp_path / "cache") == [0, 1, 2, 3, other]
    cache.prefetch([4, 5])
    wait_for(lambda: cache._thread is None)
    assert on_disk(tmp_path / "cache") == [1, 2, 3, 4, 5]  # 7 was used before the window of 0 and 1 was let go


def test_another_processs_windows_are_kept(
    new: Callable[..., ShardCache], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, other = new(limit=2), new(limit=2)
    other.prefetch([0])
    other.prefetch([1])
    other.open(0)
    other.open(1)
    assert caplog.text == ""
    cache.open(2)  # rather above the limit than waiting for a process that may wait for this one
    assert on_disk(tmp_path / "cache") == [0, 1, 2]
    assert "3000 bytes are in use at once, above the limit of 2000" in caplog.text
    other.close()
    cache.open(3)
    assert on_disk(tmp_path / "cache") in ([0, 3], [1, 3]), "2 was used least recently"


def test_left_over_parts_count_and_go(new: Callable[..., ShardCache], tmp_path: Path) -> None:
    cache = new(limit=2)
    for shard in (6, 7):
        (tmp_path / "cache" / f"shard-0000{shard}.tar.part").write_bytes(b"x")
    cache.open(0)
    assert len(on_disk(tmp_path / "cache", ".part")) == 1
    cache.open(1)
    assert on_disk(tmp_path / "cache", ".part") == []
    assert on_disk(tmp_path / "cache") == [0, 1]


def test_a_part_under_way_stays(new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path) -> None:
    server.plan(RECORDS[0].file, Fault(stall_after=10))
    new(limit=2).prefetch([0])
    wait_for(lambda: requested(server) == [0])
    cache = new(limit=2)
    for shard in (1, 2, 3):
        cache.open(shard)
    assert on_disk(tmp_path / "cache", ".part") == [0]
    assert on_disk(tmp_path / "cache") == [3], "the place of what comes is reserved"


def test_a_part_that_becomes_whole_meanwhile_counts(
    new: Callable[..., ShardCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = new(limit=2)
    cache.open(0)
    part = tmp_path / "cache" / "shard-00007.tar.part"
    part.write_bytes(CONTENTS[7])
    scandir = os.scandir

    def renamed_after(folder: Path) -> list[os.DirEntry[str]]:
        entries = list(scandir(folder))
        if part.exists():
            part.rename(part.with_suffix(""))
        return entries

    monkeypatch.setattr(shard_cache.os, "scandir", renamed_after)
    assert content(cache, 1) == CONTENTS[1]
    monkeypatch.undo()
    assert on_disk(tmp_path / "cache") == [1, 7]


def test_what_another_process_downloads_is_left_to_it(new: Callable[..., ShardCache], server: FaultyServer) -> None:
    server.plan(RECORDS[0].file, Fault(stall_after=0))
    first, second = new(), new()
    first.prefetch([0])
    wait_for(lambda: requested(server) == [0])
    second.prefetch([0, 1])
    wait_for(lambda: requested(server) == [0, 1])
    assert content(second, 1) == CONTENTS[1]


def test_what_is_past_is_not_waited_for(new: Callable[..., ShardCache], server: FaultyServer) -> None:
    server.plan(RECORDS[0].file, Fault(stall_after=0))
    server.plan(RECORDS[1].file, Fault(delay_s=0.03))
    first, second = new(), new()
    first.prefetch([0])
    wait_for(lambda: requested(server) == [0])
    second.prefetch([0, 1])
    wait_for(lambda: requested(server) == [0, 1])
    second.prefetch([2])
    second.prefetch([3])
    wait_for(lambda: requested(server) == [0, 1, 2, 3])


def test_it_can_be_closed(new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path) -> None:
    server.plan(RECORDS[0].file, Fault(delay_s=0.02))
    cache = new(limit=8)
    cache.prefetch([0, 1, 2])
    wait_for(lambda: requested(server) == [0])
    cache.close()
    assert on_disk(tmp_path / "cache") == [0]
    assert not [thread for thread in threading.enumerate() if thread.name == "shard prefetch"]
    assert not cache._pins
    assert content(cache, 1) == CONTENTS[1]


def test_what_is_open_stays(new: Callable[..., ShardCache], tmp_path: Path) -> None:
    cache = new(limit=2)
    file = cache.open(0)
    for shard in (1, 2, 3):
        cache.open(shard)
    assert on_disk(tmp_path / "cache") == [0, 3]
    del file
    cache.open(4)
    assert on_disk(tmp_path / "cache") == [3, 4]


def test_threads_download_each_shard_once(new: Callable[..., ShardCache], server: FaultyServer) -> None:
    cache = new()
    cache.prefetch(range(4))
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda shard: content(cache, shard), [*range(8), *reversed(range(8)), *range(8)]))
    assert contents == [*CONTENTS, *reversed(CONTENTS), *CONTENTS]
    assert sorted(requested(server)) == list(range(8))


def test_closing_ends_downloads_that_threads_wait_for(
    new: Callable[..., ShardCache], server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "RANGE_BYTES", 10)
    server.always[RECORDS[0].file] = server.always[RECORDS[1].file] = Fault(delay_s=0.01)  # 0.1 s a piece, 10 s in all
    cache = new()
    cache.prefetch([1])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.open, 0)
        wait_for(lambda: {0, 1} <= set(requested(server)))
        cache.close()
        with pytest.raises(RemoteError, match=r"shard-00000\.tar: stopped"):
            waiting.result()
    assert len(server.requests) < 50
    assert on_disk(tmp_path / "cache", ".part") == [0, 1], "the next download goes on from there"
    server.always.clear()
    assert content(cache, 0) == CONTENTS[0]


def test_a_closed_cache_is_used_again_while_its_old_download_stalls(
    new: Callable[..., ShardCache], server: FaultyServer
) -> None:
    server.plan(RECORDS[0].file, Fault(stall_after=0))
    cache = new()
    cache.prefetch([0])
    wait_for(lambda: requested(server) == [0])
    began = time.monotonic()
    cache.close()
    assert time.monotonic() - began < 3, "the stall of ten seconds is not waited for"
    cache.prefetch([1, 2])
    assert content(cache, 2) == CONTENTS[2]
    assert content(cache, 1) == CONTENTS[1]


def test_a_folder_that_cannot_be_used(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/cache: cannot be used as a cache \(Not a directory\)"):
        ShardCache(open_store(server.url), RECORDS, tmp_path / "file" / "cache", None)

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(shard_cache.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"\(No locks available\); name a folder on a local disk"):
        ShardCache(open_store(server.url), RECORDS, tmp_path / "cache", None)


# Real processes

PROGRAM = """
import json, sys
from pathlib import Path
from stylepipe.datasets.manifest import FileRecord
from stylepipe.datasets.shard_cache import ShardCache
from stylepipe.datasets.store import open_store
url, folder, limit, records = sys.argv[1:]
records = [FileRecord(*record) for record in json.loads(records)]
cache = ShardCache(open_store(url, stall_s=10), records, Path(folder), int(limit) or None)
print("ready", flush=True)
sys.stdin.readline()
windows = [[a, a + 1] for a in range(0, len(records), 2)]
cache.prefetch(windows[0])
for window, following in zip(windows, [*windows[1:], []]):
    cache.prefetch(following)
    for shard in window:
        assert cache.open(shard).read(10**6, 0) == bytes([shard]) * records[shard].bytes, shard
print("read", flush=True)
"""


def start(server: FaultyServer, folder: Path, limit: int = 0) -> subprocess.Popen[str]:
    """Start a process that reads all shards in windows of two, when it is told to go."""
    records = json.dumps([[record.file, record.bytes, record.sha256, record.samples] for record in RECORDS])
    command = [sys.executable, "-c", PROGRAM, server.url, str(folder), str(limit), records]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_download_each_shard_once(server: FaultyServer, tmp_path: Path) -> None:
    for record in RECORDS:
        server.always[record.file] = Fault(delay_s=0.005)
    processes = [start(server, tmp_path / "cache") for _ in range(2)]
    for process in processes:
        go(process)
    for process in processes:
        assert process.communicate(timeout=20)[0] == "read\n"
        assert process.returncode == 0
    assert sorted(requested(server)) == list(range(8))
    assert on_disk(tmp_path / "cache") == list(range(8))


def test_two_processes_with_a_limit(server: FaultyServer, tmp_path: Path) -> None:
    processes = [start(server, tmp_path / "cache", limit=5 * SIZE) for _ in range(2)]
    for process in processes:
        go(process)
    for process in processes:
        assert process.communicate(timeout=20)[0] == "read\n"
        assert process.returncode == 0


def test_killed_at_any_moment(server: FaultyServer, tmp_path: Path) -> None:
    for record in RECORDS:
        server.always[record.file] = Fault(delay_s=0.003)
    moments = random.Random(0)
    for _ in range(4):
        process = start(server, tmp_path / "cache", limit=4 * SIZE)
        go(process)
        time.sleep(moments.uniform(0.02, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for shard in on_disk(tmp_path / "cache"):
            assert (tmp_path / "cache" / RECORDS[shard].file).read_bytes() == CONTENTS[shard]
    last = start(server, tmp_path / "cache", limit=4 * SIZE)
    go(last)
    assert last.communicate(timeout=20)[0] == "read\n"
    assert on_disk(tmp_path / "cache", ".part") == []
    assert len(on_disk(tmp_path / "cache")) <= 4
