"""Data and a run that several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import options

from stylepipe.cli.main import main
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs") / "faces"
    folder.mkdir()
    for index in range(24):
        draw_face(index, 32).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def shards(photographs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "faces16"
    prepare(photographs, out, Preparation(16), workers=1, progress=False)
    return out


@pytest.fixture(scope="session")
def finished(shards, tmp_path_factory) -> Path:
    """A run of 0.128 kimg, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert main(options(shards, out, 0.128)) == 0
    return out
