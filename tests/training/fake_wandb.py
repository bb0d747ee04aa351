"""A W&B server on the loopback that answers what wandb 0.31 asks, or fails as it is told to; and W&B's files, read."""

from __future__ import annotations

import json
import re
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BLOCK = 32768


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No W&B login or process outlives a test, or is there before it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")  # the tracker sets it, and that would outlive the test
    for name in ("WANDB_ERROR_REPORTING", "WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_NAME", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


class FakeWandb:
    """What a server has been sent, and how it answers.

    Attributes:
        url: for WANDB_BASE_URL.
        status: of every answer; what is not 200 is a failure.
        answers: while clear, requests are taken and not answered.
        asked: the name of each GraphQL request, and the path of each other one.
        runs: rows of history by the id of the run that they were sent under.
    """

    def __init__(self, url: str) -> None:
        self.url, self.status = url, 200
        self.answers = threading.Event()
        self.answers.set()
        self.asked: list[str] = []
        self.runs: dict[str, list[dict[str, Any]]] = {}

    def values(self, run_id: str, name: str) -> list[Any]:
        """Return what has been logged under a name."""
        return [row[name] for row in self.runs.get(run_id, []) if name in row]

    def answer(self, path: str, content: bytes) -> dict[str, Any]:
        """Return the answer to a request, and keep what it brings."""
        if streamed := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            if history := json.loads(content).get("files", {}).get("wandb-history.jsonl"):
                offset, rows = history["offset"], [json.loads(line) for line in history["content"]]
                self.runs[streamed[1]][offset : offset + len(rows)] = rows
            path = "file_stream"
        if path != "/graphql":
            self.asked.append(path)
            return {}
        body = json.loads(content)
        query = re.match(r"\s*(?:query|mutation) (\w+)", body["query"])
        assert query is not None
        self.asked.append(query[1])
        return {"data": self._data(query[1], body.get("variables", {}))}

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "somebody"}}
        name = variables.get("name", "")
        if query == "RunResumeStatus":
            return {"model": project | {"bucket": self._run(name) if name in self.runs else None}}
        if query == "UpsertBucket":
            self.runs.setdefault(name, [])
            return {"upsertBucket": {"bucket": self._run(name) | {"project": project}}}
        if query == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if query == "Viewer":
            who = {"id": "u", "entity": "somebody", "username": "somebody", "email": "", "flags": "{}"}
            return {"viewer": who | {"teams": {"edges": []}}}
        if query == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if query == "ArtifactType":
            return {"project": None}
        if query == "CreateArtifact":  # there already, so that nothing is uploaded
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if query == "NotifyScriptableRunAlert":
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def _run(self, name: str) -> dict[str, Any]:
        rows = self.runs[name]
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": name,
            "config": "{}",
            "wandbConfig": '{"t": 1}',  # else it counts as not begun
            "summaryMetrics": json.dumps(rows[-1] if rows else {}),
            "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
        }


@contextmanager
def fake_wandb() -> Iterator[FakeWandb]:
    """Serve for as long as the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fake.answers.wait()
            answer = json.dumps(fake.answer(self.path, content) if fake.status == 200 else {}).encode()
            with suppress(OSError):  # nobody waits for it any more
                self.send_response(fake.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that was killed

    server = Server(("127.0.0.1", 0), Handler)
    fake = FakeWandb(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.answers.set()
        server.shutdown()
        server.server_close()
        thread.join()


def records_of(out: Path, folders: str = "offline-run-*") -> Iterator[Any]:
    """Read back what a run left for `wandb sync`: LevelDB's log format, after 7 bytes of a header."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # only when its own process has ended is all of it on the disk
    for path in sorted((out / "wandb").glob(f"{folders}/run-*.wandb")):
        data, place, whole = path.read_bytes(), 7, b""
        while place < len(data):
            if (left := BLOCK - place % BLOCK) < 7:  # too little for the 7 bytes before a chunk: CRC, length, kind
                place += left
                continue
            length, kind = struct.unpack_from("<HB", data, place + 4)
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or the last chunk of one
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                whole = b""
                yield record


def logged_in(out: Path, name: str, folders: str = "offline-run-*") -> list[Any]:
    """Return what a run's files say was logged under a name."""
    return [
        json.loads(item.value_json)
        for record in records_of(out, folders)
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
        if name in (item.key, *item.nested_key)
    ]
