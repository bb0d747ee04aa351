"""Every command of the README runs, made small: at 16 px, for one step, on a few drawn faces."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign_checkpoints import official_file

from stylepipe.cli.main import main
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.kernels.build import BuildError
from stylepipe.kernels.nvcc import find_nvcc
from stylepipe.kernels.nvrtc import find_nvrtc

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SMALL = (
    "--res 16 --batch-size 4 --kimg 0.004 --network.channel-base 64 --network.channel-max 4 --tracker none "
    "--network.z-dim 16 --network.w-dim 16"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what the README's commands name: photographs, shards, launch scripts, networks of ours and not."""
    place = tmp_path_factory.mktemp("readme")
    (place / "PHOTOGRAPHS").mkdir()
    for index in range(8):
        draw_face(index, 32).save(place / "PHOTOGRAPHS" / f"{index}.png")
    (place / "launch").symlink_to(ROOT / "launch")
    for name in ("constraints.txt", "pyproject.toml", "Makefile", "stylepipe", "kernels", "datasets", "README.md"):
        (place / name).symlink_to(ROOT / name)
    prepare(place / "PHOTOGRAPHS", place / "prepared", Preparation(16), workers=1, progress=False)
    assert main(["train", "--data", str(place / "prepared"), "--out", str(place / "run"), *shlex.split(SMALL)]) == 0
    run = place / "runs" / "00000-auto-faces-64"
    run.mkdir(parents=True)
    for part in (place / "run").iterdir():
        (run / part.name).symlink_to(part)
    official_file(place / "ffhq.pkl", "skip_resnet_32")
    (run / "network-000040.000.safetensors").symlink_to(place / "run" / "network-000000.004.safetensors")
    return place


def made_small(command: str) -> str:
    """Return the command as this test runs it."""
    if command.startswith("make "):
        return command.replace("make ", "make --dry-run ")
    if command.startswith("pip install"):
        return f"{sys.executable} -m {command} --dry-run --no-deps --no-build-isolation --quiet"
    if "kernels build" in command:
        return command.replace("--arch 80,90,100", "--arch 90")
    if "prepare" in command:
        return command.replace("SHARDS", "SHARDS-OF-THIS-TEST").replace("--res 1024", "--res 16")
    if "evaluate" in command:
        return command.replace("PHOTOGRAPHS", "prepared") + " --images 4"
    if "train" in command:
        # The eight processes of the multi-GPU file are two here.
        command = command.replace("multi-gpu.yaml", "multi-gpu.yaml --num_processes 2").replace("SHARDS", "prepared")
        small = SMALL if not re.search("progan|r3gan", command) else SMALL.replace(" --network.w-dim 16", "")
        return f"{command} {small}" + ("" if "--data" in command else " --data prepared")
    return command


def has_gpu_compiler() -> bool:
    for find in (find_nvcc, find_nvrtc):
        try:
            find()
        except BuildError:
            continue
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, place):
    if "kernels build" in command and not has_gpu_compiler():
        pytest.skip("needs nvcc or NVRTC")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STYLEPIPE_CACHE": str(place / "cache"),
        "STYLEPIPE_KERNEL_CACHE": str(place / "kernel-cache"),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        made_small(command), shell=True, cwd=place, env=environment, capture_output=True, text=True, timeout=500
    )
    found_problems = "doctor" in command and "problem" in result.stdout  # of the machine the tests run on
    assert result.returncode == 0 or found_problems, result.stdout + result.stderr
    if "--out grid.png" in command:
        assert (place / "grid.png").exists()
    if "report" in command:
        assert (place / "runs" / "00000-auto-faces-64" / "report.html").exists()


def test_the_readme_names_the_two_commands_and_the_main_job():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert any(command.startswith("accelerate launch launch/train.py") for command in COMMANDS)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code.replace("torch.randn(4, 512)", "torch.randn(4, 16)"), names)
    img = names["img"]
    assert isinstance(img, torch.Tensor)
    assert img.shape == (4, 3, 16, 16)


def test_pictures_and_pages_of_the_readme_exist():
    for target in re.findall(r"\]\(((?:docs|launch)/[^)]+)\)", README):
        assert (ROOT / target).exists(), target
