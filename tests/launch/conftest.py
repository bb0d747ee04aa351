"""What tests of launching share: small data, and a run that nothing interrupts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "faults"))  # for harness; pytest's importlib mode leaves it out

from harness import TINY, Training, prepare_faces, torchrun

KIMG = 0.8
OPTIONS = [
    *TINY,
    *("--res", 16, "--batch-size", 8, "--kimg", KIMG),
    *("--tick-kimg", 0.016, "--snapshot-kimg", 0.128, "--grid-kimg", 10, "--clip-kimg", 10),
]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide whatever launched pytest."""
    for name in os.environ:
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Give the options of a training that takes some seconds; --out is left to say."""
    return [*OPTIONS, "--data", prepare_faces(tmp_path_factory.mktemp("faces"), 16)]


@pytest.fixture(scope="session")
def straight(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the last state of that training in two processes, never interrupted."""
    work = tmp_path_factory.mktemp("straight")
    with Training(torchrun(*options, "--out", work / "run"), work, work / "run") as training:
        assert training.wait(300) == 0, training.output
    return work / "run" / f"state-{KIMG:010.3f}"
