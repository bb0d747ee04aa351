"""launch/accelerate/*.yaml: accelerate takes them as they are, and they start the processes that they say."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from harness import ROOT, SCRIPT, Training, stats_of

from stylepipe.training.launched import asked_for

CONFIGS = ROOT / "launch" / "accelerate"
SHORT = ["--kimg", 0.032]
PROCESSES = {"cpu": (2, 1), "single-gpu": (1, 1), "multi-gpu": (8, 1), "two-nodes": (16, 2)}
"""Processes on all machines together, and machines."""


def command_of(config: Path) -> list[str]:
    """Return the command that the head of a config shows, without its prompt."""
    (command,) = re.findall(r"^#   (accelerate launch .*)$", config.read_text(), re.MULTILINE)
    return command.split()


def train(config: str, work: Path, *options: object, launcher: Sequence[object] = ()) -> Training:
    """Start a training by a config, with further options of the launcher, into work/run."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(CONFIGS / f"{config}.yaml"), *map(str, launcher), str(SCRIPT)]
    return Training([*command, *map(str, options), "--out", "run"], work, work / "run")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_no_config_is_left_out() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == PROCESSES.keys()


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_knows_all_that_a_config_says(name: str) -> None:
    """It raises for keys that it does not know. Precision is stylepipe's own."""
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == PROCESSES[name]
    assert (config.mixed_precision, config.use_cpu) == ("no", name == "cpu")
    assert (config.distributed_type == DistributedType.MULTI_GPU) == (PROCESSES[name][0] > 1)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_config_opens_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = command_of(CONFIGS / f"{name}.yaml")[2:]
    options = launch_command_parser().parse_args(words)
    assert options.config_file == f"launch/accelerate/{name}.yaml"
    assert options.training_script == "launch/train.py"
    assert asked_for(words) == PROCESSES[name]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("cpu", 2), ("single-gpu", 1), ("multi-gpu", 2)])
def test_a_config_starts_its_processes(name: str, count: int, options: list[object], tmp_path: Path) -> None:
    """Those of the config itself, or where it asks for more GPUs than anybody's CPU can stand in for, two."""
    fewer = ["--num_processes", count] if count != PROCESSES[name][0] else []
    port = ["--main_process_port", free_port()]
    with train(name, tmp_path, *options, *SHORT, launcher=[*fewer, *port]) as training:
        assert training.wait(180) == 0, training.output
    assert "values were not passed" not in training.output, "accelerate had to guess"
    assert {line["world_size"] for line in stats_of(tmp_path / "run")} == {count}


@pytest.mark.slow
def test_two_machines_train_together(options: list[object], tmp_path: Path) -> None:
    """Two launchers with one process each, the second machine first; machine 0 is the one that writes."""
    common = ["--num_processes", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    machines = [tmp_path / f"machine{rank}" for rank in (0, 1)]  # no shared disk
    for machine in machines:
        machine.mkdir()
    arguments = [*options, *SHORT]
    with (
        train("two-nodes", machines[1], *arguments, launcher=[*common, "--machine_rank", 1]) as second,
        train("two-nodes", machines[0], *arguments, launcher=[*common, "--machine_rank", 0]) as first,
    ):
        assert first.wait(180) == 0, first.output
        assert second.wait(60) == 0, second.output
    assert {line["world_size"] for line in stats_of(machines[0] / "run")} == {2}
    assert "done: 0.032 kimg" in first.output
    assert "kimg" not in second.output
