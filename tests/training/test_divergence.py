"""Trainings that go wrong: what is told, what is kept, and how they go on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from poisoned_train import poison
from safetensors.torch import load_file

from stylepipe.cli.main import main
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training import checkpoint, snapshots
from stylepipe.training.checkpoint import load_state, newest_healthy_state

SCRIPT = Path(__file__).with_name("poisoned_train.py")
OPTIONS = [
    *("--res", "16", "--batch-size", "8", "--tracker", "none", "--seed", "3", "--augment", "ada"),
    *("--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16", "--network.w-dim", "16"),
    *("--loss.r1-interval", "4", "--tick-kimg", "0.016", "--grid-kimg", "10", "--snapshot-kimg", "0.032"),
    *("--loss.r1-gamma", "10", "--divergence-updates", "4"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder, out = tmp_path_factory.mktemp("photographs"), tmp_path_factory.mktemp("prepared") / "faces16"
    for index in range(24):
        draw_face(index, 32).save(folder / f"{index:02d}.png")
    prepare(folder, out, Preparation(16), workers=1, progress=False)
    return out


def options(shards: Path, out: Path, kimg: float, *more: str) -> list[str]:
    return ["train", "--data", str(shards), "--out", str(out), "--kimg", str(kimg), *OPTIONS, *more]


def stats_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]


def alarms_of(out: Path) -> list[tuple[object, str]]:
    return [(line["images_seen"], name) for line in stats_of(out) for name in line if name.startswith("Alarm/")]


def tensors_of(state: Path) -> dict[str, torch.Tensor]:
    return load_file(state / "state.safetensors")


def folders(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.is_dir() and path.name not in ("grids", "clips", "ema"))


def test_a_divergence_stops_with_a_state_to_look_at_and_the_healthy_one_to_go_on_from(shards, tmp_path, capsys):
    out = tmp_path / "out"
    with poison(40, cured_by=2):
        assert main(options(shards, out, 1)) == 2
    message = capsys.readouterr().err
    assert "training has diverged at 0.08 kimg: the last 5 updates of D/main had inf or NaN gradients" in message
    assert f"start the same command with --out {out} to go on from state-000000.032" in message
    assert "--on-divergence rollback" in message
    assert "Traceback" not in message
    assert folders(out) == ["diverged-000000.064", "diverged-000000.080", "state-000000.032"], (
        "one saved on the way there"
    )
    assert {path.name for path in out.glob("*.safetensors")} == {
        *("network-000000.032.safetensors", "diverged-network-000000.064.safetensors", "network-best.safetensors")
    }
    assert (out / "network-best.safetensors").samefile(out / "network-000000.032.safetensors")
    assert alarms_of(out) == [(48, "Alarm/not_finite"), (80, "Alarm/divergence")]
    log = (out / "log.txt").read_text()
    assert log.count("ALARM not_finite: updates with inf or NaN gradients were skipped: 50.0% of D/main") == 1
    assert log.count("ALARM divergence: the last 5 updates of D/main") == 1
    kept = load_state(out / "diverged-000000.080")
    assert not kept.info["healthy"]
    assert kept.tensors["skipped.D/main"].tolist() == [5, 5]
    assert kept.tensors["skipped.G/main"].tolist() == [0, 0]
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())

    assert main(options(shards, out, 0.096)) == 0, "the same command goes on from the healthy state"
    assert [name for name in folders(out) if name.startswith("state")] == [
        *("state-000000.032", "state-000000.064", "state-000000.096")
    ]
    seen = [line["images_seen"] for line in stats_of(out)]
    assert seen == [16, 32, 48, 64, 80, 96]


def test_a_rollback_goes_on_from_the_healthy_state_with_more_regularization(shards, tmp_path, capsys):
    out = tmp_path / "out"
    with poison(40, cured_by=4):
        assert main(options(shards, out, 0.096, "--on-divergence", "rollback")) == 0
    assert folders(out) == [
        *("diverged-000000.064", "diverged-000000.064-2", "diverged-000000.080", "diverged-000000.080-2"),
        *("state-000000.032", "state-000000.064", "state-000000.096"),
    ]
    assert alarms_of(out) == [(32, "Alarm/rollback")] * 2
    told = [line["Alarm/rollback"] for line in stats_of(out) if "Alarm/rollback" in line]
    assert "rolled back to" in told[0]
    assert "with R1 20 from there on" in told[0]
    assert "with R1 40 from there on" in told[1]
    seen = [line["images_seen"] for line in stats_of(out)]
    assert seen == [16, 32, 32, 32, 48, 64, 80, 96]
    for kept in ("diverged-000000.080", "diverged-000000.080-2"):
        assert (out / kept / "stats.jsonl").read_text().count("Alarm/divergence") == 1
    assert "ALARM divergence" in (out / "diverged-000000.080" / "log.txt").read_text()

    # From the same state with R1's weight as it became, and never a divergence: the same to the bit.
    other = tmp_path / "other"
    assert main(options(shards, other, 0.032)) == 0
    assert main(options(shards, other, 0.096, "--loss.r1-gamma", "40")) == 0
    ours, theirs = tensors_of(out / "state-000000.096"), tensors_of(other / "state-000000.096")
    assert {name: torch.equal(ours[name], theirs[name]) for name in theirs if "skipped" not in name} == {
        name: True for name in theirs if "skipped" not in name
    }


@pytest.mark.slow
def test_a_run_that_was_rolled_back_resumes_to_the_bit(shards, tmp_path, capsys):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    with poison(40, cured_by=2):
        assert main(options(shards, straight, 0.128, "--on-divergence", "rollback")) == 0
        assert main(options(shards, cut, 0.096, "--on-divergence", "rollback")) == 0
        capsys.readouterr()
        assert main(options(shards, cut, 0.128, "--on-divergence", "rollback")) == 0
    assert "rolled back 1 times so far: R1 20" in capsys.readouterr().out
    ours, theirs = tensors_of(straight / "state-000000.128"), tensors_of(cut / "state-000000.128")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    alike = ("Loss/D/adversarial", "Diversity/pairwise", "Logits/gap", "Alarm/rollback")
    kept = [[{name: line.get(name) for name in alike} for line in stats_of(out)] for out in (straight, cut)]
    for line in [*kept[0], *kept[1]]:  # which names the run's folder
        line["Alarm/rollback"] = bool(line["Alarm/rollback"])
    assert kept[0] == kept[1]


def test_what_diverges_at_once_goes_back_to_its_beginning_and_in_the_end_stops(shards, tmp_path, capsys):
    out = tmp_path / "out"
    with poison(0, cured_by=1e9):
        assert main(options(shards, out, 1, "--on-divergence", "rollback")) == 2
    message = capsys.readouterr().err
    assert "rolled back 4 times in a row, up to R1 160" in message
    kept = ["diverged-000000.032", *(f"diverged-000000.032-{number}" for number in (2, 3, 4, 5)), "state-000000.000"]
    assert folders(out) == sorted(kept), "one of each"


def test_without_a_state_the_message_says_to_start_anew(shards, tmp_path, capsys):
    out = tmp_path / "out"
    with poison(0, cured_by=2):
        assert main(options(shards, out, 1)) == 2
    assert "no healthy state was saved before; start anew in another --out" in capsys.readouterr().err
    assert folders(out) == ["diverged-000000.032"]


def test_a_state_saved_while_gradients_fail_is_not_rolled_back_to(shards, tmp_path):
    out = tmp_path / "out"
    rollback = ["--on-divergence", "rollback", "--keep-states", "1"]
    with poison(40, cured_by=2):
        assert main(options(shards, out, 0.048, *rollback)) == 0, "ends with one update skipped"
        assert not load_state(out / "state-000000.048").info["healthy"]
        assert newest_healthy_state(out) == out / "state-000000.032", "not pruned for it"
        assert main(options(shards, out, 0.096, *rollback)) == 0
    assert folders(out) == ["diverged-000000.064", "diverged-000000.080", "state-000000.096"]
    assert tensors_of(out / "state-000000.096")["skipped.D/main"].tolist() == [0, 0]


def test_a_rollback_passes_over_a_state_that_is_damaged(shards, tmp_path, monkeypatch):
    out = tmp_path / "out"
    more = ["--on-divergence", "rollback", "--keep-states", "0", "--snapshot-kimg", "0.016", "--metrics", "none"]
    save_state = checkpoint.save_state

    def cut(out, images_seen, *rest):
        path = save_state(out, images_seen, *rest)
        if path.name == "state-000000.032":
            with open(path / "state.safetensors", "r+b") as file:
                file.truncate(1000)
        return path

    monkeypatch.setattr(snapshots, "save_state", cut)
    with poison(40, cured_by=2):
        assert main(options(shards, out, 0.096, *more)) == 0
    (told,) = [line["Alarm/rollback"] for line in stats_of(out) if "Alarm/rollback" in line]
    assert f"rolled back to {out / 'state-000000.016'}" in told
    assert "state-000000.032 is damaged and was passed over" in told
    assert "state-000000.096" in folders(out)


def test_a_full_disk_at_a_divergence_costs_no_healthy_state(shards, tmp_path, monkeypatch):
    out, save_file = tmp_path / "out", checkpoint.save_file

    def full(tensors, path):
        if checkpoint.DIVERGED in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with poison(40, cured_by=2):
        assert main(options(shards, out, 0.096, "--on-divergence", "rollback", "--keep-states", "1")) == 0
    (told,) = [line["Alarm/rollback"] for line in stats_of(out) if "Alarm/rollback" in line]
    assert "the diverged state could not be kept" in told
    assert folders(out) == ["diverged-000000.064", "state-000000.096"]
    assert not [path.name for path in out.iterdir() if path.name.endswith(".tmp")]


def test_a_state_that_is_replaced_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch):
    weights = {"a": torch.ones(3)}
    path = checkpoint.save_state(tmp_path, 8, weights, {}, {})

    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save_state(tmp_path, 8, weights, {}, {})
    assert torch.equal(load_state(path).tensors["a"], weights["a"])
    checkpoint.save_state(tmp_path, 8, {"a": torch.zeros(3)}, {}, {})
    assert torch.equal(load_state(path).tensors["a"], torch.zeros(3))
    assert [path.name for path in tmp_path.iterdir()] == ["state-000000.008"]


def test_a_lazy_phase_that_fails_makes_a_state_unhealthy_though_it_did_not_run_since_the_last_tick(
    shards, tmp_path, monkeypatch
):
    """R1 runs at every fourth step, and a tick is two: half of the ticks say nothing of it."""
    penalty = GANRecipe.d_penalty

    def failing(self, batch, record):
        for term in penalty(self, batch, record):
            yield term * float("nan")

    monkeypatch.setattr(GANRecipe, "d_penalty", failing)
    out = tmp_path / "out"
    more = ["--snapshot-kimg", "0.016", "--divergence-updates", "100", "--keep-states", "0"]
    assert main(options(shards, out, 0.064, *more)) == 0
    assert {path.name: load_state(path).info["healthy"] for path in out.glob("state-*")} == {
        f"state-000000.{kimg}": False for kimg in ("016", "032", "048", "064")
    }
    assert (out / "log.txt").read_text().count("ALARM not_finite") == 1


@pytest.mark.slow
def test_another_weight_of_a_penalty_begins_anew(shards, tmp_path):
    out = tmp_path / "out"
    with poison(40, cured_by=2):
        assert main(options(shards, out, 0.096, "--on-divergence", "rollback")) == 0
    assert load_state(out / "state-000000.096").info["rollbacks"] == 1
    assert main(options(shards, out, 0.128, "--loss.r1-gamma", "15")) == 0
    assert load_state(out / "state-000000.128").info["rollbacks"] == 0


@pytest.mark.slow
def test_a_growing_training_rolls_back_over_a_stage(shards, tmp_path):
    """It fails from the last step at 8 px on, so the state of the level's end is not healthy; it goes back before."""
    out, other = tmp_path / "out", tmp_path / "other"
    growing = ["--growth.start-res", "8", "--growth.stable-kimg", "0.04", "--growth.fade-kimg", "0.024"]
    with poison(32, cured_by=2):
        assert main(options(shards, out, 0.096, *growing, "--on-divergence", "rollback")) == 0
    assert alarms_of(out) == [(32, "Alarm/rollback")]
    assert main(options(shards, other, 0.032, *growing)) == 0
    assert main(options(shards, other, 0.096, *growing, "--loss.r1-gamma", "20")) == 0
    ours, theirs = tensors_of(out / "state-000000.096"), tensors_of(other / "state-000000.096")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "skipped" not in name)


def test_a_rollback_without_penalties_is_refused(shards, tmp_path, capsys):
    more = ["--loss.r1-gamma", "0", "--loss.r1-interval", "16", "--on-divergence", "rollback"]
    assert main(options(shards, tmp_path / "out", 1, *more)) == 2
    assert "--on-divergence rollback: it raises the weights of R1, R2 and gradient penalty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_generator_that_collapses_raises_an_alarm(shards, tmp_path, capsys):
    """Against a discriminator that never learns, G finds its favourite image."""
    out = tmp_path / "out"
    collapsing = ["--optim.d-lr", "0", "--optim.g-lr", "0.05", "--loss.pl-weight", "0", "--diversity-kimg", "0.016"]
    assert main(options(shards, out, 0.32, "--network.mbstd-channels", "0", "--augment", "none", *collapsing)) == 0
    raised = [line for line in stats_of(out) if "Alarm/mode_collapse" in line]
    assert len(raised) == 1
    assert "generated images at fixed latents differ" in raised[0]["Alarm/mode_collapse"]
    assert min(raised[0]["Diversity/pairwise"], raised[0]["Diversity/nearest"]) < 0.25
    assert (out / "log.txt").read_text().count("ALARM mode_collapse") == 1
    assert stats_of(out)[0]["Diversity/nearest"] > 0.4


@pytest.mark.slow
def test_two_processes_roll_back_together(shards, tmp_path):
    """NaN on one of two processes reaches both: averaged gradients are inf or NaN on each."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(SCRIPT.parents[2] / "launch" / "accelerate" / "cpu.yaml"), str(SCRIPT)]
    outs = {}
    for name, cured_by in (("sick", "2"), ("well", "0")):
        outs[name] = tmp_path / name
        gamma = ["--loss.r1-gamma", "20"] if name == "well" else ["--on-divergence", "rollback"]
        first = options(shards, outs[name], 0.032 if name == "well" else 0.096)[1:]
        environment = {**os.environ, "POISON_START": "40", "POISON_CURED_BY": cured_by}
        runs = [[*first, *(gamma if name == "sick" else [])]]
        if name == "well":
            runs.append([*options(shards, outs[name], 0.096)[1:], *gamma])
        for arguments in runs:
            result = subprocess.run(command + arguments, capture_output=True, text=True, env=environment)
            assert result.returncode == 0, result.stdout + result.stderr
    assert all(line.get("world_size", 2) == 2 for line in stats_of(outs["sick"]))
    assert alarms_of(outs["sick"]) == [(32, "Alarm/rollback")]
    sick, well = (tensors_of(out / "state-000000.096") for out in outs.values())
    assert all(torch.equal(sick[name], well[name]) for name in well if "skipped" not in name)
