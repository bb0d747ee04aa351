"""Training on labels as a user runs it: classes by folder, vectors by label file, and pictures of each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stylepipe
from stylepipe.cli.main import main
from stylepipe.interop.network_file import read_header

RES = 16
TINY = [
    *("--res", str(RES), "--batch-size", "8", "--kimg", "0.016", "--tracker", "none", "--cond", "--augment", "none"),
    *("--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16", "--network.w-dim", "16"),
]
COLOURS = {"cats": (200, 60, 60), "dogs": (60, 200, 60), "owls": (60, 60, 200)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEPIPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Give four photographs of each of three classes, all of the class's colour."""
    folder = tmp_path / "photographs"
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (RES, RES), colour).save(folder / name / f"{index}.png")
    return folder


def vectors_for(photographs: Path) -> None:
    files = sorted(path.relative_to(photographs).as_posix() for path in photographs.rglob("*.png"))
    labels = [[name, [index / 10, -1.5]] for index, name in enumerate(files)]
    (photographs / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_classes_from_photographs_to_pictures(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--network.class-w-avg", "--network.d-conditioning", "both", "--loss.acgan-weight", "1"]
    assert main(["train", "--data", str(photographs), "--out", str(out), *TINY, *options]) == 0

    assert "rows of the grids, from the top: cats, dogs, owls" in (out / "log.txt").read_text()
    real = np.asarray(Image.open(out / "grids" / "real.png"))
    assert real.shape == (6 * RES, 15 * RES, 3)  # of 8 rows that fit, two for each class
    for row, colour in enumerate(COLOURS.values()):
        first, second = real[2 * row * RES :][:RES], real[(2 * row + 1) * RES :][:RES]
        assert (first[:, : 4 * RES] == colour).all()
        assert not first[:, 4 * RES :].any()  # there are four of each
        assert not second.any()
    with Image.open(out / "grids" / "000000.016.png") as grid:
        assert grid.size == (15 * RES, 6 * RES)
    stats = json.loads((out / "stats.jsonl").read_text().splitlines()[-1])
    assert {"Loss/D/aux", "Loss/G/aux", "Accuracy/real"} <= stats.keys()

    network = out / "network-000000.016.safetensors"
    assert json.loads(read_header(network).metadata["classes"]) == ["cats", "dogs", "owls"]
    assert stylepipe.load_network(network).mapping.class_w_offset.any()
    sample = ["sample", str(network), "--seeds", "0,1", "--trunc", "0.5", "--out"]
    assert main([*sample, str(tmp_path / "all.png"), "--class", "all", "--grid", "2x3"]) == 0
    for row, name in enumerate(COLOURS):
        assert main([*sample, str(tmp_path / "one.png"), "--class", name, "--grid", "2x1"]) == 0
        together = np.asarray(Image.open(tmp_path / "all.png"))[row * RES :][:RES].astype(int)
        # One class alone is another batch, whose sums may round otherwise.
        assert np.abs(together - np.asarray(Image.open(tmp_path / "one.png"))).max() <= 1
    assert main([*sample, str(tmp_path / "towards-all.png"), "--class", "owls", "--trunc-center", "all"]) == 0


def test_vectors_from_photographs_to_pictures(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors_for(photographs)
    assert main(["prepare", str(photographs), str(tmp_path / "shards"), "--res", str(RES), "--labels"]) == 0
    assert "12 images with label vectors at 16 px" in capsys.readouterr().out
    train = ["train", "--data", str(tmp_path / "shards"), *TINY]
    assert main([*train, "--out", str(tmp_path / "run")]) == 0
    network = tmp_path / "run" / "network-000000.016.safetensors"
    assert stylepipe.load_network(network).c_dim == 2
    assert main(["sample", str(network), "--label", "0.3,-1.5", "--seeds", "0", "--out", str(tmp_path / "a")]) == 0
    assert main(["sample", str(network), "--class", "1"]) == 2
    assert "--class 1: this network draws labels of 2 numbers; give them as --label 0.1,-0.7" in capsys.readouterr().err
    for option in (["--network.class-w-avg"], ["--network.d-conditioning", "aux", "--loss.acgan-weight", "1"]):
        assert main([*train, "--out", str(tmp_path / "refused"), *option]) == 2
        assert "the labels of this data are vectors" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_data_without_labels(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(photographs), str(tmp_path / "shards"), "--res", str(RES)]) == 0
    data = {
        "has no labels; prepare it again with --labels": ["--data", str(tmp_path / "shards")],
        "no sub-folders to take labels from": ["--data", str(photographs / "cats")],
        "the built-in faces have no labels": [],
    }
    for message, option in data.items():
        for more in ([], ["--dry-run"]):
            assert main(["train", *TINY, "--out", str(tmp_path / "run"), *option, *more]) == 2
            error = capsys.readouterr().err
            assert message in error
            assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_knows_the_labels_of_photographs(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", str(photographs), "--dry-run", *TINY]) == 0
    assert "D.mapping" in capsys.readouterr().out  # which is there for labels only
