"""Training data from a server that misbehaves: copied once, whole, or refused with the reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stylepipe.cli.main import main
from stylepipe.datasets.cache import dataset_for_training, levels_for_training
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.remote import RemoteDataset, is_remote
from stylepipe.datasets.shards import open_dataset
from stylepipe.datasets.verifying import find_faults
from stylepipe.errors import UserError

faulty_server = pytest.importorskip("faulty_server")
pytest.importorskip("aiohttp")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEPIPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def served(photos: Path, tmp_path: Path) -> Path:
    """Give the folder of a dataset with labels and levels, in several shards."""
    how = Preparation(16, labels=True, levels=True, shard_mb=8192 / 2**20)
    prepare(photos, tmp_path / "served", how, workers=1, progress=False)
    return tmp_path / "served"


@contextmanager
def serving(folder: Path) -> Iterator[Any]:
    """Serve a folder; ends with its server."""
    with faulty_server.FaultyServer() as server:
        for path in folder.rglob("*"):
            if path.is_file():
                server.files[path.relative_to(folder).as_posix()] = path.read_bytes()
        yield server


def pipe(folder: Path) -> str:
    return f"pipe:cat {folder}/{{}}"


def test_what_is_a_location() -> None:
    for location in ("https://h/d", "s3://b/d", "hf://datasets/u/n", "pipe:cat /x/{}"):
        assert is_remote(location)
    for path in ("faces", "/data/faces", Path("a/b"), "C:/x"):
        assert not is_remote(path)


def test_a_copy_is_made_once_and_is_whole(served: Path) -> None:
    first = dataset_for_training(pipe(served), 16, labels=True, levels=4)
    assert find_faults(first, workers=1, progress=False) == []
    copy, original = open_dataset(first), open_dataset(served)
    assert copy.manifest == original.manifest
    assert (copy.read(range(23)) == original.read(range(23))).all()
    assert levels_for_training(first, 4) == first / "levels"
    written = (first / "manifest.json").stat().st_mtime_ns
    assert dataset_for_training(pipe(served), 16, labels=True, levels=4) == first
    assert (first / "manifest.json").stat().st_mtime_ns == written


def test_without_growing_no_level_is_copied_and_missing_ones_are_made_here(served: Path, photos: Path) -> None:
    assert not (dataset_for_training(pipe(served), 16) / "levels").exists()
    prepare(photos, served.with_name("flat"), Preparation(16), workers=1, progress=False)
    with serving(served.with_name("flat")) as server:
        path = dataset_for_training(server.url, 16, levels=4)
    assert levels_for_training(path, 4, workers=1) != path / "levels"


def test_a_server_that_cuts_refuses_and_comes_back_costs_nothing(served: Path) -> None:
    with serving(served) as server:
        server.plan("shard-00000.tar", faulty_server.Fault(cut_after=100), faulty_server.Fault(status=503))
        server.plan("index.npy", faulty_server.Fault(cut_after=10))
        path = dataset_for_training(server.url, 16, levels=4)
    assert find_faults(path, workers=1, progress=False) == []
    assert open_dataset(path).manifest == open_dataset(served).manifest


def test_a_shard_that_is_gone_is_named_and_the_rest_kept_for_another_time(served: Path, tmp_path: Path) -> None:
    with serving(served) as server:
        del server.files["shard-00001.tar"]
        with pytest.raises(UserError, match=r"/data/shard-00001\.tar: .*404"):
            dataset_for_training(server.url, 16)
        server.files["shard-00001.tar"] = (served / "shard-00001.tar").read_bytes()
        server.requests.clear()
        path = dataset_for_training(server.url, 16)
        assert not server.ranges("shard-00000.tar"), "it is here already"
    assert find_faults(path, workers=1, progress=False) == []


@pytest.mark.parametrize(
    ("resolution", "labels", "message"),
    [(32, False, "holds images of 16 px, and 32 px are asked for; use --res 16"), (16, True, "has no labels")],
)
def test_data_that_does_not_fit_is_refused_before_it_is_copied(
    photos: Path, tmp_path: Path, resolution: int, labels: bool, message: str
) -> None:
    prepare(photos, tmp_path / "plain", Preparation(16), workers=1, progress=False)
    with pytest.raises(UserError, match=message):
        dataset_for_training(pipe(tmp_path / "plain"), resolution, labels=labels)
    assert not (tmp_path / "cache").exists()


def test_what_holds_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a dataset that `stylepipe prepare` made at --data"):
        RemoteDataset(pipe(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not the manifest of a dataset"):
        RemoteDataset(pipe(tmp_path))


def test_training_on_remote_data(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", pipe(served), "--res", "16", "--batch-size", "8", "--tracker", "none", "--kimg", "0.016"]
    small = ["--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16"]
    assert main(["train", *options, *small, "--cond", "--dry-run"]) == 0
    assert main(["train", *options, *small, "--cond", "--out", str(tmp_path / "run")]) == 0
    assert "photos (23 images)" in capsys.readouterr().out


def test_several_processes_download_once(served: Path, tmp_path: Path) -> None:
    counted = f"pipe:echo x >> {tmp_path}/count; cat {served}/{{}}"
    script = f"from stylepipe.datasets.cache import dataset_for_training; print(dataset_for_training({counted!r}, 16))"
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0] for process in processes}
    assert len(paths) == 1
    files = len(list(open_dataset(served).manifest.files()))
    assert (tmp_path / "count").read_text().count("x") == files + 3, "each reads the manifest, one the rest"
