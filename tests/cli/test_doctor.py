"""`stylepipe doctor`: what each probe says of surroundings made for it, the screen, the JSON, the exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stylepipe.cli import doctor, doctor_machine
from stylepipe.cli.finding import Finding, examine
from stylepipe.cli.main import main
from stylepipe.datasets import decoding
from stylepipe.training.memory import GIB

NAMES = [
    "python",
    "torch",
    "GPUs",
    "driver",
    "NVRTC",
    "nvcc",
    "C++",
    "kernel cache",
    "kernels",
    "bias_act",
    "upfirdn2d",
]
NAMES += [
    "styled_act",
    "act_fir",
    "ninja",
    "accelerate",
    "decoders",
    "/dev/shm",
    "cores",
    "memory",
    "disk",
    "W&B",
    "variables",
]


@pytest.fixture(autouse=True)
def _nobody_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give an empty home and working folder, and none of the variables that the probes look at."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "STYLEPIPE_KERNELS", "STYLEPIPE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


# --- the screen ---


def finds(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    monkeypatch.setattr(doctor, "find", lambda: iter(findings))


def test_a_screen_tells_all_within_20_seconds(tmp_path: Path) -> None:
    """In a process of its own, from an empty cache, as at the first use."""
    begin = time.monotonic()
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stylepipe", "doctor"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    seconds = time.monotonic() - begin
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line[8:21].strip() for line in lines if not line.startswith(" ")][:-1] == NAMES
    assert {line[:8].strip() for line in lines if not line.startswith(" ")} - {"Training"} <= {"ok", "note", "problem"}
    problems = [line for line in lines if line.startswith("problem")]
    assert done.returncode == bool(problems), problems
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    if not torch.cuda.is_available():  # there, each GPU takes a second or two
        assert seconds < 20


def test_every_line_and_the_last_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    finds(monkeypatch, Finding("cores", "ok", "8 usable"), Finding("W&B", "note", "offline", "wandb login"))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok      cores        8 usable",
        "note    W&B          offline",
        "                     -> wandb login",
        "Training can run here.",
    ]


@pytest.mark.parametrize(("count", "last"), [(1, "1 problem would"), (2, "2 problems would")])
def test_a_problem_is_exit_code_1(monkeypatch, capsys, count: int, last: str) -> None:
    finds(monkeypatch, *[Finding("disk", "problem", "full", "make room")] * count)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"{last} stop or slow training here."


def test_long_texts_are_wrapped_shortened_and_say_home(tmp_path: Path) -> None:
    text = f"{tmp_path}/home/cache\n is " + "very " * 200 + "long"
    lines = doctor.screen_lines(Finding("kernel cache", "problem", text, "shorten " * 30)).splitlines()
    assert lines[0].startswith("problem kernel cache ~/cache is very very")
    assert lines[4].endswith("very ...")
    assert all(line.startswith(" " * 21) for line in lines[1:])
    assert lines[5].startswith(" " * 21 + "-> shorten")
    assert max(map(len, lines)) <= 100
    assert len(lines) == 5 + 4


def test_json_holds_the_same_whole(monkeypatch, capsys) -> None:
    long = Finding("NVRTC", "problem", "no " * 500, "install it")
    finds(monkeypatch, Finding("cores", "ok", "8 usable"), long)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--json"])
    assert stopped.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == 1
    assert [Finding(**finding) for finding in told["findings"]] == [Finding("cores", "ok", "8 usable"), long]


def test_a_probe_that_fails_is_a_line() -> None:
    def probe() -> Finding:
        raise OSError(5, "Input/output error\nand more")

    assert examine("disk", probe) == Finding(
        "disk", "note", "cannot be examined (OSError: [Errno 5] Input/output error)"
    )
    assert examine("disk", lambda: 1 / 0).text == "cannot be examined (ZeroDivisionError: division by zero)"  # type: ignore


@pytest.mark.parametrize("failure", ["ImportError('libcudart.so.13: not found')", "AttributeError('half there')"])
def test_without_torch_it_says_so(tmp_path: Path, failure: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"raise {failure}\n")
    command = [sys.executable, "-c", "import sys; from stylepipe.cli.main import main; sys.exit(main(['doctor']))"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr == ""
    assert done.stdout.startswith("problem packages     not all that stylepipe needs can be imported by")
    assert failure.split("'")[1].split()[0] in done.stdout
    assert done.stdout.endswith("1 problem would stop or slow training here.\n")


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m stylepipe doctor | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 1, 141)  # 141 where the pipe was closed in time


# --- processes ---


def test_python_names_versions() -> None:
    finding = doctor_machine.python()
    assert finding.state == "ok"
    assert finding.text.startswith(f"{sys.version.split()[0]}, stylepipe ")


def test_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor_machine.ninja().state == "ok"
    monkeypatch.setattr("ninja.BIN_DIR", str(tmp_path))
    assert doctor_machine.ninja().state == "note"
    assert doctor_machine.ninja().remedy == "pip install --force-reinstall ninja"
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert doctor_machine.ninja().remedy == "pip install ninja"


CONFIG = "compute_environment: LOCAL_MACHINE\nmachine_rank: 0\nnum_machines: {}\nnum_processes: {}\n"
CONFIG += "distributed_type: {}\nuse_cpu: {}\nmixed_precision: bf16\n"


@pytest.mark.parametrize(
    ("gpus", "config", "state", "said"),
    [
        (8, (1, 8, "MULTI_GPU", "false"), "ok", "8 processes, 1 machine, mixed precision bf16"),
        (4, (2, 8, "MULTI_GPU", "false"), "ok", "8 processes, 2 machines"),
        (8, (1, 4, "MULTI_GPU", "false"), "note", "4 of 8 GPUs would idle"),
        (2, (1, 1, '"NO"', "false"), "note", "1 of 2 GPUs would idle"),
        (2, (1, 4, "MULTI_GPU", "false"), "problem", "more than the 2 GPUs here"),
        (2, (1, 2, "MULTI_GPU", "true"), "problem", "the GPUs would idle"),
        (0, (1, 2, "MULTI_GPU", "true"), "ok", "2 processes"),
        (0, (1, 2, "MULTI_CPU", "true"), "problem", "distributed_type MULTI_CPU starts one process only"),
        (0, (1, 1, '"NO"', "true"), "ok", "1 process, 1 machine"),
    ],
)
def test_the_configuration_of_accelerate(tmp_path, gpus, config, state, said) -> None:
    path = tmp_path / "default_config.yaml"
    path.write_text(CONFIG.format(*config))
    finding = doctor_machine.accelerate(gpus, path)
    assert (finding.state, said in finding.text) == (state, True), finding
    assert bool(finding.remedy) == (state != "ok")


def test_accelerate_without_a_configuration_and_with_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "default_config.yaml"
    assert doctor_machine.accelerate(1, path).text.endswith("accelerate launch starts one process")
    assert doctor_machine.accelerate(8, path).text.endswith("accelerate launch starts 8 processes, one per GPU")
    for broken in ("num_processes: [", "nonsense: 1\n", "num_processes: many\ndistributed_type: 'NO'\n"):
        path.write_text(broken)
        assert doctor_machine.accelerate(8, path).state == "problem"


# --- memory, cores, disks ---


def filesystem(monkeypatch: pytest.MonkeyPatch, free: float, total: float) -> None:
    status = SimpleNamespace(f_bavail=int(free), f_blocks=int(total), f_frsize=1)
    monkeypatch.setattr(doctor_machine.os, "statvfs", lambda path: status)


def test_shared_memory_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    filesystem(monkeypatch, 64 * 2**20, 64 * 2**20)
    for gpus in (0, 1):
        assert doctor_machine.shared_memory(gpus, tmp_path) == Finding("/dev/shm", "ok", "64 MiB free of 64 MiB")
    finding = doctor_machine.shared_memory(2, tmp_path)
    assert finding.state == "problem"
    assert finding.text == "64 MiB free of 64 MiB; NCCL may need up to 1.0 GiB between GPUs"
    assert "--shm-size" in finding.remedy
    filesystem(monkeypatch, 1 * GIB, 2 * GIB)
    assert doctor_machine.shared_memory(2, tmp_path).state == "ok"
    assert doctor_machine.shared_memory(1, tmp_path / "none").text == "none on this system"


def test_slow_decoders_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "simplejpeg", object())
    monkeypatch.setattr(decoding, "spng_decode", object())
    assert doctor_machine.decoders() == Finding("decoders", "ok", "JPEG by simplejpeg, PNG by imagecodecs")
    monkeypatch.setattr(decoding, "spng_decode", None)
    finding = doctor_machine.decoders()
    assert (finding.state, finding.text) == ("note", "JPEG by simplejpeg, PNG by Pillow; there are faster ones")
    assert finding.remedy == "pip install 'stylepipe[fast]'"


@pytest.mark.parametrize(
    ("there", "usable", "gpus", "cpu_max", "state", "said"),
    [
        (16, 16, 8, None, "ok", "16 usable"),
        (16, 4, 0, "max 100000", "ok", "4 usable of 16"),
        (16, 15, 8, None, "note", "15 usable of 16 for 8 GPUs: too few"),
        (16, 1, 1, None, "note", "1 usable of 16 for 1 GPU: too few"),
        (16, 16, 0, "250000 100000", "note", "the time of 2.5"),
        (16, 16, 0, "1600000 100000", "ok", "16 usable"),
        (16, 16, 0, "nonsense", "ok", "16 usable"),
    ],
)
def test_cores(monkeypatch, tmp_path, there, usable, gpus, cpu_max, state, said) -> None:
    monkeypatch.setattr(doctor_machine.os, "cpu_count", lambda: there)
    monkeypatch.setattr(doctor_machine, "available_cpus", lambda: usable)
    if cpu_max is not None:
        (tmp_path / "cpu.max").write_text(f"{cpu_max}\n")
    finding = doctor_machine.cores(gpus, tmp_path)
    assert finding.state == state
    assert said in finding.text
    assert bool(finding.remedy) == (state != "ok")


def test_the_quota_of_older_control_groups(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    for quota, expected in (("-1", None), ("50000", 0.5)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert doctor_machine.cpu_quota(tmp_path) == expected


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    monkeypatch.setattr(doctor_machine, "free_memory", lambda device: 8 * GIB)
    assert doctor_machine.memory() == Finding("memory", "ok", "8.0 GiB free of 64.0 GiB")
    monkeypatch.setattr(doctor_machine, "free_memory", lambda device: GIB)
    assert doctor_machine.memory().state == "note"


def disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **free: float) -> None:
    """Put the working folder, the temporary folder and the cache on disks of their own, with so many GiB."""
    Status = namedtuple("Status", "st_dev")
    folders = {tmp_path / name: number for number, name in enumerate(("out", "tmp", "cache"))}
    for folder in folders:
        folder.mkdir(exist_ok=True)
    usage = {folder: SimpleNamespace(free=free[folder.name] * GIB) for folder in folders}
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(doctor_machine.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(doctor_machine, "data_folder", lambda: tmp_path / "cache" / "not" / "yet")
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", usage.__getitem__)
    monkeypatch.setattr(Path, "stat", lambda self, **_: Status(folders[self]) if self in folders else Status(-1))
    monkeypatch.setattr(Path, "exists", lambda self: self in folders)


def test_disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disks(monkeypatch, tmp_path, out=100, tmp=0.5, cache=2)
    text = "100.0 GiB free for the working folder; 512 MiB free for the temporary folder; 2.0 GiB free for the cache"
    assert doctor_machine.disk() == Finding("disk", "ok", text)


@pytest.mark.parametrize(
    ("free", "state", "said", "remedy"),
    [
        ({"out": 5, "tmp": 5, "cache": 5}, "note", "5.0 GiB free for the working folder", "some 10 GiB"),
        ({"out": 0.5, "tmp": 5, "cache": 5}, "problem", "out, is full", "--out"),
        ({"out": 50, "tmp": 0.01, "cache": 5}, "problem", "tmp, is full", "TMPDIR"),
        ({"out": 50, "tmp": 5, "cache": 0.5}, "problem", "cache, is full", "STYLEPIPE_CACHE"),
    ],
)
def test_full_disks(monkeypatch, tmp_path, free, state, said, remedy) -> None:
    disks(monkeypatch, tmp_path, **free)
    finding = doctor_machine.disk()
    assert finding.state == state
    assert said in finding.text
    assert remedy in finding.remedy


def test_a_disk_that_cannot_be_written(monkeypatch, tmp_path) -> None:
    disks(monkeypatch, tmp_path, out=50, tmp=50, cache=50)
    monkeypatch.setattr(doctor_machine.os, "access", lambda path, mode: path.name != "cache")
    finding = doctor_machine.disk()
    assert finding.state == "problem"
    assert finding.text.endswith("cache, cannot be written")


def test_folders_of_one_disk_are_told_together_and_no_temporary_folder_is_no_crash(monkeypatch, tmp_path) -> None:
    def none() -> str:
        raise FileNotFoundError("no usable temporary directory found")

    monkeypatch.setattr(doctor_machine.tempfile, "gettempdir", none)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50 * GIB))
    text = "50.0 GiB free for the working folder, the temporary folder, the cache"
    assert doctor_machine.disk() == Finding("disk", "ok", text)


# --- W&B ---

KEY = "k" * 40


def test_wandb_without_a_login() -> None:
    finding = doctor_machine.dashboard()
    assert finding.state == "note"
    assert finding.text == "offline: not logged in at api.wandb.ai; wandb sync uploads later"
    assert finding.remedy.startswith("wandb login")


@pytest.mark.parametrize(
    ("variables", "state", "text"),
    [
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, "note", "offline, as WANDB_MODE says"),
        ({"WANDB_MODE": "disabled"}, "note", "disabled, as WANDB_MODE says"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": KEY}, "ok", "logged in at api.wandb.ai, by WANDB_API_KEY"),
        ({"WANDB_API_KEY": "short"}, "note", "offline: the key of WANDB_API_KEY is too short"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "https://w.org:8"}, "ok", "logged in at w.org:8, by WANDB_API_KEY"),
        (
            {"WANDB_IDENTITY_TOKEN_FILE": "/nowhere"},
            "note",
            "offline: WANDB_IDENTITY_TOKEN_FILE=/nowhere, and there is no such file",
        ),
        (
            {"WANDB_IDENTITY_TOKEN_FILE": "/etc/passwd"},
            "ok",
            "logged in at api.wandb.ai, by WANDB_IDENTITY_TOKEN_FILE",
        ),
        (
            {"WANDB_IDENTITY_TOKEN_FILE": "/etc/passwd", "WANDB_API_KEY": KEY},
            "note",
            "offline: WANDB_IDENTITY_TOKEN_FILE=/etc/passwd, and WANDB_API_KEY is set as well",
        ),
    ],
)
def test_wandb_by_variables(monkeypatch, variables, state, text) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = doctor_machine.dashboard()
    assert (finding.state, finding.text) == (state, text)
    assert KEY not in str(finding)


def test_wandb_by_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usual, other = tmp_path / "home" / ".netrc", tmp_path / "other"
    usual.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert doctor_machine.dashboard() == Finding("W&B", "ok", f"logged in at api.wandb.ai, by {usual}")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # the key is another server's
    assert doctor_machine.dashboard().text.startswith("offline: not logged in at wandb.example.org")
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("NETRC", str(other))
    assert doctor_machine.dashboard().text.startswith("offline: not logged in")
    other.write_text("machine")
    assert f"offline: not logged in at api.wandb.ai ({other} cannot be read: " in doctor_machine.dashboard().text


def test_wandb_by_its_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "home" / ".config" / "wandb"
    folder.mkdir(parents=True)
    (folder / "settings").write_text(f"[default]\nbase_url = https://w.org\napi_key = {KEY}\n")
    assert doctor_machine.dashboard() == Finding("W&B", "ok", "logged in at w.org, by its settings")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert doctor_machine.dashboard() == Finding("W&B", "note", "offline, as its settings say")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert doctor_machine.dashboard().state == "ok"
    (folder / "settings").write_text("nonsense")
    assert doctor_machine.dashboard().state == "note"


@pytest.mark.slow  # each login starts a process of W&B's
@pytest.mark.parametrize("key", [None, "short", KEY])
def test_wandb_is_looked_at_as_training_does(monkeypatch, tmp_path, key) -> None:
    code = "from stylepipe.training.wandb_run import wandb_mode; print(wandb_mode()[0])"
    if key:
        (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {key}\n")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    logged_in = doctor_machine.dashboard().state == "ok"
    assert done.stdout.strip() == ("online" if logged_in else "offline")


# --- our variables ---


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in doctor_machine.os.environ if name.startswith("STYLEPIPE_")]:
        monkeypatch.delenv(name)
    assert doctor_machine.variables() == Finding("variables", "ok", "no STYLEPIPE_ variable is set")
    monkeypatch.setenv("STYLEPIPE_KERNELS", "torch")
    monkeypatch.setenv("STYLEPIPE_CACHE", "/data")
    assert doctor_machine.variables() == Finding("variables", "ok", "STYLEPIPE_CACHE=/data, STYLEPIPE_KERNELS=torch")
    monkeypatch.setenv("STYLEPIPE_KERNAL_CACHE", "/data")
    monkeypatch.setenv("STYLEPIPE_XYZ", "1")
    finding = doctor_machine.variables()
    assert finding.state == "note"
    assert "STYLEPIPE_KERNAL_CACHE means nothing: did you mean STYLEPIPE_KERNEL_CACHE?" in finding.remedy
    assert "STYLEPIPE_XYZ means nothing: expected one of STYLEPIPE_KERNELS, STYLEPIPE_KERNEL_CACHE" in finding.remedy
    monkeypatch.setenv("STYLEPIPE_KERNELS", "gpu")
    finding = doctor_machine.variables()
    assert finding.state == "problem"
    assert finding.remedy.startswith("STYLEPIPE_KERNELS=gpu: expected one of auto, cuda, torch; ")
    assert "STYLEPIPE_KERNAL_CACHE means nothing" in finding.remedy


def test_every_variable_of_the_source_is_known(root: Path) -> None:
    sources = [path for room in ("stylepipe", "kernels", "datasets") for path in (root / room).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r'"(STYLEPIPE_[A-Z_]+[A-Z])"', path.read_text())}
    assert named == set(doctor_machine.VARIABLES)
