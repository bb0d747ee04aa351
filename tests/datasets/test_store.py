"""Bytes from web servers, object stores and commands, and what is said where they do not come."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from faulty_server import Fault, FaultyServer

from stylepipe.datasets import store as stores
from stylepipe.datasets.store import RemoteError, Store, open_store, redacted
from stylepipe.errors import UserError

pytest.importorskip("aiohttp", reason="needs the remote packages: pip install 'stylepipe[remote]'")

CONTENT = bytes(range(256)) * 40
STALL_S = 0.3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FaultyServer() as server:
        server.files["a.tar"] = CONTENT
        yield server


@pytest.fixture
def web(server: FaultyServer) -> Store:
    return open_store(server.url, stall_s=STALL_S)


def refusal(store: Store, name: str = "a.tar", start: int = 0, end: int | None = 100) -> RemoteError:
    """Return the error of a read, which always names the file."""
    with pytest.raises(RemoteError) as caught:
        store.read(name, start, end)
    assert name in str(caught.value)
    return caught.value


def test_ranges_and_whole_files(web: Store, server: FaultyServer) -> None:
    assert web.read("a.tar", 100, 300) == CONTENT[100:300]
    assert web.read("a.tar", 10_000) == CONTENT[10_000:]
    assert web.read("a.tar") == CONTENT
    assert server.ranges("a.tar") == ["bytes=100-299", "bytes=10000-", None]
    assert web.size("a.tar") == len(CONTENT)
    assert web.ranged
    assert web.url("a.tar") == f"{server.url}/a.tar"


def test_pieces_are_ranges(web: Store, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "RANGE_BYTES", 4000)
    assert b"".join(web.pieces("a.tar", 1000, 9500)) == CONTENT[1000:9500]
    assert server.ranges("a.tar") == ["bytes=1000-4999", "bytes=5000-8999", "bytes=9000-9499"]


def test_a_range_is_of_moderate_size() -> None:
    assert stores.RANGE_BYTES == 8 << 20


@pytest.mark.parametrize(
    ("status", "retry", "words"),
    [
        (401, False, "HTTP 401 Unauthorized; check the credentials"),
        (403, False, "HTTP 403 Forbidden; check the credentials"),
        (404, False, "HTTP 404 Not Found; check the location"),
        (408, True, "HTTP 408 Request Timeout"),
        (429, True, "HTTP 429 Too Many Requests"),
        (500, True, "HTTP 500 Internal Server Error"),
        (503, True, "HTTP 503 Service Unavailable"),
        (599, True, "HTTP 599"),
    ],
)
def test_statuses(web: Store, server: FaultyServer, status: int, retry: bool, words: str) -> None:
    server.always["a.tar"] = Fault(status=status)
    error = refusal(web)
    assert (error.status, error.retry, error.retry_after_s) == (status, retry, None)
    assert f"{server.url}/a.tar: {words}" in str(error)
    with pytest.raises(RemoteError, match=f"a.tar: HTTP {status}"):
        web.size("a.tar")


def test_a_server_says_when_to_come_back(web: Store, server: FaultyServer) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    server.plan("a.tar", *(Fault(status=503, retry_after=after) for after in ("7", later, "soon", "-1")))
    assert refusal(web).retry_after_s == 7
    assert refusal(web).retry_after_s == pytest.approx(90, abs=3)
    assert refusal(web).retry_after_s is None
    assert refusal(web).retry_after_s == 0


def test_a_server_that_ignores_ranges_is_left_at_once(web: Store, server: FaultyServer) -> None:
    # Half of a body that never ends: who reads it before he looks at the status stalls.
    server.always["a.tar"] = Fault(ignore_range=True, stall_after=5000)
    began = time.monotonic()
    error = refusal(web)
    assert time.monotonic() - began < STALL_S
    assert (error.status, error.retry) == (200, False)
    assert "ignores Range requests" in str(error)
    assert "pipe:curl" in str(error)


def test_a_range_past_the_end(web: Store) -> None:
    error = refusal(web, start=len(CONTENT) + 5, end=len(CONTENT) + 10)
    assert (error.status, error.retry) == (416, False)
    assert "shorter than the manifest says" in str(error)
    error = refusal(web, start=0, end=len(CONTENT) + 10)
    assert not error.retry
    assert f"the remote file has {len(CONTENT):,} bytes, fewer than" in str(error)


def test_another_range_than_asked_for(web: Store, server: FaultyServer) -> None:
    server.always["a.tar"] = Fault(shift=1)
    assert "the server sent bytes from 6 on where 5 was asked for" in str(refusal(web, start=5))


def test_a_body_that_is_cut(web: Store, server: FaultyServer) -> None:
    server.plan("a.tar", Fault(cut_after=40), Fault(cut_after=40, no_length=True))
    error = refusal(web)
    assert (error.status, error.retry) == (None, True)
    error = refusal(web)
    assert (error.status, error.retry) == (None, True)
    assert "40 bytes came from 0 on instead of 100" in str(error)
    assert web.read("a.tar", 0, 100) == CONTENT[:100]


@pytest.mark.parametrize("stall_after", [0, 50])
def test_a_server_that_stalls(web: Store, server: FaultyServer, stall_after: int) -> None:
    server.plan("a.tar", Fault(stall_after=stall_after))
    began = time.monotonic()
    error = refusal(web)
    assert STALL_S * 0.9 < time.monotonic() - began < STALL_S + 2
    assert error.retry
    assert f"stalled, no byte came for {STALL_S:g} s" in str(error)
    assert web.read("a.tar", 0, 100) == CONTENT[:100]


def test_a_slow_server_does_not_stall(web: Store, server: FaultyServer) -> None:
    server.plan("a.tar", Fault(delay_s=STALL_S / 5))  # ten pieces: twice the limit on silence
    assert web.read("a.tar", 0, 5000) == CONTENT[:5000]


def test_no_server(web: Store, server: FaultyServer) -> None:
    server.__exit__()
    error = refusal(web)
    assert (error.status, error.retry) == (None, True)
    assert "ClientConnectorError" in str(error)


def test_secrets_are_used_and_not_shown(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"http://me:se%20cret@{server.host}/my data/?sig=hidden&x=1", stall_s=STALL_S)
    assert store.read("a.tar", 0, 9) == CONTENT[:9]
    assert server.requests[-1].path == "/my%20data/a.tar?sig=hidden&x=1"
    assert (server.requests[-1].authorization or "").startswith("Basic ")
    assert store.url("a.tar") == f"http://***@{server.host}/my data/a.tar?***"
    server.always["a.tar"] = Fault(status=500)
    texts = [str(refusal(store)), str(refusal(store, "gone.tar"))]
    server.__exit__()
    texts.append(str(refusal(store)))
    for text in texts:
        assert not any(secret in text for secret in ("hidden", "se%20cret", "se cret"))
    error = refusal(store)  # nor in a traceback, which worker processes print
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("curl 'https://h/p?a=b' -s", "curl 'https://h/p?***' -s"),
        ("curl -H 'Authorization: Bearer abc.def' x", "curl -H 'Authorization: Bearer ***' x"),
        ("(url=https://u:p@q@h/p?a=b)", "(url=https://***@h/p?***)"),
        ("s3://bucket/file", "s3://bucket/file"),
    ],
)
def test_redacted(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_users_options_of_fsspec_go_with_ours(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    options = {"client_kwargs": {"headers": {"Authorization": "Bearer x"}}}
    monkeypatch.setitem(fsspec.config.conf, "http", options)
    store = open_store(server.url, stall_s=STALL_S)
    assert store.read("a.tar", 0, 9) == CONTENT[:9]
    assert server.requests[-1].authorization == "Bearer x"
    server.plan("a.tar", Fault(stall_after=0))
    assert "stalled" in str(refusal(store))


def test_a_proxy_of_the_environment(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{server.host}")
    assert open_store("http://data.example/faces", stall_s=STALL_S).read("a.tar", 0, 9) == CONTENT[:9]
    assert server.requests[-1].path == "http://data.example/faces/a.tar"


def test_threads_share_a_connection(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    web, made = open_store(server.url, stall_s=20), []
    connect = stores._connect
    monkeypatch.setattr(stores, "_connect", lambda *args: made.append(args) or connect(*args))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda start: web.read("a.tar", start, 9), range(8))) == [CONTENT[i:9] for i in range(8)]
    assert len(made) == 1


def test_an_error_goes_to_other_processes(web: Store) -> None:
    error = refusal(web, "gone.tar")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.status, copy.retry) == (str(error), 404, False)


@pytest.mark.parametrize("location", ["/data/faces", "ftp://host/x", "faces", "http://", "s3:///", "pipe: "])
def test_what_is_no_location(location: str) -> None:
    with pytest.raises(UserError, match="expected"):
        open_store(location)


@pytest.mark.parametrize(
    ("location", "package"),
    [("https://h/x", "aiohttp"), ("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("hf://datasets/u/n", "huggingface_hub")],
)
def test_an_absent_package(monkeypatch: pytest.MonkeyPatch, location: str, package: str) -> None:
    monkeypatch.setattr(stores, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=rf"{package}, which is not installed; .* pip install 'stylepipe\[remote\]'"):
        open_store(location)


def test_a_package_of_another_version(web: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*_: object, **__: object) -> None:
        raise ImportError("aiohttp is too old")

    monkeypatch.setattr("fsspec.get_filesystem_class", too_old)
    with pytest.raises(UserError, match=r"aiohttp is too old.*pip install 'stylepipe\[remote\]'"):
        web.read("a.tar")


@pytest.mark.parametrize(
    ("kind", "retry"), [(OSError, True), (ConnectionResetError, True), (ValueError, False), (RuntimeError, False)]
)
def test_what_may_mend_itself(web: Store, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], retry: bool) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("no luck at https://h/p?sig=hidden")

    monkeypatch.setattr("fsspec.get_filesystem_class", fail)
    error = refusal(web)
    assert (error.status, error.retry) == (None, retry)
    assert str(error).endswith(f"a.tar: {kind.__name__}: no luck at https://h/p?***")


# Object stores


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("s3fs", reason="needs the remote packages: pip install 'stylepipe[remote]'")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_s3(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server", reason="needs moto, a real S3 server on loopback: pip install moto flask")
    s3fs = pytest.importorskip("s3fs")
    s3 = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*s3.get_host_and_port()))
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("faces")
        bucket.pipe_file("faces/prepared/a.tar", CONTENT)
        store = open_store("s3://faces/prepared/", stall_s=5)
        assert store.read("a.tar", 100, 300) == CONTENT[100:300]
        assert store.read("a.tar") == CONTENT
        assert store.size("a.tar") == len(CONTENT)
        assert store.url("a.tar") == "s3://faces/prepared/a.tar"
        for where in (store, open_store("s3://nowhere/prepared", stall_s=5)):
            error = refusal(where, "gone.tar")
            assert (error.status, error.retry) == (404, False)
        error = refusal(store, start=len(CONTENT), end=len(CONTENT) + 9)
        assert (error.status, error.retry) == (416, False)
        error = refusal(store, start=0, end=len(CONTENT) + 9)
        assert f"{len(CONTENT):,} bytes came from 0 on instead of" in str(error)
    finally:
        s3.stop()


def test_an_s3_server_that_fails(aws: None, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.host}")
    store = open_store("s3://faces/prepared", stall_s=STALL_S)
    assert store.read("a.tar", 100, 300) == CONTENT[100:300]
    server.plan(
        "a.tar", Fault(status=503, retry_after="7"), Fault(status=403), Fault(stall_after=50), Fault(cut_after=50)
    )
    error = refusal(store)
    assert (error.status, error.retry, error.retry_after_s) == (503, True, 7)
    error = refusal(store)
    assert (error.status, error.retry) == (403, False)
    began = time.monotonic()
    assert "stalled" in str(refusal(store))
    assert time.monotonic() - began < STALL_S + 2
    assert refusal(store).retry
    assert len(server.ranges("a.tar")) == 5, "no tries of its own, which nobody counts"
    server.always["a.tar"] = Fault(ignore_range=True)
    error = refusal(store)
    assert (error.status, error.retry) == (200, False)


def test_s3_without_credentials(aws: None, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.host}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = refusal(open_store("s3://faces/prepared", stall_s=STALL_S))
    assert "NoCredentialsError" in str(error)
    assert not error.retry


def test_google_cloud_storage(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcsfs", reason="needs the remote packages: pip install 'stylepipe[remote]'")
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": f"http://{server.host}", "token": "anon"})
    store = open_store("gs://faces/prepared", stall_s=STALL_S)
    assert store.read("a.tar", 100, 300) == CONTENT[100:300]
    assert store.url("a.tar") == "gs://faces/prepared/a.tar"
    error = refusal(store, "gone.tar")
    assert (error.status, error.retry) == (404, False)
    server.plan("a.tar", Fault(status=403), Fault(stall_after=50))
    error = refusal(store)
    assert (error.status, error.retry) == (403, False)
    assert "stalled" in str(refusal(store))


def test_hugging_face(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://{server.host}", "token": "hidden"})
    listing: list[dict[str, Any]] = [
        {"type": "file", "path": f"prepared/{name}", "size": len(CONTENT), "oid": "1"} for name in ("a.tar", "b.tar")
    ]
    repository = "/api/datasets/user/faces"
    server.pages[repository] = json.dumps({"id": "user/faces", "sha": "1", "tags": []}).encode()
    server.pages[f"{repository}/tree/main/prepared"] = json.dumps(listing).encode()
    store = open_store("hf://datasets/user/faces/prepared", stall_s=STALL_S)
    assert store.read("a.tar", 100, 300) == CONTENT[100:300]
    assert server.ranges("a.tar") == ["bytes=100-299"]
    assert store.size("a.tar") == len(CONTENT)
    error = refusal(store, "gone.tar")
    assert (error.status, error.retry) == (404, False)
    server.always["b.tar"] = Fault(status=403)
    error = refusal(store, "b.tar")
    assert (error.status, error.retry) == (403, False)
    assert "hidden" not in str(error)


# Commands


def pipe(command: str) -> Store:
    return open_store(f"pipe:{command}", stall_s=STALL_S)


def test_a_command_takes_the_name(tmp_path: Path) -> None:
    odd = "it's a.tar"
    (tmp_path / odd).write_bytes(CONTENT)
    for command in (f"cat {tmp_path}/", f"cat {tmp_path}/{{}}", f"cd {tmp_path} && cat", f"cat < {tmp_path}/{{}}"):
        store = pipe(command)
        assert store.read(odd) == CONTENT
        assert b"".join(store.pieces(odd, 0, 5)) == CONTENT
        assert store.size(odd) is None
        assert not store.ranged
    assert pipe("cat /x/").url("a.tar") == "pipe:cat /x/a.tar"
    assert pipe("curl https://h/{}?sig=hidden").url("a.tar") == "pipe:curl https://h/a.tar?***"
    error = refusal(pipe("cat /x/"), "a.tar", 5, 9)
    assert not error.retry
    assert "whole files only" in str(error)


def test_a_command_that_fails() -> None:
    error = refusal(pipe("echo some; echo 'no such host' >&2; exit 7; :"), end=None)
    assert (error.status, error.retry) == (7, True)
    assert "exit status 7, stderr: no such host" in str(error)
    error = refusal(pipe("no-such-command"), end=None)
    assert (error.status, error.retry) == (127, False)
    assert "nothing on stderr" in str(refusal(pipe("exit 1; :"), end=None))


def test_a_command_that_says_a_lot() -> None:
    error = refusal(pipe("yes no | head -c 300000 >&2; echo last >&2; exit 1; :"), end=None)
    assert str(error).endswith("no\nlast")
    assert len(str(error)) < 500


@pytest.mark.parametrize("command", ["printf some; sleep 60; :", "exec >&-; sleep 60; :", "sleep 60 & echo; :"])
def test_a_command_that_stalls(command: str, tmp_path: Path) -> None:
    began = time.monotonic()
    error = refusal(pipe(f"echo $$ > {tmp_path}/pid; {command}"), end=None)
    assert time.monotonic() - began < STALL_S + 2
    assert error.retry
    assert "stalled" in str(error) or "does not end" in str(error)
    group = int((tmp_path / "pid").read_text())
    _wait_until_gone(group)


def test_a_command_that_is_not_read_to_its_end_is_ended(tmp_path: Path) -> None:
    pieces = pipe(f"echo $$ > {tmp_path}/pid; yes; :").pieces("a.tar", 0, 5)
    assert next(pieces)
    pieces.close()
    _wait_until_gone(int((tmp_path / "pid").read_text()))


def _wait_until_gone(group: int) -> None:
    """Wait until no process of a group runs; whoever collects orphans here may leave them as zombies."""
    deadline = time.monotonic() + 5
    while running := [stat for stat in _stats() if int(stat[2]) == group and stat[0] != "Z"]:
        assert time.monotonic() < deadline, running
        time.sleep(0.02)


def _stats() -> list[list[str]]:
    """Return state, parent, group, ... of every process."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(path.read_text().rpartition(")")[2].split())
        except OSError:
            continue
    return stats
