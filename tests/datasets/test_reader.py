"""Batches for training: the same stream for any number of ranks and workers, and workers that end in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from stylepipe.datasets import order, reader
from stylepipe.datasets.reader import Batch, Reader
from stylepipe.datasets.shards import ShardDataset, open_dataset
from stylepipe.errors import UserError


def take(count: int, *args: object, **options: object) -> list[Batch]:
    return list(islice(Reader(*args, **options), count))  # type: ignore[arg-type]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        p.bad == q.bad and all(torch.equal(x, y) for x, y in zip(tensors(p), tensors(q), strict=True))
        for p, q in zip(a, b, strict=True)
    )


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.images, batch.labels, batch.positions


def test_a_batch_holds_what_the_order_says(dataset: ShardDataset) -> None:
    batches = take(9, dataset, batch_size=8, seed=4, start=40)
    positions = np.arange(40, 40 + 9 * 8)
    ids = order.image_ids(positions, 23, seed=4)
    images, labels, found = (torch.cat(part) for part in zip(*map(tensors, batches), strict=True))
    assert (images.dtype, labels.dtype, found.dtype) == (torch.uint8, torch.float32, torch.int64)
    assert (found.numpy() == positions).all()
    assert (images.numpy() == dataset.read(ids)).all()
    assert (labels.numpy() == dataset.labels(ids)).all()


def test_mirroring_follows_the_position(dataset: ShardDataset) -> None:
    plain, mirrored = (take(4, dataset, batch_size=16, mirror=mirror)[2].images for mirror in (False, True))
    flipped = torch.from_numpy(order.flips(np.arange(32, 48), seed=0))
    assert 0 < flipped.sum() < 16
    assert torch.equal(mirrored[flipped], plain[flipped].flip(2))
    assert torch.equal(mirrored[~flipped], plain[~flipped])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_stream_of_one(dataset: ShardDataset, world_size: int) -> None:
    options = {"batch_size": 8, "mirror": True, "seed": 2, "start": 16}
    whole = take(6, dataset, **options)
    shares = [take(6, dataset, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = zip(*(tensors(share[step]) for share in shares), strict=True)
        for part, reference in zip(parts, tensors(batch), strict=True):
            assert torch.equal(torch.stack(part, dim=1).flatten(0, 1), reference)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_the_stream(dataset: ShardDataset, num_workers: int) -> None:
    options = {"batch_size": 4, "mirror": True, "start": 12}
    assert equal(take(13, dataset, num_workers=num_workers, **options), take(13, dataset, **options))


def test_resuming_goes_on_where_the_stream_was(dataset: ShardDataset) -> None:
    assert equal(take(5, dataset, batch_size=8, start=24), take(8, dataset, batch_size=8)[3:])


def test_reading_leaves_the_randomness_of_the_training_alone(dataset: ShardDataset) -> None:
    before = torch.get_rng_state()
    take(2, dataset, batch_size=4)
    take(2, dataset, batch_size=4, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_does_not_divide_is_refused(dataset: ShardDataset) -> None:
    with pytest.raises(UserError, match=r"--batch-size 6: expected a multiple of 4"):
        Reader(dataset, batch_size=6, world_size=4)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_sample_gives_one_message(prepared: Path, dataset: ShardDataset, num_workers: int) -> None:
    shard = prepared / "shard-00000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"shard-00000\.tar: sample \d{8} cannot be read") as error:
        take(23, dataset, batch_size=1, num_workers=num_workers)
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)


def test_too_little_shared_memory_is_told_before(dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    little = os.statvfs_result((4096, 4096, 16384, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(reader.os, "statvfs", lambda path: little)
    with pytest.raises(UserError, match=r"/dev/shm has 0 MiB free.*--shm-size"):
        Reader(dataset, batch_size=8, num_workers=1)
    Reader(dataset, batch_size=8, num_workers=0)


def running_workers(of: int) -> list[psutil.Process]:
    """Return the data workers below a process: the children of its fork server."""
    return [worker for server in psutil.Process(of).children() for worker in server.children()]


@pytest.fixture
def stream(dataset: ShardDataset) -> Iterator[Iterator[Batch]]:
    """Give a running stream of two workers."""
    batches = iter(Reader(dataset, batch_size=4, num_workers=2))
    next(batches)
    yield batches
    del batches


def test_workers_outlive_the_signals_of_a_job(stream: Iterator[Batch]) -> None:
    servers = psutil.Process().children()
    workers = running_workers(os.getpid())
    assert len(workers) == 2
    for process in (*workers, *(server for server in servers if server.children())):
        process.send_signal(signal.SIGINT)
    # From another process: SIGTERM of the parent itself ends a worker, as torch and multiprocessing rely on.
    pids = " ".join(str(process.pid) for process in (*workers, *(server for server in servers if server.children())))
    subprocess.run(["sh", "-c", f"kill -TERM {pids}"], check=True)
    positions = [next(stream).positions[0].item() for _ in range(20)]
    assert positions == list(range(4, 84, 4))
    assert running_workers(os.getpid()) == workers


def test_a_worker_that_is_killed_gives_one_message(stream: Iterator[Batch]) -> None:
    for worker in running_workers(os.getpid()):
        worker.kill()
    with pytest.raises(UserError, match="most likely for want of memory; use fewer than 2 workers"):
        list(islice(stream, 20))


def test_the_parent_can_end_a_worker(stream: Iterator[Batch]) -> None:
    for process in active_children():
        process.terminate()
        process.join(10)
        assert not process.is_alive()


SCRIPT = """
import sys, time
from stylepipe.datasets.reader import Reader
from stylepipe.datasets.shards import open_dataset

if __name__ == "__main__":
    batches = iter(Reader(open_dataset(sys.argv[1]), batch_size=4, num_workers=2))
    next(batches)
    print("reading", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("ends_by", ["SIGKILL", "return"])
def test_workers_die_with_their_parent(prepared: Path, tmp_path: Path, ends_by: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    seconds = "0" if ends_by == "return" else "60"
    command = [sys.executable, str(tmp_path / "script.py"), str(prepared), seconds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        assert parent.stdout.readline() == "reading\n"
        descendants = psutil.Process(parent.pid).children(recursive=True) if ends_by == "SIGKILL" else []
        if ends_by == "SIGKILL":
            assert len(descendants) >= 3  # a fork server, two workers
            parent.kill()
        errors = parent.stderr.read()
        assert parent.wait(timeout=20) == (-signal.SIGKILL if ends_by == "SIGKILL" else 0)
    if ends_by == "return":
        assert errors == ""  # killed, Python's own resource tracker speaks of what it cleans up
    deadline = time.monotonic() + 10
    while any(map(is_alive, descendants)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, descendants))


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # an orphan's entry stays where nobody reaps it
    except psutil.NoSuchProcess:
        return False


def damaged(dataset: ShardDataset, samples: list[int]) -> ShardDataset:
    for sample in samples:
        row = dataset._index[sample]
        shard = dataset.path / dataset.manifest.shards[int(row["shard"])].file
        data = bytearray(shard.read_bytes())
        data[int(row["offset"]) + 40] ^= 1
        shard.write_bytes(data)
    dataset.close()
    return open_dataset(dataset.path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_read_is_replaced_alike_on_any_number_of_processes(
    dataset: ShardDataset, num_workers: int
) -> None:
    """23 images, two of them damaged: 46 positions are two epochs, so four places have another image."""
    whole = {i: dataset.read([i])[0].tobytes() for i in range(23)}
    labels = {i: dataset.labels([i])[0].tolist() for i in range(23)}
    dataset = damaged(dataset, [4, 9])
    streams = []
    for world_size in (1, 2):
        seen: dict[int, tuple[bytes, list[float]]] = {}
        told: list[str] = []
        for rank in range(world_size):
            reader = Reader(
                dataset, batch_size=2, rank=rank, world_size=world_size, skip_bad=True, num_workers=num_workers
            )
            for batch in islice(reader, 23):
                told += batch.bad
                for image, label, position in zip(batch.images, batch.labels, batch.positions, strict=True):
                    seen[int(position)] = (image.numpy().tobytes(), label.tolist())
        streams.append(seen)
        assert len(told) == 4
        assert all("sample 00000004" in text or "sample 00000009" in text for text in told)
    assert streams[0] == streams[1]
    ids = order.image_ids(np.arange(46), 23, 0)
    numbers = {image: number for number, image in whole.items()}
    for position, (image, label) in streams[0].items():
        number = numbers[image]
        assert labels[number] == label
        assert (number == ids[position]) == (ids[position] not in (4, 9))
        assert number not in (4, 9)
    later = Reader(dataset, batch_size=2, start=20, skip_bad=True, num_workers=num_workers)
    for batch in islice(later, 5):
        for image, position in zip(batch.images, batch.positions, strict=True):
            assert image.numpy().tobytes() == streams[0][int(position)][0]


def test_data_of_which_nothing_can_be_read_stops(dataset: ShardDataset) -> None:
    dataset = damaged(dataset, list(range(23)))
    with pytest.raises(UserError, match=r"10 images in a row cannot be read, the last: .*not those that were stored"):
        next(iter(Reader(dataset, batch_size=2, skip_bad=True)))
