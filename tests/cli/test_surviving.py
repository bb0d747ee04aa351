"""Runs that are stopped, killed, short of room or of memory, and go on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ROOT, at_image, largest_difference, options, start, state_tensors, wait_for

import stylepipe
from stylepipe.cli.main import main
from stylepipe.interop import network_file
from stylepipe.presets import PRESETS
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training import checkpoint, snapshots
from stylepipe.training.checkpoint import load_state

NO_ROOM = OSError(28, "No space left on device")
QUICK = ("--metrics", "none")


def same_end(out: Path, finished: Path, kimg: str = "000000.128") -> bool:
    return largest_difference(state_tensors(out, kimg), state_tensors(finished, kimg)) == 0


def lines_of(out: Path) -> list[int]:
    return [json.loads(line)["images_seen"] for line in (out / "stats.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit(finished, shards, tmp_path):
    out = tmp_path / "killed"
    process = start(options(shards, out, 0.128))
    wait_for(out / "state-000000.064", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "state-000000.128").exists()
    process = start(options(shards, out, 0.128))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "going on from 0.064" in output
    assert same_end(out, finished)
    assert lines_of(out) == list(range(16, 129, 16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "cause"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C"), (signal.SIGUSR1, "SIGUSR1")]
)
def test_a_signal_saves_and_tells_the_command_that_goes_on(shards, tmp_path, number, cause):
    out = tmp_path / "stopped"
    process = start(options(shards, out, 1000, "--snapshot-kimg", "1000"))
    wait_for(out / "stats.jsonl", process)
    time.sleep(1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    found = shutil.which("python")
    command = "python" if found and Path(found).parent == Path(sys.executable).parent else sys.executable
    assert f"({cause}), and saved; to go on from there: {command} " in output
    assert f"--out {out}" in output.splitlines()[-1]
    (state,) = out.glob("state-*")
    assert (out / state.name.replace("state", "network")).with_suffix(state.suffix + ".safetensors").exists()


def test_a_run_whose_time_is_up_saves_and_goes_on(finished, shards, tmp_path, capsys):
    out = tmp_path / "out"
    for _ in range(2):  # the time is up before the first step: nothing to save yet
        assert main(options(shards, out, 0.128, *QUICK, "--max-hours", "1e-9")) == 0
        assert "stopped at 0 kimg (--max-hours 1e-09)" in capsys.readouterr().out
    assert not list(out.glob("state-*"))
    assert main(options(shards, out, 0.128, *QUICK)) == 0
    assert same_end(out, finished)
    assert "max_hours" not in (out / "config.yaml").read_text()


@pytest.mark.slow
def test_a_run_whose_launcher_is_killed_saves_and_ends(shards, tmp_path):
    out = tmp_path / "orphan"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"]
    command += [str(ROOT / "launch" / "train.py"), *options(shards, out, 1000, "--snapshot-kimg", "1000")[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        wait_for(out / "stats.jsonl", launcher)
        time.sleep(1)
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        output = launcher.stdout.read()  # ends when the orphan does
    assert "the launcher has died" in output
    assert len(list(out.glob("state-*"))) == len(list(out.glob("network-*"))) == 1


class Disk:
    """Stands in for writing tensors to the disk, as a slow or a full one does it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write = checkpoint.save_file
        self.full_for = 0  # so many states
        self.gate = threading.Event()
        self.gate.set()
        monkeypatch.setattr(checkpoint, "save_file", self)

    def __call__(self, tensors, path) -> None:
        assert self.gate.wait(60), "the training waits for the disk"
        if self.full_for:
            self.full_for -= 1
            path.write_bytes(b"half")
            raise NO_ROOM
        self._write(tensors, path)


def test_training_does_not_wait_for_the_disk(finished, shards, tmp_path, monkeypatch):
    out, disk = tmp_path / "out", Disk(monkeypatch)
    disk.gate.clear()
    at_image(monkeypatch, 112, disk.gate.set)  # six steps after the state was begun
    # Measuring waits until what it measures is saved, and each thing that is saved for the last of its kind.
    assert main(options(shards, out, 0.128, *QUICK, "--ema.posthoc-kimg", "1")) == 0
    for kimg in ("000000.064", "000000.128"):  # and what is saved is of the moment, not of when it was written
        assert same_end(out, finished, kimg)
        written, expected = (load_file(run / f"network-{kimg}.safetensors") for run in (out, finished))
        assert largest_difference(written, expected) == 0


def test_a_disk_that_is_full_for_a_while_costs_nothing(finished, shards, tmp_path, monkeypatch, capsys):
    out, disk = tmp_path / "out", Disk(monkeypatch)
    disk.full_for = 2
    assert main(options(shards, out, 0.128, *QUICK)) == 0
    log = (out / "log.txt").read_text()
    assert log.count("ALARM saving: cannot save to") == 1
    assert "No space left on device; make room, it is tried again" in log
    assert same_end(out, finished)
    assert sorted(path.name for path in out.glob("state-*"))[0] < "state-000000.112", "tried again with a later tick"
    assert not list(out.glob(".*.tmp"))


def test_averages_that_could_not_be_saved_are_saved_with_a_later_tick(shards, tmp_path, monkeypatch):
    write, names = network_file.save_file, []

    def full_at_first(tensors, path, metadata):
        if "ema" in str(path):
            names.append(path)
            if len(names) <= 2:
                raise NO_ROOM
        write(tensors, path, metadata)

    monkeypatch.setattr(network_file, "save_file", full_at_first)
    out = tmp_path / "out"
    assert main(options(shards, out, 0.128, *QUICK, "--ema.posthoc-kimg", "0.064")) == 0
    log = (out / "log.txt").read_text()
    assert log.count("ALARM averages: averages for `stylepipe ema` cannot be saved") == 1
    assert log.count("No space left on device; it is tried again") == 2
    saved = sorted(path.stem for path in (out / "ema").iterdir())
    assert saved[-1] == "000000.128"
    assert "000000.064" < saved[0] < "000000.128"


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_the_remedy(shards, tmp_path, monkeypatch, capsys):
    out, disk = tmp_path / "out", Disk(monkeypatch)
    disk.full_for = 1000
    assert main(options(shards, out, 0.064)) == 2
    told = capsys.readouterr().err
    assert "No space left on device; nothing half-written is left" in told
    assert "no state was saved before; make room, then start the same command with this --out" in told
    assert not list(out.glob("state-*"))
    disk.full_for = 0
    assert main(options(shards, out, 0.064)) == 0
    disk.full_for = 1000
    assert main(options(shards, out, 0.096)) == 2
    assert (
        "older states are still there; make room, then start the same command with this --out"
        in capsys.readouterr().err
    )
    disk.full_for = 0
    assert main(options(shards, out, 0.096)) == 0


@pytest.mark.slow
def test_a_full_disk_leaves_whole_states_only(shards, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        process = start(options(shards, disk / "run", 1.2, "--keep-states", "0"))
        output, _ = process.communicate(timeout=300)
        left = sorted(path.name for path in (disk / "run").iterdir())
        states = [name for name in left if name.startswith("state-")]
        for name in states:
            load_state(disk / "run" / name)
        for name in left:
            if name.startswith("network-"):
                stylepipe.load_network(disk / "run" / name)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "ALARM saving" in output
    assert "make room" in output
    assert len(states) >= 1
    assert not [name for name in left if name.endswith(".tmp")]


def test_a_kill_between_the_first_state_and_its_network_costs_nothing(finished, shards, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name in ("state-000000.128", "network-000000.064.safetensors", "network-000000.128.safetensors"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(options(shards, out, 0.128, *QUICK)) == 0
    assert same_end(out, finished)
    assert same_end(out, finished, "000000.064")
    made, expected = (load_file(run / "network-000000.064.safetensors") for run in (out, finished))
    assert largest_difference(made, expected) == 0


def test_the_first_state_is_there_before_any_network(shards, tmp_path, monkeypatch):
    seen = []
    write = snapshots.write_network

    def noting(path, content):
        seen.append([state.name for state in out.glob("state-*")])
        write(path, content)

    monkeypatch.setattr(snapshots, "write_network", noting)
    out = tmp_path / "out"
    assert main(options(shards, out, 0.032, *QUICK, "--snapshot-kimg", "0.016", "--ema.posthoc-kimg", "0")) == 0
    assert seen == [["state-000000.016"], ["state-000000.016"]]


def test_what_killed_processes_leave_half_written_is_removed(finished, shards, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {str(path.relative_to(out)) for path in out.rglob("*")}
    for name in ("..state-000000.192.whole.tmp.77.tmp", ".state-000000.064.whole.tmp", ".state-000000.064.deleted.tmp"):
        (out / name).mkdir()
        (out / name / "state.safetensors").touch()
    for name in (
        "network-000000.192.safetensors",
        "network-best.safetensors",
        "config.yaml",
        "ema/000000.192.safetensors",
    ):
        half = out / name
        half.with_name(f".{half.name}.77.tmp").touch()
    foreign = out / ".network-000000.128-ema0.1.safetensors.78.tmp"  # `stylepipe ema` may be at work
    foreign.touch()
    assert main(options(shards, out, 0.128)) == 0
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == before | {foreign.name}


def test_a_state_whose_last_rename_did_not_come_is_there_the_next_time(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "state-000000.128").rename(out / ".state-000000.128.whole.tmp")
    checkpoint.clear_remains(out)
    assert load_state(out / "state-000000.128").images_seen == 128


def damage(state: Path) -> None:
    with open(state / "state.safetensors", "r+b") as file:
        file.truncate(5000)


def test_a_damaged_state_is_passed_over_for_the_one_before(finished, shards, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    damage(out / "state-000000.128")
    assert main(options(shards, out, 0.128, *QUICK)) == 0
    assert "truncated or damaged since it was written" in caplog.text
    assert "passed over, and kept as damaged-<kimg>" in caplog.text
    assert "going on from 0.064 to 0.128 kimg" in capsys.readouterr().out
    assert same_end(out, finished)
    assert (out / "damaged-000000.128").is_dir()


def test_where_every_state_is_damaged_nothing_begins_anew(finished, shards, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for state in out.glob("state-*"):
        damage(state)
    before = sorted(path.name for path in out.iterdir())
    assert main(options(shards, out, 0.256)) == 2
    assert f"{out}: none of its states is whole ({out}/state-000000.128" in (capsys.readouterr().err)
    assert sorted(path.name for path in out.iterdir()) == before


@pytest.mark.slow
def test_between_two_snapshots_only_the_newest_state_is_kept(finished, shards, tmp_path):
    out = tmp_path / "out"
    more = (*QUICK, "--state-kimg", "0.016", "--snapshot-kimg", "0.048")
    assert main(options(shards, out, 0.08, *more)) == 0
    assert sorted(path.name for path in out.glob("state-*")) == ["state-000000.048", "state-000000.080"]
    assert main(options(shards, out, 0.128, *more)) == 0
    kept = [f"state-000000.{kimg}" for kimg in ("080", "096", "128")]  # the end of a run is no interim state
    assert sorted(path.name for path in out.glob("state-*")) == kept
    assert same_end(out, finished)
    assert "saved: " + str(out / "state-000000.112\n") in (out / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["g_main", "d_main"])
def test_out_of_memory_names_the_option_and_saves_what_can_be(phase, finished, shards, tmp_path, monkeypatch, capsys):
    whole, out = getattr(GANRecipe, phase), tmp_path / "out"

    def short(self, batch, record):
        if batch.stage.images_seen == 96:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        yield from whole(self, batch, record)

    with monkeypatch.context() as patch:
        patch.setattr(GANRecipe, phase, short)
        assert main(options(shards, out, 0.128, *QUICK)) == 2
    told = capsys.readouterr().err
    assert "--batch-gpu 8: out of memory on cpu" in told
    assert "half of it, or with --batch-gpu auto" in told
    # Once G has taken the step and D has not, no state can be exact: the one before is.
    saved = phase == "g_main"
    assert ("all up to 0.096 kimg is saved" in told) == saved
    assert (out / "state-000000.096").exists() == saved
    assert main(options(shards, out, 0.128, *QUICK)) == 0
    assert same_end(out, finished)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_on_to_the_bit_whatever_the_process_has_drawn(preset, shards, tmp_path):
    """No generator of torch's, NumPy's or Python's has any part in a training: there is no state of them to keep."""
    more = (*QUICK, "--preset", preset, "--snapshot-kimg", "1000")
    if preset == "transfer":  # goes on from other networks
        assert main(options(shards, tmp_path / "first", 0.008)) == 0
        more = ("--init", str(tmp_path / "first" / "network-000000.008.safetensors"), *more)

    def disturb(seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the one that all share
        random.seed(seed)

    def train(out: str, kimg: float) -> int:
        arguments = options(shards, tmp_path / out, kimg, *more)
        if preset in ("progan", "r3gan", "dcgan"):  # they have no such parts
            for option in ("--network.w-dim", "--loss.r1-interval"):
                del arguments[(place := arguments.index(option)) : place + 2]
        return main(arguments)

    disturb(1)
    assert train("straight", 0.064) == 0
    for kimg in (0.024, 0.04, 0.064):
        disturb(round(kimg * 1000))
        assert train("run", kimg) == 0
    assert same_end(tmp_path / "run", tmp_path / "straight", "000000.064")


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(finished, shards, tmp_path, monkeypatch):
    now = time.time
    at_image(monkeypatch, 56, lambda: monkeypatch.setattr(time, "time", lambda: now() - 365 * 86400))
    assert main(options(shards, tmp_path / "out", 0.128, *QUICK)) == 0
    assert same_end(tmp_path / "out", finished)
    lines = (tmp_path / "out" / "stats.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["Timing/sec_per_kimg"] for line in lines]
    assert all(0 < value < 10_000 for value in seconds)


@pytest.mark.slow
def test_a_folder_that_vanishes_is_made_anew_and_told(finished, shards, tmp_path, monkeypatch):
    out = tmp_path / "out"
    at_image(monkeypatch, 72, lambda: out.rename(tmp_path / "gone"))
    assert main(options(shards, out, 0.128, *QUICK)) == 0
    log = (out / "log.txt").read_text()
    assert f"ALARM folder: {out} has vanished and was made anew; what it held before is gone" in log
    assert lines_of(out) == [80, 96, 112, 128]
    assert same_end(out, finished)
    assert (out / "config.yaml").exists()


@pytest.mark.slow
def test_data_that_is_taken_away_while_training_ends_the_run_with_all_saved(shards, tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(shards, data)

    def cut() -> None:
        (shard,) = data.glob("*.tar")
        os.truncate(shard, 2048)

    at_image(monkeypatch, 40, cut)
    assert main(options(data, out, 1, *QUICK, "--snapshot-kimg", "1000")) == 2
    told = capsys.readouterr().err
    assert ".tar" in told
    assert "Traceback" not in told
    (state,) = out.glob("state-*")
    assert load_state(state).images_seen == lines_of(out)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["removed", "replaced"])
def test_a_shard_that_is_removed_or_replaced_while_training_changes_nothing(
    finished, shards, tmp_path, monkeypatch, fate
):
    """It is open: the run goes on with what it began with. What lies there then is found by the next start."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(shards, data)
    (shard,) = data.glob("*.tar")

    def happen() -> None:
        shard.unlink()
        if fate == "replaced":
            shard.write_bytes(bytes(4096))

    at_image(monkeypatch, 40, happen)
    assert main(options(data, out, 0.128, *QUICK)) == 0
    assert same_end(out, finished)
    assert main(options(data, out, 0.256, *QUICK)) == 2
    assert same_end(out, finished)
