"""`stylepipe train` from 4 px up: data of every level, files of what has grown, and going on to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stylepipe
from stylepipe.cli.main import main
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.interop.network_file import read_header

# 16 images stable, 16 fading: 8 px begin at 16 images, 16 px at 48.
GROWING = [
    *("--res", "16", "--batch-size", "8", "--network.channel-base", "128", "--network.channel-max", "8"),
    *("--growth.start-res", "4", "--growth.stable-kimg", "0.016", "--growth.fade-kimg", "0.016"),
    *("--network.z-dim", "16", "--tracker", "none", "--workers", "0", "--tick-kimg", "0.008", "--grid-kimg", "0.008"),
    *("--snapshot-kimg", "0.024"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs") / "faces"
    folder.mkdir()
    for index in range(24):
        draw_face(index, 32).save(folder / f"{index:02d}.png")
    out = tmp_path_factory.mktemp("prepared") / "faces16"
    prepare(folder, out, Preparation(16, levels=True), workers=1, progress=False)
    return out


def options(preset: str, shards: Path, out: Path, kimg: float, *more: str) -> list[str]:
    return ["train", "--data", str(shards), "--preset", preset, "--out", str(out), "--kimg", str(kimg), *GROWING, *more]


OTHERS = [pytest.param(preset, marks=pytest.mark.slow) for preset in ("stylegan", "stylegan2")]


@pytest.fixture(scope="module", params=["progan", *OTHERS])
def grown(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A preset, and a run of 0.096 kimg with it, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / request.param
    assert main(options(request.param, shards, out, 0.096)) == 0
    return request.param, out


def test_every_stage_is_logged_with_what_it_was(grown: tuple[str, Path]) -> None:
    lines = [json.loads(line) for line in (grown[1] / "stats.jsonl").read_text().splitlines()]
    found = [(line["Progress/resolution"], line["Progress/alpha"]) for line in lines]
    fade = [(0.0, 0.5), (1.0, 1.0)]
    assert found[:2] == [(4, 1.0)] * 2
    assert found[2:6] == [(8, alpha) for pair in fade for alpha in pair]
    assert found[6:] == [(16, 0.0), (16, 0.5), *[(16, 1.0)] * 4]
    assert [line["Progress/step"] for line in lines] == list(range(1, 13))
    log = (grown[1] / "log.txt").read_text()
    assert "growing from 4 to 16 px" in log
    assert "now at 8 px, batch 8" in log
    assert "now at 16 px, batch 8" in log


def test_grids_of_every_stage_are_of_one_size(grown: tuple[str, Path]) -> None:
    for images, side in ((16, 4), (48, 2), (96, 1)):  # of a pixel of the network: at the end of 4 px, of 8, and of all
        with Image.open(grown[1] / "grids" / f"{images / 1000:010.3f}.png") as grid:
            pixels = np.asarray(grid)
        assert pixels.shape == (8 * 16, 15 * 16, 3)
        blocks = pixels.reshape(pixels.shape[0] // side, side, -1, side, 3)
        assert (blocks == blocks[:, :1, :, :1]).all(), images


def test_going_on_in_the_middle_of_a_fade_is_exact(grown: tuple[str, Path], shards: Path, tmp_path: Path) -> None:
    preset, straight = grown
    out = tmp_path / "run"
    for kimg in (0.024, 0.056, 0.096):  # half into the fade of 8 px, and of 16 px
        assert main(options(preset, shards, out, kimg)) == 0
    found, expected = (load_file(run / "state-000000.096" / "state.safetensors") for run in (out, straight))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("name", "res"), [("000000.024", 8), ("000000.048", 8), ("000000.072", 16)])
def test_network_files_hold_what_has_grown(grown: tuple[str, Path], name: str, res: int, tmp_path: Path) -> None:
    path = grown[1] / f"network-{name}.safetensors"
    header = read_header(path)
    assert header.config["res"] == header.beside["D"].config["res"] == res
    assert header.config.get("alpha", 1) == (0.0 if name == "000000.024" else 1)  # of the step that it was saved after
    G = stylepipe.load_network(path)
    assert G(torch.randn(2, 16)).shape == (2, 3, res, res)
    assert main(["sample", str(path), "--seeds", "0-3", "--grid", "2x2", "--out", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * res, 2 * res)


def test_data_without_levels_gets_them_once_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STYLEPIPE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(4):
        draw_face(index, 32).save(folder / f"{index}.png")
    prepare(folder, tmp_path / "plain", Preparation(16), workers=1, progress=False)
    before = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert main(options("progan", tmp_path / "plain", tmp_path / "run", 0.024)) == 0
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == before
    assert [path.name for path in (tmp_path / "cache" / "datasets").glob("*levels*/0004")] == ["0004"]


def test_a_training_too_short_to_grow_says_what_it_takes(shards: Path, tmp_path: Path) -> None:
    assert main(options("progan", shards, tmp_path / "run", 0.024)) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "growing from 4 to 8 px (the full 16 px are there from 0.064 kimg on; --growth.stable-kimg" in log


def test_a_changed_schedule_is_refused(
    grown: tuple[str, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, run = grown
    more = ["--resume", str(run / "state-000000.072"), "--growth.fade-kimg", "0.032"]
    assert main(options(preset, shards, tmp_path / "other", 0.096, *more)) == 2
    message = capsys.readouterr().err
    assert "growth.fade_kimg 0.016 -> 0.032" in message
    assert "Traceback" not in message


def test_a_plain_generator_has_neither_truncation_nor_noise(
    grown: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, run = grown
    path = str(run / "network-000000.072.safetensors")
    code = main(["sample", path, "--trunc", "0.7", "--seeds", "0", "--out", str(tmp_path / "a.png")])
    assert code == (2 if preset == "progan" else 0)
    assert ("--trunc 0.7" in capsys.readouterr().err) == (preset == "progan")
