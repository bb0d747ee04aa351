"""Training as a user runs it: what a run leaves, how it stops, goes on, and refuses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import ROOT, TINY, largest_difference, options, state_tensors

import stylepipe
from stylepipe.cli.main import main
from stylepipe.datasets.drawn import draw_face


def test_a_run_leaves_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("config.yaml", "log.txt", "stats.jsonl", "metrics.jsonl", "grids", "clips", "ema", ".lock"),
        "network-best.safetensors",
        *("state-000000.064", "state-000000.128", "network-000000.064.safetensors", "network-000000.128.safetensors"),
    }
    grids = {path.name for path in (finished / "grids").iterdir()}
    assert grids == {"real.png", "000000.000.png", "000000.064.png", "000000.128.png"}
    with Image.open(finished / "grids" / "000000.128.png") as grid:
        assert grid.size == (15 * 16, 8 * 16)
    with Image.open(finished / "clips" / "000000.128.gif") as clip:
        assert (clip.size, clip.n_frames, clip.info["loop"]) == ((4 * 16, 16), 36, 0)
    stats = [json.loads(line) for line in (finished / "stats.jsonl").read_text().splitlines()]
    assert [line["images_seen"] for line in stats] == list(range(16, 129, 16))
    assert all(line["world_size"] == 1 for line in stats)
    assert {"Loss/G/adversarial", "Loss/D/adversarial", "Progress/kimg", "Timing/sec_per_kimg"} <= stats[0].keys()
    assert {"Loss/D/r1", "Loss/G/path_length"} <= stats[0].keys()
    log = (finished / "log.txt").read_text()
    assert "1 process on cpu" in log
    assert "the full 25,000 kimg of auto would take" in log


def test_the_network_file_is_the_average_that_the_grids_show(finished):
    G = stylepipe.load_network(finished / "network-000000.128.safetensors")
    img = G(torch.randn(3, 16), truncation_psi=0.7)
    assert img.shape == (3, 3, 16, 16)
    assert img.dtype == torch.float32
    tensors = state_tensors(finished, "000000.128")
    weights = torch.cat([p.flatten() for p in G.parameters()])
    for name, same in (("G.average", True), ("G.params", False)):
        # The arena pads each parameter to 16 numbers.
        sizes = [-(-p.numel() // 16) * 16 for p in G.parameters()]
        parts = zip(tensors[name].split(sizes), G.parameters(), strict=True)
        saved = torch.cat([part[: p.numel()] for part, p in parts])
        assert torch.equal(saved, weights) == same
    assert torch.equal(tensors["G.buffer.mapping.w_avg"], G.mapping.w_avg)


def test_a_finished_run_is_not_trained_further(finished, shards, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("network-*")}
    assert main(options(shards, finished, 0.128)) == 0
    assert "done: 0.128 kimg" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.glob("network-*")} == before


def test_its_config_file_reproduces_it(finished, tmp_path):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["loss"]["r1_gamma"] == pytest.approx(0.0002 * 16**2 / 8)
    assert None not in (config["kimg"], config["batch_size"], config["ema"]["kimg"])
    assert main(["train", "--config", str(finished / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    again, first = state_tensors(tmp_path / "again", "000000.128"), state_tensors(finished, "000000.128")
    assert largest_difference(again, first) == 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_decoding_in_workers_changes_nothing(finished, shards, tmp_path):
    assert main(options(shards, tmp_path / "run", 0.064, "--workers", "2")) == 0
    assert largest_difference(state_tensors(tmp_path / "run", "000000.064"), state_tensors(finished, "000000.064")) == 0


@pytest.mark.slow
def test_two_processes_of_the_cpu_config_train_together(finished, shards, tmp_path):
    out = tmp_path / "two"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "launch" / "accelerate" / "cpu.yaml"), str(ROOT / "launch" / "train.py")]
    # Micro-batches of four on both sides: the same images meet in minibatch stddev.
    more = ["--batch-gpu", "4"]
    result = subprocess.run(command + options(shards, out, 0.064, *more)[1:], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 processes on cpu" in (out / "log.txt").read_text()
    assert all(json.loads(line)["world_size"] == 2 for line in (out / "stats.jsonl").read_text().splitlines())
    assert main(options(shards, tmp_path / "one", 0.064, *more)) == 0
    one, two = state_tensors(tmp_path / "one", "000000.064"), state_tensors(out, "000000.064")
    for name in ("G.params", "D.params", "G.average"):
        assert float((one[name] - two[name]).norm() / one[name].norm()) < 1e-3, name


def bad(tmp_path: Path, shards: Path) -> dict[str, tuple[list[str], str]]:
    empty = tmp_path / "empty"
    empty.mkdir()
    preset = tmp_path / "preset.yaml"
    preset.write_text("preset: auto\n")
    older = tmp_path / "older"
    (older / "state-000000.064").mkdir(parents=True)
    text = tmp_path / "file"
    text.write_text("x")
    return {
        "missing data": (["--data", str(tmp_path / "nowhere")], "nowhere"),
        "empty data": (["--data", str(empty)], str(empty)),
        "other resolution": (["--data", str(shards), "--res", "32"], "16"),
        "no power of two": (["--res", "48"], "--res 48: expected a power of two from 8 to 1024; try 32"),
        "unknown preset": (["--preset", "stylgan2"], "did you mean 'stylegan2'"),
        "batch": (["--data", str(shards), "--batch-size", "8", "--batch-gpu", "3"], "expected a divisor of 8"),
        "unwritable": (["--data", str(shards), "--out", str(text / "run")], "--out"),
        "no labels": (["--data", str(shards), "--cond"], "--cond"),
        "two presets": (["--config", str(preset), "--preset", "paper256"], "give one of them"),
        "older state": (["--data", str(shards), "--out", str(older), "--resume", "none"], "--resume none"),
        "missing state": (["--data", str(shards), "--resume", str(tmp_path / "state-1")], "--resume"),
        "run for state": (["--data", str(shards), "--resume", str(older)], "one of its states, such as"),
        "empty out": (["--data", str(shards), "--out", ""], '--out ""'),
        "far too long": (["--data", str(shards), "--kimg", "1e306"], "--kimg 1e+306"),
        "missing config": (["--config", str(tmp_path / "no.yaml")], "--config"),
        "half on a cpu": (["--data", str(shards), "--precision", "fp16"], "--precision fp16"),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("missing data", "empty data", "other resolution", "no power of two", "unknown preset", "batch", "unwritable"),
        *(
            "no labels",
            "two presets",
            "older state",
            "run for state",
            "missing state",
            "missing config",
            "half on a cpu",
        ),
        *("empty out", "far too long"),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_2(case, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("STYLEPIPE_DEBUG", raising=False)
    arguments, named = bad(tmp_path, shards)[case]
    defaults = ["--res", "16", "--tracker", "none", "--kimg", "0.008", "--out", str(tmp_path / "out")]
    assert main(["train", *defaults, *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


def test_an_unknown_option_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--networ.channel-base", "3"])
    assert stop.value.code == 2
    assert "--network.channel-base" in capsys.readouterr().err


def test_a_state_of_other_networks_is_refused(finished, shards, tmp_path, capsys):
    state = str(finished / "state-000000.064")
    for more, named in (
        (["--network.channel-max", "16"], "--network.channel-max 16: {state} is of a run with --network.channel-max 8"),
        (["--res", "32"], "--res 32: {state} is of a run with --res 16"),
        (["--cond"], "--cond: {state} is of a run with --no-cond"),
        (["--network.kind", "stylegan"], "--network.kind stylegan: {state} is of a run with --network.kind stylegan2"),
    ):
        # Before the data is looked at: preparing it may take long.
        arguments = options(tmp_path / "absent", tmp_path / "out", 0.128, "--resume", state, *more)
        assert main(arguments) == 2
        assert named.format(state=state) in capsys.readouterr().err


@pytest.mark.slow
def test_a_diverged_run_leaves_its_healthy_state_alone(shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(options(shards, out, 0.016)) == 0
    huge = ["--optim.g-lr", "1e36", "--optim.d-lr", "1e36", "--keep-states", "1"]
    for _ in range(2):
        assert main(options(shards, out, 1, *huge)) == 2
        assert "training has diverged" in capsys.readouterr().err
        assert [path.name for path in out.glob("state-*")] == ["state-000000.016"]


def test_an_image_that_cannot_be_read_costs_no_training(shards, tmp_path, capsys):
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(shards, damaged)
    (shard,) = damaged.glob("*.tar")
    with open(shard, "r+b") as file:  # the pixels of one image in the middle
        file.seek(shard.stat().st_size // 2)
        file.write(b"\xff" * 600)
    assert main(options(damaged, out, 1, "--snapshot-kimg", "1000")) == 2
    assert "Traceback" not in capsys.readouterr().err
    states = list(out.glob("state-*"))
    assert len(states) == 1 or not (out / "stats.jsonl").read_text(), "saved what had been learnt until then"


def test_the_networks_of_a_run_without_states_are_not_overwritten(finished, shards, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished / "network-000000.128.safetensors", out)
    assert main(options(shards, out, 0.128)) == 2
    assert "holds networks of a run whose states are gone" in capsys.readouterr().err


def test_going_on_with_another_batch_size_ends_where_it_says(finished, shards, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert main(options(shards, out, 0.14, "--batch-size", "20", "--batch-gpu", "20")) == 0
    assert "going on from 0.128 to 0.148 kimg" in capsys.readouterr().out
    assert (out / "state-000000.148").exists()


def test_files_can_be_read_by_others(finished):
    for path in (*finished.glob("network-*"), finished / "state-000000.128" / "state.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_run_is_not_overwritten(finished, shards, capsys):
    assert main(options(shards, finished, 0.128, "--resume", "none")) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_one_folder_takes_one_run_at_a_time(shards, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(options(shards, out, 0.008)) == 2
    assert "another process is training there" in capsys.readouterr().err
    assert main(options(shards, out, 0.008)) == 0


def test_an_older_state_starts_a_run_of_its_own(finished, shards, tmp_path, capsys):
    older = str(finished / "state-000000.064")
    assert main(options(shards, finished, 0.128, "--resume", older)) == 2
    assert "give another --out" in capsys.readouterr().err
    assert main(options(shards, tmp_path / "branch", 0.128, "--resume", older)) == 0
    branch, first = state_tensors(tmp_path / "branch", "000000.128"), state_tensors(finished, "000000.128")
    assert largest_difference(branch, first) == 0


@pytest.mark.slow
def test_runs_are_numbered(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--data", str(shards), "--kimg", "0.008", *TINY]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["00000-auto-faces-16", "00001-auto-faces-16"]


def test_a_dry_run_tells_and_writes_nothing(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", str(shards), "--dry-run", *TINY]) == 0
    output = capsys.readouterr().out
    parts = ("r1_gamma: 0.0064", "G in all", "D in all", "GiB per device", "TFLOP/kimg", "s/kimg", "for 25000 kimg")
    for part in parts:
        assert part in output
    assert list(tmp_path.iterdir()) == []


def test_training_on_labels(tmp_path, capsys):
    for label in ("cats", "dogs"):
        (tmp_path / "photographs" / label).mkdir(parents=True)
        for index in range(6):
            draw_face(index, 16).save(tmp_path / "photographs" / label / f"{index}.png")
    shards, out = tmp_path / "labelled", tmp_path / "run"
    assert main(["prepare", str(tmp_path / "photographs"), str(shards), "--res", "16", "--labels"]) == 0
    assert main(options(shards, out, 0.016, "--cond")) == 0
    network = out / "network-000000.016.safetensors"
    assert stylepipe.load_network(network).c_dim == 2
    sample = ["sample", str(network), "--seeds", "0-3", "--grid", "2x2", "--out", str(tmp_path / "grid.png")]
    assert main([*sample, "--class", "1"]) == 0
    assert main([*sample, "--class", "2"]) == 2
    assert "expected 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_micro_batch_can_be_chosen_by_free_memory(shards, tmp_path):
    assert main(options(shards, tmp_path / "run", 0.008, "--batch-gpu", "auto")) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["batch_gpu"] == 8


def test_what_changes_when_a_run_goes_on_is_said(finished, shards, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert main(options(shards, out, 0.136, "--loss.r1-gamma", "2", "--no-mirror")) == 0
    output = capsys.readouterr().out
    assert "changed since the state was saved: loss.r1_gamma 0.0064 -> 2.0" in output
    assert "changed since the state was saved: mirror True -> False" in output


def test_help_fits_a_reader(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--res", "--data", "--preset", "--config", "--kimg", "--resume", "--network.channel-base"):
        assert option in text


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("bogus", "expected one of auto, cuda, torch"),
        pytest.param(
            "cuda",
            "no GPU to train on, expected one",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_a_choice_of_kernels_that_cannot_be_leaves_no_run_folder(chosen, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STYLEPIPE_KERNELS", chosen)
    assert main(["train", "--res", "16", "--tracker", "none", "--out", str(tmp_path / "run")]) == 2
    assert f"STYLEPIPE_KERNELS={chosen}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read_can_be_skipped(shards, tmp_path):
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(shards, damaged)
    (shard,) = damaged.glob("*.tar")
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(b"\xff" * 600)
    assert main(options(damaged, out, 0.064, "--on-bad", "skip")) == 0
    shares = [json.loads(line)["Data/replaced"] for line in (out / "stats.jsonl").read_text().splitlines()]
    assert 0 < sum(shares) < len(shares)
    told = [line for line in (out / "log.txt").read_text().splitlines() if "another image stands in: " in line]
    assert 1 <= len(told) == len(set(told)) <= 2
