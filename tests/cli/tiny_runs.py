"""Trainings that take seconds, as a user starts them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stylepipe.recipes.gan import GANRecipe

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--res", "16", "--batch-size", "8", "--tracker", "none", "--mirror", "--seed", "3"),
    *("--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16", "--network.w-dim", "16"),
    *("--loss.r1-interval", "4", "--tick-kimg", "0.016", "--grid-kimg", "0.064", "--snapshot-kimg", "0.064"),
]


def options(shards: Path, out: Path, kimg: float, *more: str) -> list[str]:
    return ["train", "--data", str(shards), "--out", str(out), "--kimg", str(kimg), *TINY, *more]


def start(arguments: list[str], **keywords) -> subprocess.Popen:
    """Start `launch/train.py` as its own process, as a user would."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **(pipes | keywords))


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(2400):
        if path.exists():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def state_tensors(out: Path, kimg: str) -> dict[str, torch.Tensor]:
    return load_file(out / f"state-{kimg}" / "state.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return 0 where all are the same to the bit, and NaN where one has NaN that the other has not."""
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()]
    differences = [float((a[name].double() - b[name].double()).abs().max()) for name in different]
    return sum(differences) / len(differences) if any(map(math.isnan, differences)) else max(differences, default=0.0)


def at_image(monkeypatch: pytest.MonkeyPatch, images_seen: int, happen: Callable[[], object]) -> None:
    """Have something happen within the step that begins after so many images."""
    whole = GANRecipe.g_main

    def g_main(self, batch, record):
        if batch.stage.images_seen == images_seen:
            happen()
        return whole(self, batch, record)

    monkeypatch.setattr(GANRecipe, "g_main", g_main)
