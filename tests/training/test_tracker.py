"""Dashboards: W&B offline and TensorBoard, and what happens without a login or a network."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from fake_wandb import quiet_wandb, records_of  # noqa: F401
from PIL import Image

from stylepipe.config import TrackerKind
from stylepipe.errors import UserError
from stylepipe.training import wandb_run
from stylepipe.training.tracker import Tracker
from stylepipe.training.wandb_run import wandb_mode

CONFIG = {"res": 64, "network": {"z_dim": 512}}


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def fill(kind: TrackerKind, accelerator: Accelerator, out: Path, **more: object) -> Tracker:
    """Log one of everything."""
    tracker = Tracker(kind, accelerator, project="stylepipe", config=CONFIG, out=out, **more)  # type: ignore[arg-type]
    pixels = np.full((8, 12, 3), 200, dtype=np.uint8)
    tracker.log({"Loss/G/adversarial": 0.7, "Progress/kimg": 1.0}, 1000)
    tracker.log_image("grid", pixels, 1000)
    out.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(out / "grid.png")
    tracker.log_image("reals", out / "grid.png", 1000)
    tracker.log_histogram("Logits/real", np.array([1.0, 2.0, np.nan]), 1000)
    tracker.log_histogram("Logits/fake", np.array([np.inf]), 1000)
    tracker.log_artifact(out / "grid.png", ["latest"])
    Image.fromarray(pixels).save(out / "clip.gif", save_all=True, append_images=[Image.fromarray(255 - pixels)])
    tracker.log_clip("clip", out / "clip.gif", 1000)
    tracker.summarize({"best/swd": 12.5, "best/swd_network": "network-000001.000.safetensors"}, 1000)
    tracker.alert("mode_collapse", "all images are alike", 1000)
    tracker.finish()
    tracker.alert("mode_collapse", "after the end: ignored", 1000)
    tracker.log({"Loss/G/adversarial": 0.7}, 2000)  # after the end: ignored
    return tracker


def test_none_logs_nothing(accelerator: Accelerator, tmp_path: Path) -> None:
    tracker = fill("none", accelerator, tmp_path / "run")
    assert tracker.run_id is None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["clip.gif", "grid.png"]


def test_wandb_offline_keeps_everything_below_out_and_its_id_when_resumed(
    accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    out = tmp_path / "run"
    first = fill("wandb", accelerator, out)
    assert first.run_id
    lines = [record.message for record in caplog.records if record.name == wandb_run.__name__]
    assert len(lines) == 1
    assert "offline (WANDB_MODE=offline); to upload: wandb sync " in lines[0]
    time.sleep(1.1)  # offline folders are named by the second
    second = fill("wandb", accelerator, out, run_id=first.run_id)
    assert second.run_id == first.run_id
    records = sorted((out / "wandb").glob(f"offline-run-*/run-{first.run_id}.wandb"))
    assert len(records) == 2
    content = b"".join(path.read_bytes() for path in records)
    for name in (b"Loss/G/adversarial", b"Logits/real", b"z_dim", b"mode_collapse", b"all images are alike"):
        assert name in content
    assert b"Logits/fake" not in content
    pictures = list((out / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert {path.name.split("_")[0] for path in pictures} == {"grid", "reals"}
    assert (np.asarray(Image.open(pictures[0]))[:, :, :3] == 200).all()
    said = capfd.readouterr()
    assert said.out == ""
    assert "wandb:" not in said.err


def test_the_mode_follows_the_login_without_asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a login"))
    monkeypatch.setattr("getpass.getpass", lambda *_: pytest.fail("asked for a login"))
    assert wandb_mode() == ("offline", "not logged in")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    mode, reason = wandb_mode()
    assert mode == "offline"
    assert "the login does not work" in reason
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert wandb_mode() == ("online", "logged in")
    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'b' * 40}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode()[0] == "online"


def test_disabled_by_the_environment(accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fill("wandb", accelerator, tmp_path / "run")
    assert not list(tmp_path.glob("run/wandb/*run-*"))


def test_tensorboard_forgets_what_came_after_the_state(accelerator: Accelerator, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    tracker = fill("tensorboard", accelerator, out)
    assert tracker.run_id is None
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("Loss/G/adversarial")] == [(1000, pytest.approx(0.7))]
    assert set(events.Tags()["images"]) == {"grid", "reals", "clip"}
    assert events.Images("clip")[0].encoded_image_string == (out / "clip.gif").read_bytes()
    assert [e.value for e in events.Scalars("best/swd")] == [12.5]
    assert "best/swd_network/text_summary" in events.Tags()["tensors"]
    assert events.Tags()["histograms"] == ["Logits/real"]
    resumed = Tracker("tensorboard", accelerator, project="p", config=CONFIG, out=out, images_seen=500)
    resumed.log({"Loss/G/adversarial": 0.5}, 750)
    resumed.finish()
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("Loss/G/adversarial")] == [750]


def test_a_missing_tensorboard_names_the_remedy(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Tracker("tensorboard", accelerator, project="p", config=CONFIG, out=tmp_path)


def test_only_the_main_process_logs(accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(accelerator), "is_main_process", property(lambda self: False))
    fill("wandb", accelerator, tmp_path / "run")
    assert not (tmp_path / "run" / "wandb").exists()


def test_wandb_draws_over_kimg_and_loses_nothing_where_a_run_goes_back(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    tracker = Tracker("wandb", accelerator, project="p", config=CONFIG, out=out)
    for images_seen in (1000, 2000):
        tracker.log({"Loss": images_seen / 1000}, images_seen)
    tracker.alert("rollback", "back to 1 kimg", 1000)
    tracker.rewind(1000)
    for images_seen in (2000, 3000):
        tracker.log({"Loss": images_seen / 1000 + 0.5}, images_seen)
    tracker.finish()
    records = list(records_of(out))
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert axes == {"*": "Progress/kimg"}
    rows = [
        {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    assert [(row["Progress/kimg"], row["Loss"]) for row in rows] == [(1, 1), (2, 2), (2, 2.5), (3, 3.5)]
    (alert,) = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text, alert.level) == ("rollback", "back to 1 kimg", "WARN")


def test_wandb_keeps_the_best_versions_with_their_aliases_clips_and_the_group_of_all_processes(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(accelerator), "num_processes", property(lambda self: 2))
    out = tmp_path / "run"
    tracker = fill("wandb", accelerator, out)
    (out / "network.safetensors").write_bytes(b"weights")
    time.sleep(1.1)  # offline folders are named by the second
    again = Tracker("wandb", accelerator, project="p", config=CONFIG, out=out, run_id=tracker.run_id)
    again.log_artifact(out / "network.safetensors", ["latest", "best"])
    again.finish()
    records = list(records_of(out))
    summary: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= {
                (u.nested_key[0] if u.nested_key else u.key): json.loads(u.value_json) for u in record.summary.update
            }
    assert summary["best/swd"] == 12.5
    assert summary["best/swd_network"] == "network-000001.000.safetensors"
    artifacts = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    found = [(a.name, a.type, sorted(a.aliases)) for a in artifacts]
    name = f"network-{tracker.run_id}"
    assert found == [(name, "model", ["latest"]), (name, "model", ["best", "latest"])]
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert {run.run_group for run in runs} == {tracker.run_id}
    (clip,) = (out / "wandb").glob("offline-run-*/files/media/videos/clip_*.gif")
    with Image.open(clip) as picture:
        assert picture.n_frames == 2  # type: ignore[attr-defined]


def test_tensorboard_drops_what_a_run_goes_back_over(accelerator: Accelerator, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker("tensorboard", accelerator, project="p", config=CONFIG, out=tmp_path)
    for images_seen in (1000, 2000):
        tracker.log({"Loss": 0.5}, images_seen)
    tracker.rewind(1000)
    tracker.alert("rollback", "back to 1 kimg", 1000)
    tracker.log({"Loss": 0.25}, 3000)
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("Loss")] == [(1000, 0.5), (3000, 0.25)]
    assert "Alarm/rollback/text_summary" in events.Tags()["tensors"]
