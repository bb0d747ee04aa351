"""launch/slurm/train.sbatch under a SLURM of a few lines: which ends of a run are requeued, and how it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from harness import ROOT, Training, differences, newest_whole_state, read_state

SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
FAKES = Path(__file__).with_name("fake_slurm")
JOB = str(os.getpid())  # decides the port as well
TWO_TASKS = ["--ntasks-per-node", "2"]
STOPPED = "     0.064 | stopped at 0.064 kimg (SIGTERM), and saved"


def environment(work: Path, restarts: int = 0, commands: Path = Path(sys.executable).parent) -> dict[str, str]:
    """Give what a job finds in its environment, with the folder where its commands are."""
    path = os.pathsep.join([str(FAKES), str(commands), os.environ["PATH"]])
    return {"PATH": path, "FAKE_SLURM": str(work), "FAKE_SLURM_JOB": JOB, "SLURM_RESTART_COUNT": str(restarts)}


def requeued(work: Path) -> list[str]:
    """Return the jobs that asked to be requeued."""
    asked = work / "requeued"
    return asked.read_text().split() if asked.exists() else []


# --- with a script in place of `stylepipe train` ---


def run_job(work: Path, training: str, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a job to its end, where shell commands stand in for the training."""
    commands = work / "bin"
    commands.mkdir()
    stylepipe = commands / "stylepipe"
    stylepipe.write_text(f"#!/bin/bash\n{training}\n")
    stylepipe.chmod(0o755)
    (commands / "python3").symlink_to(sys.executable)  # for the fakes
    return subprocess.run(
        ["sbatch", *arguments],
        cwd=work,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment(work, restarts, commands),
    )


@pytest.mark.parametrize(
    ("training", "restarts", "code", "again"),
    [
        ("echo '     1.000 | done: 1 kimg in run' >> run/log.txt", 0, 0, False),
        (f"echo '{STOPPED}' >> run/log.txt", 0, 0, True),
        (f"echo '{STOPPED}' >> run/log.txt", 9, 0, True),
        ("echo 'a dry run'", 0, 0, False),
        ("exit 2", 0, 2, False),
        (f"echo '{STOPPED}' >> run/log.txt; exit 2", 0, 2, False),
        ("exit 1", 2, 1, True),
        ("kill -KILL $$", 2, 137, True),
        ("exit 1", 3, 1, False),
        ("mkdir run/state-000000.064; exit 1", 3, 1, True),
    ],
)
def test_what_is_requeued(training: str, restarts: int, code: int, again: bool, tmp_path: Path) -> None:
    """Stops and crashes are, unless crashes come with nothing new in between; what is done or mistaken is not."""
    (tmp_path / "run" / "state-000000.032").mkdir(parents=True)
    log = tmp_path / "run" / "log.txt"
    log.write_text(f"{STOPPED}\n")
    os.utime(log, (0, 0))  # an earlier start wrote it
    done = run_job(tmp_path, training, "--ntasks-per-node", "1", str(SCRIPT), "--out", "run", restarts=restarts)
    assert done.returncode == code, done.stderr
    assert requeued(tmp_path) == ([JOB] if again else [])
    assert ("requeued" in done.stdout) == again
    assert ("not requeued" in done.stderr) == (code != 0 and not again)


@pytest.mark.parametrize(
    ("training", "code"),
    [
        (f"trap 'sleep 0.5; echo \"{STOPPED}\" > run/log.txt; exit 0' USR1; warn; while true; do sleep 0.1; done", 0),
        ("warn; exec sleep 60", 128 + signal.SIGUSR1),
    ],
    ids=["saves", "is killed by it, as while it starts"],
)
def test_what_is_warned_is_requeued_when_it_has_ended(training: str, code: int, tmp_path: Path) -> None:
    """SLURM warns the batch shell alone: here the parent of srun, which is the task's."""
    (tmp_path / "run").mkdir()
    warn = 'warn() { kill -USR1 "$(ps -o ppid= "$PPID")"; }'
    arguments = ["--ntasks-per-node", "1", str(SCRIPT), "--out", "run"]
    done = run_job(tmp_path, f"{warn}\n{training}", *arguments, restarts=9)
    assert done.returncode == code, done.stderr
    assert requeued(tmp_path) == [JOB]


def test_each_task_is_told_its_place(tmp_path: Path) -> None:
    told = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    training = f'echo "{" ".join(f"${name}" for name in told.split())} $1 $2" > rank"$RANK"'
    options = ["--nodes", "2", "--ntasks-per-node", "2"]
    assert run_job(tmp_path, training, *options, str(SCRIPT), "--res", "64").returncode == 0
    lines = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(4)]
    assert [line[:4] for line in lines] == [
        ["0", "0", "4", "2"],
        ["1", "1", "4", "2"],
        ["2", "0", "4", "2"],
        ["3", "1", "4", "2"],
    ]
    assert {line[4] for line in lines} == {"127.0.0.1"}, "the first of both nodes"
    (port,) = {line[5] for line in lines}
    assert 1024 <= int(port) < 32768
    assert {tuple(line[6:]) for line in lines} == {("train", "--res")}


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("--res 64", f"train --res 64 --out runs/slurm-{JOB}"),
        ("--out here --res 64", "train --out here --res 64"),
        ("--res 64 --out=here", "train --res 64 --out=here"),
    ],
    ids=["none", "out", "out="],
)
def test_the_folder_is_the_same_at_each_start(given: str, passed: str, tmp_path: Path) -> None:
    done = run_job(tmp_path, 'echo "$*"', "--ntasks-per-node", "1", str(SCRIPT), *given.split())
    assert done.stdout.strip() == passed


def test_a_place_without_stylepipe_is_not_requeued(tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    path = os.pathsep.join([str(FAKES), str(tmp_path), "/usr/bin", "/bin"])
    variables = os.environ | environment(tmp_path) | {"PATH": path}
    done = subprocess.run(
        ["sbatch", SCRIPT], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60, env=variables
    )
    assert (done.returncode, requeued(tmp_path)) == (2, [])
    assert "no stylepipe in PATH" in done.stderr


# --- with the training itself ---


def job(work: Path, *options: object, restarts: int = 0) -> Training:
    """Start a job of two tasks whose run is in work/run."""
    command = ["sbatch", *TWO_TASKS, str(SCRIPT), *map(str, options), "--out", "run"]
    return Training(["env", *command], work, work / "run", environment=environment(work, restarts))


def tasks(training: Training) -> list[psutil.Process]:
    """Return the processes that train, by rank."""
    ranks = {}
    for process in training.processes():
        with suppress(psutil.Error):
            if (rank := process.environ().get("RANK")) is not None:
                ranks.setdefault(int(rank), process)  # the eldest: it may have started others
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.slow
def test_a_job_whose_time_is_up_goes_on_when_it_starts_again(
    options: list[object], straight: Path, tmp_path: Path
) -> None:
    with job(tmp_path, *options) as first:
        first.wait_for_images(256)
        first.signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: has it
        assert first.wait(120) == 0, first.output
        assert first.wait_for_all(10) == []
    assert requeued(tmp_path) == [JOB]
    saved = newest_whole_state(tmp_path / "run")
    assert 256 <= saved < 800
    with job(tmp_path, *options, restarts=1) as second:
        assert second.wait(180) == 0, second.output
        assert second.went_on_from == saved
    assert requeued(tmp_path) == [JOB], "done, so not again"
    assert differences(read_state(tmp_path / "run" / straight.name), read_state(straight)) == []


@pytest.mark.slow
def test_a_preempted_job_is_requeued(options: list[object], tmp_path: Path) -> None:
    with job(tmp_path, *options) as training:
        training.wait_for_images(64)
        for task in tasks(training):  # the batch shell hears nothing of a time of grace
            task.send_signal(signal.SIGTERM)
        assert training.wait(120) == 0, training.output
    assert requeued(tmp_path) == [JOB]
    assert newest_whole_state(tmp_path / "run") >= 64


@pytest.mark.slow
def test_a_job_that_lost_a_task_ends_and_is_requeued(options: list[object], tmp_path: Path) -> None:
    with job(tmp_path, *options) as training:
        training.wait_for_images(192)
        tasks(training)[1].kill()
        assert training.wait(120) == 128 + signal.SIGKILL, training.output
        assert training.wait_for_all(10) == []
    assert requeued(tmp_path) == [JOB]


@pytest.mark.slow
def test_a_mistake_is_not_requeued(options: list[object], tmp_path: Path) -> None:
    with job(tmp_path, *options, "--batch-size", 3) as training:
        assert training.wait(120) == 2, training.output
    assert requeued(tmp_path) == []
    assert "--batch-size 3" in training.output
