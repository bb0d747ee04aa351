"""Dashboards that fail: no run may die, hang or lose anything by them. W&B's real client talks to a server of ours."""

from __future__ import annotations

import gc
import logging
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from accelerate import Accelerator
from fake_wandb import FakeWandb, fake_wandb, logged_in, quiet_wandb  # noqa: F401
from PIL import Image

from stylepipe.config import TrackerKind
from stylepipe.training import tracker as module
from stylepipe.training import wandb_run
from stylepipe.training.tracker import Tracker

pytestmark = pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")  # W&B forgets its processes that died
BOUND_S = 30  # for what takes a few seconds at the most where nobody else needs the machine


def start(out: Path, kind: TrackerKind = "wandb", **more: object) -> Tracker:
    return Tracker(kind, Accelerator(cpu=True), project="p", config={"res": 16}, out=out, **more)  # type: ignore[arg-type]


def log(tracker: Tracker, *kimg: int) -> None:
    for value in kimg:
        tracker.log({"Loss": float(value)}, value * 1000)


def everything(tracker: Tracker, folder: Path) -> None:
    """Call every method."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    if not (folder / "clip.gif").exists():
        Image.fromarray(pixels).save(folder / "clip.gif", save_all=True, append_images=[Image.fromarray(255 - pixels)])
    log(tracker, 5)
    tracker.log_image("grid", pixels, 5000)
    tracker.log_histogram("Logits", np.ones(3), 5000)
    tracker.log_clip("clip", folder / "clip.gif", 5000)
    tracker.summarize({"best/swd": 1.0}, 5000)
    tracker.log_artifact(folder / "clip.gif", ["latest"])
    tracker.alert("mode_collapse", "all alike", 5000)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = (record for record in caplog.records if record.name.startswith("stylepipe.training."))
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def only_warning(caplog: pytest.LogCaptureFixture) -> str:
    lines = warnings_in(caplog)
    assert len(lines) == 1, "\n".join(lines)
    return lines[0]


def cores() -> list[psutil.Process]:
    """Return W&B's processes."""
    found = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]


def wait_for(what: object, seconds: float = BOUND_S) -> None:
    """Wait until a function says yes."""
    assert callable(what)
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@contextmanager
def small_disk(path: Path, megabytes: int = 4) -> Iterator[None]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


@pytest.fixture(autouse=True)
def _tidy(quiet_wandb: None) -> Iterator[None]:  # noqa: F811
    yield
    for core in gc.get_objects():
        if type(core) is subprocess.Popen and core.returncode is None and "wandb-core" in core.args[0]:
            core.kill()
            core.wait()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    with fake_wandb() as fake:
        log_in(monkeypatch, fake.url)
        yield fake


def log_in(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", url)


@pytest.mark.parametrize(
    "fault",
    ["refused", "silent", "status 401", *(pytest.param(f, marks=pytest.mark.slow) for f in ("no name", "status 500"))],
)
def test_a_server_that_cannot_be_had_means_offline_after_a_bounded_time_and_one_line(
    fault: str, tmp_path: Path, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stylepipe.training")
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        urls = {
            "refused": "http://127.0.0.1:9",  # nobody listens there
            "silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "no name": "http://nobody.invalid",
        }
        monkeypatch.setenv("WANDB_BASE_URL", urls.get(fault, server.url))
        if fault.startswith("status"):
            server.status = int(fault.split()[1])
        began = time.monotonic()
        tracker = start(tmp_path / "run")
        log(tracker, 1, 2)
        tracker.finish()
        assert time.monotonic() - began < BOUND_S
    (line,) = [record.getMessage() for record in caplog.records if record.name == wandb_run.__name__]
    assert warnings_in(caplog) == [line]
    assert "going on offline (" in line
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-*-{tracker.run_id}" in line
    assert logged_in(tmp_path / "run", "Loss") == [1, 2]


@pytest.mark.slow
def test_a_run_that_fell_offline_goes_on_online_under_the_same_id_and_what_it_lacks_is_uploaded(
    tmp_path: Path, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 2)
    out = tmp_path / "a run"
    server.answers.clear()
    first = start(out)
    log(first, 1, 2)
    first.finish()
    server.answers.set()
    second = start(out, run_id=first.run_id)
    log(second, 3, 4)
    second.finish()
    assert second.run_id == first.run_id
    assert {name: server.values(name, "Loss") for name in server.runs} == {first.run_id: [3, 4]}
    line = only_warning(caplog)
    sync(line, tmp_path)
    assert server.values(str(first.run_id), "Loss") == [3, 4, 1, 2]  # drawn over kimg, so that the order says nothing


def sync(line: str, cwd: Path) -> None:
    """Run the command that a line ends with, as a shell would; W&B writes its logs where that is done."""
    command = line[line.index("wandb sync") :]
    subprocess.run(["sh", "-c", f"{shlex.quote(str(Path(sys.executable).parent))}/{command}"], check=True, cwd=cwd)


@pytest.mark.parametrize("uploaded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_server_that_hangs_in_mid_run_delays_nothing_and_loses_nothing(
    uploaded: bool, tmp_path: Path, server: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path / "run")
    log(tracker, 1, 2)
    server.answers.clear()
    began = time.monotonic()
    for kimg in range(3, 103):
        log(tracker, kimg)
    tracker.finish(timeout_s=3)
    assert time.monotonic() - began < BOUND_S
    assert not cores()
    line = only_warning(caplog)
    assert "it had not taken everything after 3 s" in line
    (folder,) = (tmp_path / "run" / "wandb").glob(f"run-*-{tracker.run_id}")
    assert line.endswith(f"wandb sync --include-online {folder}")
    assert logged_in(tmp_path / "run", "Loss", "run-*") == list(range(1, 103))
    if uploaded:
        server.answers.set()
        sync(line, tmp_path)
        assert server.values(str(tracker.run_id), "Loss") == list(range(1, 103))


@pytest.mark.slow
def test_a_server_that_refuses_everything_in_mid_run_is_told_once(
    tmp_path: Path, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path / "run")
    log(tracker, 1)
    server.status = 401
    log(tracker, 2)
    wait_for(lambda: warnings_in(caplog), 60)
    log(tracker, 3)
    tracker.finish()
    line = only_warning(caplog)
    assert "Fatal error while uploading data" in line
    assert f"wandb sync --include-online {tmp_path}" in line
    assert logged_in(tmp_path / "run", "Loss", "run-*") == [1, 2, 3]


@pytest.mark.parametrize("online", [False, True])
def test_where_wandbs_process_is_killed_one_warning_is_given_and_another_goes_on(
    online: bool, tmp_path: Path, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not online:
        monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    tracker = start(out)
    log(tracker, 1)
    (folder,) = (out / "wandb").glob(f"*run-*-{tracker.run_id}")
    wait_for(lambda: b"Loss" in (folder / f"run-{tracker.run_id}.wandb").read_bytes(), 10)  # W&B's own way: 15 s
    cores()[0].kill()
    wait_for(lambda: not cores())
    everything(tracker, tmp_path)
    tracker.finish()
    line = only_warning(caplog)
    assert "its process wandb-core has ended" in line
    assert line.endswith(f"wandb sync --include-online {folder}")
    assert set(logged_in(out, "Loss", "*run-*")) == {1, 5}
    assert server.values(str(tracker.run_id), "Loss")[-1:] == [5] * online


def test_a_process_of_wandbs_that_no_longer_answers_delays_nothing_and_is_ended(
    tmp_path: Path, server: FakeWandb, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path / "run")
    cores()[0].suspend()
    began = time.monotonic()
    for step in range(1000):
        tracker.log({f"{step}/{number}": 0.0 for number in range(50)}, step)
    logged = time.monotonic() - began
    tracker.finish(timeout_s=1)
    assert logged < 10
    assert time.monotonic() - began < BOUND_S
    assert not cores()
    assert ["does not keep up" in line or "after 1 s" in line for line in warnings_in(caplog)] == [True, True]


@pytest.mark.slow
def test_a_full_disk_is_told_and_an_offline_run_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_run, "STUCK_S", 4)
    monkeypatch.setattr(module, "MEND_S", 1)
    out = tmp_path / "small"
    with small_disk(out):
        tracker = start(out)
        log(tracker, 1)
        (folder,) = (out / "wandb").glob(f"offline-run-*-{tracker.run_id}")
        wait_for(lambda: b"Loss" in (folder / f"run-{tracker.run_id}.wandb").read_bytes())
        fill_up(out / "ballast")
        everything(tracker, tmp_path)
        for kimg in range(10, 10 + 100 * BOUND_S):  # what its file's last page has room for is still written
            log(tracker, kimg)
            time.sleep(0.01)
            if any("does not grow" in line for line in warnings_in(caplog)):
                break
        full, stuck = warnings_in(caplog)
        assert "No space left on device" in full
        assert "does not grow, as on a full disk" in stuck
        (out / "ballast").unlink()
        for kimg in range(10_000, 10_000 + 100 * BOUND_S):
            log(tracker, kimg)
            time.sleep(0.01)
            if len(list((out / "wandb").glob(f"offline-run-*-{tracker.run_id}"))) == 2:
                break
        log(tracker, 20_000)
        tracker.finish()
        assert warnings_in(caplog) == [full, stuck]
        assert logged_in(out, "Loss", sorted(folder.parent.glob("offline-*"))[1].name)[-1] == 20_000


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread dies of it
def test_tensorboard_on_a_full_disk_is_told_once_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(module, "MEND_S", 0)
    out = tmp_path / "small"
    with small_disk(out):
        tracker = start(out, "tensorboard")
        log(tracker, 1)
        wait_for(lambda: tracker._calls.empty())
        fill_up(out / "ballast")
        for _ in range(20):
            everything(tracker, tmp_path)
        wait_for(lambda: warnings_in(caplog))
        assert "No space left on device" in only_warning(caplog)
        wait_for(lambda: tracker._calls.empty())
        assert len(list((out / "tensorboard").iterdir())) == 1  # none is begun in vain
        (out / "ballast").unlink()
        log(tracker, 6, 7)
        tracker.finish()
        assert only_warning(caplog)
        events = EventAccumulator(str(out / "tensorboard"))
        events.Reload()
        steps = [event.step for event in events.Scalars("Loss")]
        assert (steps[0], *steps[-2:]) == (1000, 6000, 7000)


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_what_a_dashboard_raises_is_told_once_and_ends_nothing(
    kind: TrackerKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "tensorboard":
        pytest.importorskip("tensorboard")
    tracker = start(tmp_path, kind)
    inner = tracker._tracker

    class Broken(type(inner)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> object:
            if name in ("log", "log_images", "tracker", "finish"):
                raise RuntimeError(f"no {name}")
            return super().__getattribute__(name)

    assert inner is not None
    inner.__class__ = Broken
    everything(tracker, tmp_path)
    tracker.rewind(1000)
    everything(tracker, tmp_path)
    tracker.finish()
    line = only_warning(caplog)
    assert line.startswith({"wandb": "W&B: no log;", "tensorboard": "TensorBoard: no log;"}[kind])
    assert {"wandb": "wandb sync", "tensorboard": "it goes on"}[kind] in line


def test_a_dashboard_that_cannot_be_started_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise OSError("wandb-core: cannot be executed")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = start(tmp_path, run_id="abc")
    everything(tracker, tmp_path)
    tracker.finish()
    assert tracker.run_id == "abc"  # a later start finds the run
    line = only_warning(caplog)
    assert "W&B: wandb-core: cannot be executed" in line
    assert "--tracker none" in line


def test_a_writer_that_hangs_delays_no_step_and_the_end_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(module, "KILLED_S", 0.1)
    tracker = start(tmp_path, "tensorboard")
    inner, hung = tracker._tracker, threading.Event()
    assert inner is not None
    monkeypatch.setattr(inner, "log", lambda *_, **__: hung.wait())
    began = time.monotonic()
    for kimg in range(1000):
        log(tracker, kimg)
    tracker.finish(timeout_s=0.5)
    assert time.monotonic() - began < BOUND_S
    assert ["does not keep up" in line or "after 0.5 s" in line for line in warnings_in(caplog)] == [True, True]
    hung.set()


def test_what_is_logged_is_what_the_caller_had_at_that_time(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = start(tmp_path, "tensorboard")
    scalars, values = {"Loss": 0.5}, np.ones(4)
    tracker.log(scalars, 1000)
    tracker.log_histogram("Logits", values, 1000)
    scalars["Loss"], values[:] = 7, 7
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("Loss")] == [0.5]
    assert events.Histograms("Logits")[0].histogram_value.max == 1


CHILD = """
import logging, sys
from pathlib import Path
from accelerate import Accelerator
from stylepipe.training import tracker as module

logging.basicConfig(format="%(message)s")
module.Tracker.finish.__defaults__ = (2,)
tracker = module.Tracker("wandb", Accelerator(cpu=True), project="p", config={}, out=Path(sys.argv[1]))
tracker.log({"Loss": 1.0}, 1000)
print("started", flush=True)
sys.stdin.readline()
tracker.log({"Loss": 2.0}, 2000)
if sys.argv[2] == "finished":
    tracker.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["finished", "forgotten"])
def test_nothing_keeps_the_interpreter_from_ending(end: str, tmp_path: Path, server: FakeWandb) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", CHILD, str(out), end]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        server.answers.clear()
        began = time.monotonic()
        said = child.communicate("go on\n")
    assert time.monotonic() - began < BOUND_S
    assert child.returncode == 0
    assert said[0] == ""
    assert len(said[1].splitlines()) == 1, said[1]
    assert "it had not taken everything after 2 s" in said[1]
    assert logged_in(out, "Loss", "run-*") == [1, 2]
