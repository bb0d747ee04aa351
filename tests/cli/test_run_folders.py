"""What a start finds in --out: what it goes on from, what it refuses to overwrite, and who else is there."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import yaml
from tiny_runs import at_image, largest_difference, options, start, state_tensors, wait_for

from stylepipe.cli.main import main
from stylepipe.files import locked
from stylepipe.training import evaluation

QUICK = ("--metrics", "none")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.stat().st_size}


@pytest.mark.parametrize("left", ["network-best.safetensors", "network-000000.064.safetensors"])
@pytest.mark.parametrize("resume", [False, True])
def test_networks_without_states_are_not_overwritten(finished, shards, tmp_path, capsys, left, resume):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(finished / left, out)
    before = content(out)
    more = ["--resume", str(finished / "state-000000.064")] if resume else []
    assert main(options(shards, out, 0.128, *QUICK, *more)) == 2
    assert f"--out {out}: holds networks of a run whose states are gone, such as {left}" in capsys.readouterr().err
    assert content(out) == before


def test_a_state_is_no_folder_to_train_in(finished, shards, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert main(options(shards, out / "state-000000.064", 0.128, *QUICK)) == 2
    assert f"is a state; expected the folder of a run, such as {out}" in capsys.readouterr().err


def test_settings_that_nothing_was_trained_with_are_not_noted(finished, shards, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    assert main(options(shards, out, 0.128, *QUICK, "--batch-size", "16")) == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["batch_size"] == 8


@pytest.mark.slow
def test_a_run_goes_on_without_the_file_it_began_from(finished, shards, tmp_path, capsys):
    init, out = tmp_path / "init.safetensors", tmp_path / "out"
    shutil.copy(finished / "network-000000.064.safetensors", init)
    began = ["train", "--data", str(shards), "--init", str(init), "--tracker", "none", *QUICK, "--batch-size", "8"]
    for folder in (out, tmp_path / "straight"):
        assert main([*began, "--out", str(folder), "--kimg", "0.016"]) == 0
    assert main([*began, "--out", str(tmp_path / "straight"), "--kimg", "0.032"]) == 0
    init.unlink()
    assert main([*began, "--out", str(out), "--kimg", "0.032"]) == 0
    ours, theirs = (state_tensors(folder, "000000.032") for folder in (out, tmp_path / "straight"))
    assert largest_difference(ours, theirs) == 0
    capsys.readouterr()
    assert main([*began, "--out", str(tmp_path / "new"), "--kimg", "0.032"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_another_beginning_is_refused_for_a_run_that_is_there(finished, shards, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    init = str(finished / "network-000000.064.safetensors")
    assert main(["train", "--data", str(shards), "--out", str(out), "--init", init, *QUICK, "--tracker", "none"]) == 2
    assert f"--init {init}: " in (said := capsys.readouterr().err)
    assert "is of a run that began from new networks" in said


@pytest.mark.slow
def test_a_folder_that_another_took_over_ends_the_run(shards, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with_lock = []

    def taken_over() -> None:
        out.rename(tmp_path / "gone")
        out.mkdir()
        with_lock.append(locked(out / ".lock"))
        with_lock[0].__enter__()

    at_image(monkeypatch, 72, taken_over)
    assert main(options(shards, out, 0.128, *QUICK)) == 2
    assert "was removed, and another process is training there by now" in capsys.readouterr().err
    with_lock[0].__exit__(None, None, None)
    assert [path.name for path in out.iterdir()] == [".lock"], "what is there is the other's"


@pytest.mark.slow
def test_a_last_measuring_that_was_broken_off_is_told(shards, tmp_path, monkeypatch, capsys):
    collect, out = evaluation.collect, tmp_path / "out"

    def interrupted(*arguments, **more):
        signal.raise_signal(signal.SIGTERM)
        return collect(*arguments, **more)

    monkeypatch.setattr(evaluation, "collect", interrupted)
    assert main(options(shards, out, 0.032, "--metrics-images", "24")) == 0
    told = capsys.readouterr().out.splitlines()[-2]  # the last line is of the full length
    assert told.startswith("stopped at 0.032 kimg (SIGTERM), and saved, but not measured; to go on from there: ")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["tee", "full"])
def test_output_that_nobody_reads_ends_no_run(shards, tmp_path, end):
    out = tmp_path / "out"
    if end == "full":
        with open("/dev/full", "wb") as full:
            process = start(options(shards, out, 1000, *QUICK), stdout=full)
    else:
        process = start(options(shards, out, 1000, *QUICK))
        process.stdout.close()
    wait_for(out / "state-000000.064", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0
    assert "stopped at" in (log := (out / "log.txt").read_text())
    assert sorted(out.glob("state-*"))[-1].name[6:] in log.splitlines()[-2], "the last one is of the stop"
