"""Training data from a server that misbehaves: copied once, whole, or refused with the reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from stylepipe.cli.main import main
from stylepipe.datasets import remote as remote_datasets
from stylepipe.datasets.cache import dataset_for_training, levels_for_training, windowed_for_training
from stylepipe.datasets.fetching import RetryPolicy
from stylepipe.datasets.order import Order
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.reader import Batch, Reader
from stylepipe.datasets.remote import RemoteDataset, is_remote
from stylepipe.datasets.shards import ShardDataset, file_sha256, open_dataset
from stylepipe.datasets.verifying import find_faults
from stylepipe.errors import UserError
from stylepipe.training.grids import real_images

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


# In windows


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Path:
    """Give the folder of a dataset with labels and levels, in at least eight shards."""
    how = Preparation(16, labels=True, levels=True, shard_mb=4096 / 2**20)
    manifest = prepare(photos, tmp_path / "shards", how, workers=1, progress=False)
    assert len(manifest.shards) >= 8
    return tmp_path / "shards"


def largest_window(folder: Path, window: int) -> int:
    return sum(sorted((record.bytes for record in open_dataset(folder).manifest.shards), reverse=True)[:window])


def take(dataset: ShardDataset, images: Order, count: int, **options: Any) -> list[Batch]:
    return list(islice(Reader(dataset, images, batch_size=4, mirror=True, **options), count))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p.images, q.images) and torch.equal(p.labels, q.labels) and torch.equal(p.positions, q.positions)
        for p, q in zip(a, b, strict=True)
    )


def tars(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.tar")}


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_give_the_batches_of_a_local_copy(shards: Path, workers: int) -> None:
    local = open_dataset(shards)
    images = local.order(2, seed=3)
    with serving(shards) as server:
        remote = windowed_for_training(server.url, 16, 2, labels=True, levels=4)
        assert not any(file.endswith(".tar") for file in map(file_of, server.requests)), "nothing is copied yet"
        assert same(take(remote, images, 12, workers=workers), take(local, images, 12))
        assert tars(remote.path) == {record.file for record in local.manifest.shards}
        eight = take(remote.level(8), images, 12, workers=workers)
        assert same(eight, take(local.level(8), images, 12))
        asked = [file for file in map(file_of, server.requests) if file.endswith(".tar")]
        again = windowed_for_training(server.url, 16, 2, labels=True, levels=4)
        assert same(take(again, images, 3), take(local, images, 3))
        assert [file for file in map(file_of, server.requests) if file.endswith(".tar")] == asked, "all of it is here"
    assert len(asked) == len(set(asked)), "each was downloaded once"


def file_of(request: Any) -> str:
    return str(request.path)


@pytest.mark.parametrize("workers", [0, 1])  # what a thread reads ahead is within the next window
def test_a_disk_smaller_than_the_data(shards: Path, workers: int) -> None:
    local = open_dataset(shards)
    limit = 2 * largest_window(shards, 2)
    images = local.order(2, seed=3)
    sizes = {record.file: record.bytes for record in local.manifest.shards}
    with serving(shards) as server:
        remote = windowed_for_training(server.url, 16, 2, limit)
        reader = Reader(remote, images, batch_size=1, workers=workers)
        for batch, expected in islice(zip(reader, Reader(local, images, batch_size=1), strict=True), 60):
            assert torch.equal(batch.images, expected.images)
            there = sum(sizes.get(path.name, 0) for path in remote.path.iterdir())
            assert there <= limit, f"{there:,} bytes"
    assert limit < sum(sizes.values())


def test_training_begins_with_the_first_window_and_the_next_comes_meanwhile(shards: Path) -> None:
    local = open_dataset(shards)
    images = local.order(2, seed=3)
    first, second, third = ({f"shard-{s:05d}.tar" for s in local.shards_of(images.ranges(w))} for w in range(3))
    with serving(shards) as server:
        for file in second:
            server.always[file] = faulty_server.Fault(delay_s=0.05)  # half a second each
        remote = windowed_for_training(server.url, 16, 2)
        batches = iter(Reader(remote, images, batch_size=1))
        next(batches)
        assert tars(remote.path) == first
        wait_for(lambda: tars(remote.path) == first | second)
        for _ in range(sum(map(len, images.ranges(0))) - 1):
            next(batches)
        assert tars(remote.path) == first | second, "two windows at a time"
        next(batches)
        wait_for(lambda: tars(remote.path) == first | second | third)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shard_that_cannot_be_had_stops_with_its_address_even_if_bad_images_are_skipped(shards: Path) -> None:
    with serving(shards) as server:
        server.always["shard-00003.tar"] = faulty_server.Fault(status=404)
        for workers in (0, 2):
            remote = windowed_for_training(server.url, 16, 2)
            with pytest.raises(UserError, match=r"/data/shard-00003\.tar: HTTP 404 Not Found; check the location"):
                take(remote, remote.order(2, 0), 12, skip_bad=True, workers=workers)


def test_an_image_that_cannot_be_read_is_replaced_from_its_window(shards: Path) -> None:
    local = open_dataset(shards)
    row = local._index[9]
    tar = shards / local.manifest.shards[int(row["shard"])].file
    data = bytearray(tar.read_bytes())
    data[int(row["offset"]) + 40] ^= 1
    tar.write_bytes(data)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][int(row["shard"])]["sha256"] = file_sha256(tar)  # as if it was damaged before it was hashed
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with serving(shards) as server:
        remote = windowed_for_training(server.url, 16, 4)
        images = remote.order(4, 0)
        batches = take(remote, images, 6, skip_bad=True)
    assert "sample 00000009 cannot be read" in next(text for batch in batches for text in batch.bad)
    local = open_dataset(shards)
    assert same(batches, take(local, images, 6, skip_bad=True))


@pytest.mark.slow
def test_a_reader_ends_at_once_while_the_server_stalls(shards: Path) -> None:
    local = open_dataset(shards)
    images = local.order(2, seed=3)
    first = {f"shard-{s:05d}.tar" for s in local.shards_of(images.ranges(0))}
    with serving(shards) as server:
        for record in local.manifest.shards:
            if record.file not in first:
                server.always[record.file] = faulty_server.Fault(delay_s=0.5)  # five seconds each
        remote = windowed_for_training(server.url, 16, 2)
        batches = iter(Reader(remote, images, batch_size=1, workers=4))
        next(batches)
        wait_for(lambda: len(server.requests) > len(first) + 3)
        began = time.monotonic()
        batches.close()
        assert time.monotonic() - began < 4, "no download is waited for, not even a piece of one"
        assert not any(name.startswith("decoding") for name in names_of_threads())


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_server_that_is_gone_is_tried_once_for_all_threads(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetryPolicy.__init__, "__defaults__", (3, 0.2, 0.2))
    with serving(shards) as server:
        remote = windowed_for_training(server.url, 16, 16)
        server.requests.clear()
        for record in remote.manifest.shards:
            server.always[record.file] = faulty_server.Fault(status=503)
        with pytest.raises(UserError, match=r"HTTP 503 Service Unavailable \(3 tries"):
            take(remote, remote.order(16, 0), 1, workers=8)
        tries = len(server.requests)
    assert tries <= 3 * 10, "each of nine threads at most one shard's tries"


def test_whole_copies_and_more_levels_are_found(shards: Path) -> None:
    with serving(shards) as server:
        for lowest in (8, 4):
            remote = windowed_for_training(server.url, 16, 2, levels=lowest)
            assert remote.level(lowest).resolution == lowest
        whole = dataset_for_training(server.url, 16, levels=4)
        server.requests.clear()
        again = windowed_for_training(server.url, 16, 2, levels=4)
        assert again.path == whole
        assert [file_of(request) for request in server.requests] == ["/data/manifest.json"]


def test_a_shard_that_is_damaged_in_the_cache_is_downloaded_again(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = open_dataset(shards)
    images = local.order(2, seed=3)
    with serving(shards) as server:
        remote = windowed_for_training(server.url, 16, 2)
        assert same(take(remote, images, 8), take(local, images, 8))
        for tar in remote.path.glob("*.tar"):
            data = bytearray(tar.read_bytes())
            data[600:] = bytes(len(data) - 600)
            tar.write_bytes(data)
        for workers in (0, 3):
            again = windowed_for_training(server.url, 16, 2)
            assert same(take(again, images, 8, workers=workers), take(local, images, 8))
    assert caplog.text.count("is damaged; downloading it again") == len(local.manifest.shards)


def test_what_is_in_the_cache_is_used_while_the_server_is_away(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    local = open_dataset(shards)
    images = local.order(2, seed=3)
    with serving(shards) as server:
        take(windowed_for_training(server.url, 16, 2, levels=8), images, 8)
        whole = dataset_for_training(server.url.replace("/data", "/more/data"), 16)
        server.always["manifest.json"] = faulty_server.Fault(status=503)
        again = windowed_for_training(server.url, 16, 2, levels=8)
        assert same(take(again, images, 8), take(local, images, 8))
        assert dataset_for_training(server.url.replace("/data", "/more/data"), 16) == whole
        assert caplog.text.count("going on with what is in the cache") == 2
        with pytest.raises(UserError, match=r"HTTP 503 .* on a server that can be reached"):
            windowed_for_training(server.url.replace("/data", "/never/seen"), 16, 2)
        server.always["manifest.json"] = faulty_server.Fault(status=404)
        with pytest.raises(UserError, match="HTTP 404"):
            windowed_for_training(server.url, 16, 2, levels=8)


def test_a_smaller_limit_empties_the_cache(shards: Path) -> None:
    local = open_dataset(shards)
    images = local.order(1, seed=3)
    with serving(shards) as server:
        take(windowed_for_training(server.url, 16, 1), images, 8)
        limit = 2 * largest_window(shards, 1)
        remote = windowed_for_training(server.url, 16, 1, limit)
        assert 0 < sum(path.stat().st_size for path in remote.path.glob("*.tar")) <= limit


def test_waiting_for_a_server_is_told_and_can_be_ended(shards: Path) -> None:
    waited: list[float] = []

    def waiting(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            raise InterruptedError

    with serving(shards) as server:
        for record in open_dataset(shards).manifest.shards:
            server.always[record.file] = faulty_server.Fault(delay_s=0.6)
        remote = windowed_for_training(server.url, 16, 2)
        with pytest.raises(InterruptedError):
            take(remote, remote.order(2, 0), 1, workers=1, waiting=waiting)
    assert 0.9 < waited[0] < waited[1]


def test_a_limit_that_holds_all_of_it_is_enough(shards: Path) -> None:
    total = sum(record.bytes for record in open_dataset(shards).manifest.shards)
    with serving(shards) as server:
        windowed_for_training(server.url, 16, 16, total)
        with pytest.raises(UserError, match="two windows of 16 shards"):
            windowed_for_training(server.url, 16, 16, total - 1)


def test_windows_of_more_shards_than_may_be_open_are_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_datasets, "open_files_limit", lambda: 7)
    with serving(shards) as server:
        windowed_for_training(server.url, 16, 1)
        with pytest.raises(UserError, match=r"--data-window 3: .* up to 6, and this process may open 7 .*ulimit -n 24"):
            windowed_for_training(server.url, 16, 3)


def test_a_limit_below_two_windows_is_refused(shards: Path) -> None:
    with serving(shards) as server, pytest.raises(UserError, match=r"--data-cache-gb 1e-06: two windows of 2 shards"):
        windowed_for_training(server.url, 16, 2, 1000)


def test_levels_that_are_not_there_are_told(photos: Path, tmp_path: Path) -> None:
    prepare(photos, tmp_path / "flat", Preparation(16), workers=1, progress=False)
    with serving(tmp_path / "flat") as server:
        remote = windowed_for_training(server.url, 16, 1, levels=8)
        with pytest.raises(UserError, match=r"no images of 8 px .*again with --levels, or .*--data-window 0"):
            remote.level(8)


def test_the_grid_of_real_images_costs_one_shard(shards: Path) -> None:
    local = open_dataset(shards)
    with serving(shards) as server:
        remote = windowed_for_training(server.url, 16, 2, labels=True)
        count = local.manifest.shards[0].samples
        assert (real_images(remote, 15, 8, []) == local.read(range(count))).all()
        rows = real_images(remote, 4, 2, [0, 1]).reshape(2, 4, 16, 16, 3)
        for number in (0, 1):
            ids = [i for i in range(count) if local.label(i) == number][:4]
            assert (rows[number, : len(ids)] == local.read(ids)).all()
            assert not rows[number, len(ids) :].any()
        assert tars(remote.path) == {"shard-00000.tar"}


def test_a_run_on_windows_resumes_to_the_bit_and_grows(shards: Path, tmp_path: Path) -> None:
    small = ["--res", "16", "--batch-size", "8", "--tracker", "none", "--augment", "none", "--preset", "progan"]
    small += ["--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16"]
    small += ["--growth.start-res", "8", "--growth.stable-kimg", "0.024", "--growth.fade-kimg", "0.024"]
    small += ["--growth.batch-sizes", "4:8", "--data-window", "2", "--seed", "1"]
    with serving(shards) as server:
        common = ["train", *small, "--data", server.url, "--data-cache-gb", "0.001"]
        assert main([*common, "--kimg", "0.096", "--out", str(tmp_path / "straight")]) == 0
        for kimg in ("0.04", "0.096"):
            assert main([*common, "--kimg", kimg, "--out", str(tmp_path / "resumed")]) == 0
    local = ["train", *small, "--data", str(shards), "--kimg", "0.096", "--out", str(tmp_path / "local")]
    assert main(local) == 0
    hashes = {file_sha256(tmp_path / run / "state-000000.096" / "state.safetensors") for run in RUNS}
    assert len(hashes) == 1
    state = json.loads((tmp_path / "local" / "state-000000.096" / "state.json").read_text())
    assert state["info"]["data"]["digest"] == open_dataset(shards).manifest.digest


RUNS = ("straight", "resumed", "local")


@pytest.mark.slow
def test_two_real_processes_read_windows_through_one_cache(shards: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    small = ["--res", "16", "--batch-size", "8", "--tracker", "none", "--augment", "none", "--data-window", "2"]
    small += ["--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    states = []
    with serving(shards) as server:
        for data, workers, kimgs in ((server.url, "1", ("0.024", "0.064")), (str(shards), "0", ("0.064",))):
            out = tmp_path / f"run{workers}"
            for kimg in kimgs:  # 64 images are nearly three epochs
                options = ["--data", data, "--workers", workers, "--kimg", kimg, "--out", str(out)]
                command = [*launch, str(TRAIN), *small, *options]
                result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
                assert result.returncode == 0, result.stderr
                assert "2 processes" in result.stdout
            states.append(file_sha256(out / "state-000000.064" / "state.safetensors"))
        asked = [file for file in map(file_of, server.requests) if file.endswith(".tar")]
    assert states[0] == states[1], "remote, stopped and resumed, against local in one piece"
    assert len(asked) == len(set(asked)), "the processes have downloaded each shard once between them"


@pytest.mark.slow
def test_ctrl_c_is_obeyed_while_a_server_stalls(shards: Path, tmp_path: Path) -> None:
    local = open_dataset(shards)
    first = {f"shard-{s:05d}.tar" for s in local.shards_of(local.order(4, 0).ranges(0))} | {"shard-00000.tar"}
    small = ["--res", "16", "--batch-size", "2", "--tracker", "none", "--augment", "none", "--data-window", "4"]
    small += ["--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16"]
    out = tmp_path / "run"
    with serving(shards) as server:
        for record in local.manifest.shards:
            if record.file not in first:
                server.always[record.file] = faulty_server.Fault(stall_after=10)
        options = ["--data", server.url, "--kimg", "1", "--out", str(out)]
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *small, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        told = ""
        while "waiting for data since" not in told:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, told
            told += line
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        server.stopping.set()
    assert process.returncode == 0, told + said
    assert "(Ctrl-C), and saved; to go on from there: " in said
    assert list(out.glob("state-*/state.json")), "what was learnt is saved"


TRAIN = Path(__file__).parents[2] / "launch" / "train.py"


def test_data_that_was_replaced_is_told(
    shards: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--res", "16", "--batch-size", "8", "--tracker", "none", "--augment", "none"]
    small += ["--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16"]
    common = ["train", *small, "--out", str(tmp_path / "run")]
    assert main([*common, "--data", str(shards), "--kimg", "0.008"]) == 0
    (photos / "cats" / "000.png").unlink()
    prepare(photos, tmp_path / "other", Preparation(16, labels=True), workers=1, progress=False)
    capsys.readouterr()
    assert main([*common, "--data", str(tmp_path / "other"), "--kimg", "0.016"]) == 0
    told = capsys.readouterr().out
    digest = open_dataset(shards).manifest.digest[:12]
    assert (
        f"the data is not that of the state: name photos, images 23, digest {digest} -> name photos, images 22" in told
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data-cache-gb", "1"], "--data-cache-gb 1: --data is no location, so nothing is copied; leave it out"),
        (["--data-cache-gb", "0"], "--data-cache-gb 0.0: expected a finite number above 0"),
        (["--data", "pipe:cat x", "--data-window", "0", "--data-cache-gb", "1"], "--data-window 0 copies all of it"),
        (["--data-window", "-1"], "--data-window -1: expected a finite number, 0 or more"),
    ],
)
def test_options_that_nothing_comes_of_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--res", "16", *options]) == 2
    assert message in capsys.readouterr().err
