"""Ways of starting training: the right ones pass, those that would train apart are refused with the right command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stylepipe.errors import UserError
from stylepipe.training import launched
from stylepipe.training.launched import asked_for, check_launch, command_again, launch_arguments, right_command

SCRIPT = """
import sys
from accelerate import Accelerator
from stylepipe.errors import UserError
from stylepipe.training.launched import check_launch
accelerator = Accelerator(cpu={cpu})
try:
    check_launch(accelerator.num_processes)
    print(f"<trains as {{accelerator.process_index}} of {{accelerator.num_processes}}>", flush=True)
except UserError as error:
    print(f"<{{error}}>", flush=True)
accelerator.end_training()
"""
CPU_PREFIX = "" if torch.cuda.is_available() else "ACCELERATE_USE_CPU=true "


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide whatever launched pytest, and the user's own accelerate config."""
    for name in (*launched.WORLD_SIZES, launched.LAUNCHED_BY_ACCELERATE, "ACCELERATE_USE_CPU", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "absent.yaml"))


def start(tmp_path: Path, command: str, *, cpu: bool = True, **environment: str) -> list[str]:
    """Run the script under a launcher without GPUs; return what its processes said, sorted."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(cpu=cpu))
    words = command.split()
    tool = Path(sys.executable).parent / words[0]
    done = subprocess.run(
        [tool, *words[1:], script, "--res", "64"],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
    )
    said = sorted(re.findall("<(.*?)>", done.stdout))  # processes may write to the same line
    assert said, done.stderr
    return said


TOGETHER = ["trains as 0 of 2", "trains as 1 of 2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch --multi_gpu --num_processes 2 --main_process_port 0",
        "torchrun --standalone --nproc_per_node 2",
    ],
)
def test_the_right_commands_start_two_processes(tmp_path: Path, command: str) -> None:
    assert start(tmp_path, command, cpu=False, ACCELERATE_USE_CPU="true") == TOGETHER
    assert start(tmp_path, command, cpu=True) == TOGETHER


@pytest.mark.slow
def test_the_cpu_config_starts_two_processes(tmp_path: Path, root: Path) -> None:
    command = f"accelerate launch --config_file {root}/launch/accelerate/cpu.yaml --main_process_port 0"
    assert start(tmp_path, command) == TOGETHER


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--cpu", "--cpu --num_processes 1", "--config_file single-gpu.yaml"])
def test_one_process_may_be_meant(tmp_path: Path, root: Path, options: str) -> None:
    options = options.replace("single-gpu.yaml", f"{root}/launch/accelerate/single-gpu.yaml")
    environment = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}  # as a cluster's template may export
    assert start(tmp_path, f"accelerate launch {options}", **environment) == ["trains as 0 of 1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", ["--cpu --num_processes 2", "--cpu --num-processes=2", "--num_processes 2", "--config_file CONFIG"]
)
def test_one_process_instead_of_two_is_refused(tmp_path: Path, options: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "{compute_environment: LOCAL_MACHINE, distributed_type: 'NO', num_machines: 1, num_processes: 2, use_cpu: true}"
    )
    (message,) = start(tmp_path, f"accelerate launch {options.replace('CONFIG', str(config))}")
    assert message == (
        "accelerate was asked for 2 processes and started only one; to train with 2: "
        f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 {tmp_path}/train.py --res 64"
    )


@pytest.mark.slow
def test_two_machines_that_would_train_apart_are_refused(tmp_path: Path) -> None:
    machines = "--num_machines 2 --num_processes 2 --machine_rank 1 --main_process_ip 127.0.0.1"
    (message,) = start(tmp_path, f"accelerate launch --cpu {machines} --main_process_port 29509")
    assert "asked for 2 machines and started one separate process on each" in message
    assert "--multi_gpu --num_processes 2 --num_machines 2" in message
    assert "c10d" not in message  # which would ignore the ranks of the machines


@pytest.mark.slow
def test_torchrun_without_a_process_group_is_refused(tmp_path: Path) -> None:
    said = start(tmp_path, "torchrun --standalone --nproc_per_node 2", cpu=False)
    assert len(said) == 2
    assert all("started as one of 2 processes (WORLD_SIZE=2)" in message for message in said)


def test_several_processes_are_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(2)


def test_a_plain_start_passes() -> None:
    check_launch(1)


@pytest.mark.parametrize("variable", launched.WORLD_SIZES)
def test_one_of_several_separate_processes_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "8")
    with pytest.raises(UserError, match=rf"{variable}=8.*--multi_gpu --num_processes 8 "):
        check_launch(1)
    monkeypatch.setenv(variable, "1")
    check_launch(1)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("python /venv/bin/accelerate launch --cpu train.py", "--cpu train.py"),
        ("/venv/bin/accelerate-launch --cpu train.py", "--cpu train.py"),
        ("python -m accelerate.commands.launch --cpu train.py", "--cpu train.py"),
        ("python -m accelerate.commands.accelerate_cli launch --cpu train.py", "--cpu train.py"),
        ("python /venv/bin/accelerate test", None),
        ("bash run.sh", None),
    ],
)
def test_accelerate_is_known_by_any_of_its_names(words: str, arguments: str | None) -> None:
    assert launch_arguments(words.split()) == (arguments.split() if arguments else None)


def test_what_accelerate_is_asked_for(tmp_path: Path, root: Path) -> None:
    config = f"--config_file {root}/launch/accelerate"
    assert asked_for(["--cpu", "--num_processes", "2", "train.py", "--num_processes", "9"]) == (2, 1)
    assert asked_for(["--num-processes=3", "--num-machines=2", "train.py"]) == (3, 2)
    assert asked_for(["train.py"]) == (1, 1)
    assert asked_for(f"{config}/cpu.yaml train.py".split()) == (2, 1)
    assert asked_for(f"{config}/multi-gpu.yaml --num_processes 4 train.py".split()) == (4, 1)
    assert asked_for(f"{config}/single-gpu.yaml train.py".split()) == (1, 1)


@pytest.mark.parametrize(
    ("own", "launcher", "expected"),
    [
        ("/venv/bin/stylepipe train --res 64", None, "stylepipe train --res 64 --out runs/a"),
        ("/src/stylepipe/__main__.py train --out=b --resume none", None, "python -m stylepipe train --out=b"),
        ("launch/train.py --resume=auto --out b", None, "python launch/train.py --out b"),
        (
            "launch/train.py",
            "/venv/bin/python /venv/bin/torchrun --nproc_per_node 2 launch/train.py --out b",
            "torchrun --nproc_per_node 2 launch/train.py --out b",
        ),
        ("launch/train.py --out b", "slurmstepd: [123.0]", "python launch/train.py --out b"),
    ],
)
def test_the_command_that_goes_on_is_that_which_was_given(
    own: str, launcher: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", own.split())
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr("shutil.which", lambda name: f"/venv/bin/{name}")
    if launcher is not None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(launched, "_PARENT_WORDS", launcher.split())
    assert command_again(Path("runs/a")) == expected


def test_what_a_shell_would_not_find_is_given_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr("shutil.which", lambda name: None if name == "stylepipe" else f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "argv", ["/venv/bin/stylepipe", "train", "--out", "b"])
    assert command_again(Path("b")) == "/venv/bin/stylepipe train --out b"
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--out", "b"])
    assert command_again(Path("b")) == "/venv/bin/python launch/train.py --out b"


def test_the_python_of_another_environment_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("base", "venv"):  # both lead to the one that is installed
        (tmp_path / folder / "bin").mkdir(parents=True)
        (tmp_path / folder / "bin" / "python").symlink_to(sys.executable)
    python = str(tmp_path / "venv" / "bin" / "python")
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--out", "b"])
    monkeypatch.setenv("PATH", str(tmp_path / "base" / "bin"))
    assert command_again(Path("b")) == f"{python} launch/train.py --out b"
    monkeypatch.setenv("PATH", str(tmp_path / "venv" / "bin"))
    assert command_again(Path("b")) == "python launch/train.py --out b"


def test_the_command_given_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--data", "my photos"])
    expected = "accelerate launch --multi_gpu --num_processes 4 launch/train.py --data 'my photos'"
    assert right_command(4) == CPU_PREFIX + expected
    monkeypatch.setattr(sys, "argv", ["/venv/bin/stylepipe", "train", "--res", "64"])
    assert right_command(2).endswith("launch/train.py --res 64")
