"""Measuring networks as a user does it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stylepipe.cli.main import main
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.shards import ShardDataset
from stylepipe.interop.network_file import load_network, save_network

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--res", "16", "--batch-size", "8", "--tracker", "none", "--ema.kimg", "0"),
    *("--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16", "--network.w-dim", "16"),
]
LOCAL = "swd,msssim,fd-random,pr-random"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLEPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory, cache) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(24):
        draw_face(index, 32).save(folder / f"{index:02d}.png")
    out = tmp_path_factory.mktemp("prepared") / "faces16"
    prepare(folder, out, Preparation(16), workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def network(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    more = ["--metrics", LOCAL, "--metrics-images", "50", "--kimg", "0.016"]
    assert main(["train", "--data", str(shards), "--out", str(out), *TINY, *more]) == 0
    return out / "network-000000.016.safetensors"


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_tells_and_keeps_what_training_measured_with_all_that_moves_it(network, shards, tmp_path, capsys):
    out = tmp_path / "found.jsonl"
    again = ["evaluate", str(network), "--data", str(shards), "--metrics", LOCAL, "--images", "50", "--batch", "8"]
    assert main([*again, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "network-000000.016.safetensors: swd " in said
    assert "(24 images)" in said
    assert "(50 images)" in said
    found, trained = lines_of(out), lines_of(network.parent / "metrics.jsonl")
    assert [line["metric"] for line in found] == LOCAL.split(",")
    for ours, theirs in zip(found, trained, strict=True):
        assert ours["results"] == pytest.approx(theirs["results"], rel=1e-4)
        assert ours["settings"] == theirs["settings"]
        assert ours["images_seen"] == 16
    settings = found[2]["settings"]
    assert settings["images"] == 50
    assert settings["real_images"] == 24
    assert settings["data"]["digest"]
    assert settings["features"]["sha256"]
    assert settings["features"]["resize"]
    assert settings["truncation_psi"] == 1
    assert found[2]["code"].startswith("0.1")
    assert len(found[2]["network_sha256"]) == 64


def test_what_is_taken_of_real_images_is_taken_once(network, shards, tmp_path, monkeypatch):
    again = ["evaluate", str(network), "--data", str(shards), "--metrics", LOCAL, "--out", str(tmp_path / "a.jsonl")]
    assert main([*again, "--images", "50"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ShardDataset, "read_into", lambda *_: pytest.fail("read again"))
        assert main([*again, "--images", "50"]) == 0
    first, second = lines_of(tmp_path / "a.jsonl")[:4], lines_of(tmp_path / "a.jsonl")[4:]
    assert [line["results"] for line in first] == [line["results"] for line in second]


@pytest.mark.slow
def test_two_processes_measure_as_one(network, shards, tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), str(network), "--data", str(shards), "--metrics"]
    command += [f"{LOCAL},kid-random,dc-random", "--images", "51", "--batch", "4"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    for world_size, name in ((1, "one"), (2, "two")):
        # The cache would hide how real images are shared.
        common = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        common |= {"STYLEPIPE_CACHE": str(tmp_path / name)}
        if world_size > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
        processes = []
        for rank in range(world_size):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            more = ["--out", str(tmp_path / f"{name}.jsonl")]
            processes.append(subprocess.Popen([*command, *more], env=common | ranks, stderr=subprocess.PIPE, text=True))
        for process in processes:
            _, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr
    one, two = (lines_of(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 6, "the main process writes for both"
    for single, shared in zip(one, two, strict=True):
        assert shared["results"] == pytest.approx(single["results"], rel=1e-6, abs=1e-9), single["metric"]
        assert shared["settings"] == single["settings"]


def test_truncation_is_another_setting(network, shards, tmp_path, capsys):
    out = tmp_path / "found.jsonl"
    command = ["evaluate", str(network), "--data", str(shards), "--out", str(out)]
    assert main([*command, "--trunc", "0"]) == 0
    assert main(command) == 0
    average, whole = lines_of(out)
    assert average["settings"]["truncation_psi"] == 0
    assert average["results"]["swd"] != whole["results"]["swd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "fids"], "--metrics fids: 'fids' found, did you mean fid?"),
        (["--metrics", "none"], "--metrics none: nothing to measure"),
        (["--images", "1"], "--images 1: expected at least 2"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--data", "stream:faces.tar"], "a stream has no fixed images to compare with; prepare it first"),
        (["--data", "nowhere"], "nowhere: no such"),
        (["--out", "/dev/null/x"], "/dev/null/x: cannot be written"),
        (["--metrics", "fid"], "weights-inception-2015-12-05-6726825d.pth is not here: put the file from https://"),
        (["--metrics", "ppl"], "weights-vgg16-lpips.pth is not here"),
        (["--metrics", "fd-dinov2"], "dinov2_vitl14_pretrain.pth is not here"),
    ],
)
def test_mistakes_get_one_sentence(network, shards, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setenv("STYLEPIPE_WEIGHTS", str(tmp_path))
    defaults = {"--data": str(shards), "--out": str(tmp_path / "out.jsonl")} | dict([options])
    assert main(["evaluate", str(network), *(text for pair in defaults.items() for text in pair)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_discriminator_and_another_resolution_are_refused(network, shards, tmp_path, capsys):
    save_network(tmp_path / "d.safetensors", load_network(network, name="D"))
    assert main(["evaluate", str(tmp_path / "d.safetensors"), "--data", str(shards)]) == 2
    assert "holds a stylegan2.Discriminator; expected a generator" in capsys.readouterr().err
    other = tmp_path / "faces32"
    prepare(_photographs(tmp_path), other, Preparation(32), workers=1, progress=False)
    capsys.readouterr()
    assert main(["evaluate", str(network), "--data", str(other)]) == 2
    assert "holds no images of 16 px; prepare the photographs again with --levels" in capsys.readouterr().err


def test_a_level_of_prepared_data_will_do(network, tmp_path):
    prepare(_photographs(tmp_path), tmp_path / "faces32", Preparation(32, levels=True), workers=1, progress=False)
    out = ["--out", str(tmp_path / "found.jsonl")]
    assert main(["evaluate", str(network), "--data", str(tmp_path / "faces32"), *out]) == 0
    (found,) = lines_of(tmp_path / "found.jsonl")
    assert found["settings"]["resolution"] == 16
    assert found["settings"]["images"] == 4


def _photographs(tmp_path: Path) -> Path:
    (tmp_path / "photographs").mkdir()
    for index in range(4):
        draw_face(index, 32).save(tmp_path / "photographs" / f"{index}.png")
    return tmp_path / "photographs"
