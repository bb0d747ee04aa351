"""Batches for training: the same stream for any number of ranks and workers, and threads that end in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from stylepipe.datasets import order
from stylepipe.datasets.order import GlobalOrder, Order, WindowOrder
from stylepipe.datasets.reader import Batch, Reader
from stylepipe.datasets.shards import ShardDataset, open_dataset
from stylepipe.errors import UserError


def over_all(dataset: ShardDataset, seed: int = 0) -> Order:
    return GlobalOrder(len(dataset), seed)


def in_windows(dataset: ShardDataset, seed: int = 0) -> Order:
    return WindowOrder([record.samples for record in dataset.manifest.shards], 1, seed)


def read(dataset: ShardDataset, images: Order | None = None, **options: object) -> Reader:
    return Reader(dataset, images or over_all(dataset), **options)  # type: ignore[arg-type]


def take(count: int, dataset: ShardDataset, images: Order | None = None, **options: object) -> list[Batch]:
    return list(islice(read(dataset, images, **options), count))


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        p.bad == q.bad and all(torch.equal(x, y) for x, y in zip(tensors(p), tensors(q), strict=True))
        for p, q in zip(a, b, strict=True)
    )


def tensors(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch.images, batch.labels, batch.positions, *([] if batch.mirrored is None else [batch.mirrored])


@pytest.mark.parametrize("kind", [over_all, in_windows])
def test_a_batch_holds_what_the_order_says(dataset: ShardDataset, kind: Callable[..., Order]) -> None:
    images_in_order = kind(dataset, seed=4)
    batches = take(9, dataset, images_in_order, batch_size=8, start=40)
    positions = np.arange(40, 40 + 9 * 8)
    ids = images_in_order.ids(positions)
    images, labels, found = (torch.cat(part) for part in zip(*map(tensors, batches), strict=True))
    assert (images.dtype, labels.dtype, found.dtype) == (torch.uint8, torch.float32, torch.int64)
    assert (found.numpy() == positions).all()
    assert (images.numpy() == dataset.read(ids)).all()
    assert (labels.numpy() == dataset.labels(ids)).all()


def test_mirroring_follows_the_position(dataset: ShardDataset) -> None:
    cpu = torch.device("cpu")
    plain, mirrored = (take(4, dataset, batch_size=16, mirror=mirror)[2].shown_on(cpu) for mirror in (False, True))
    flipped = torch.from_numpy(order.flips(np.arange(32, 48), seed=0))
    assert 0 < flipped.sum() < 16
    assert torch.equal(mirrored[flipped], plain[flipped].flip(2))
    assert torch.equal(mirrored[~flipped], plain[~flipped])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_stream_of_one(dataset: ShardDataset, world_size: int) -> None:
    options = {"images": over_all(dataset, 2), "batch_size": 8, "mirror": True, "start": 16}
    whole = take(6, dataset, **options)
    shares = [take(6, dataset, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        parts = zip(*(tensors(share[step]) for share in shares), strict=True)
        for part, reference in zip(parts, tensors(batch), strict=True):
            assert torch.equal(torch.stack(part, dim=1).flatten(0, 1), reference)


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("kind", [over_all, in_windows])
def test_workers_do_not_change_the_stream(dataset: ShardDataset, kind: Callable[..., Order], workers: int) -> None:
    options = {"images": kind(dataset), "batch_size": 4, "mirror": True, "start": 12}
    assert equal(take(13, dataset, workers=workers, **options), take(13, dataset, **options))


def test_resuming_goes_on_where_the_stream_was(dataset: ShardDataset) -> None:
    assert equal(take(5, dataset, batch_size=8, start=24), take(8, dataset, batch_size=8)[3:])


def test_reading_leaves_the_randomness_of_the_training_alone(dataset: ShardDataset) -> None:
    before = torch.get_rng_state()
    take(2, dataset, batch_size=4)
    take(2, dataset, batch_size=4, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_does_not_divide_is_refused(dataset: ShardDataset) -> None:
    with pytest.raises(UserError, match=r"--batch-size 6: expected a multiple of 4"):
        read(dataset, batch_size=6, world_size=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_gives_one_message(prepared: Path, dataset: ShardDataset, workers: int) -> None:
    shard = prepared / "shard-00000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match=r"shard-00000\.tar: sample \d{8} cannot be read") as error:
        take(23, dataset, batch_size=1, workers=workers)
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decoding")]


def test_threads_end_with_the_iteration(dataset: ShardDataset) -> None:
    batches = iter(read(dataset, batch_size=4, workers=3))
    next(batches)
    assert 0 < len(decoding_threads()) <= 3
    del batches
    assert decoding_threads() == []


def test_batches_are_decoded_ahead_and_not_without_end(dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    read_into = ShardDataset.read_into

    def noting(self: ShardDataset, sample: int, out: np.ndarray) -> None:
        decoded.append(sample)
        read_into(self, sample, out)

    monkeypatch.setattr(ShardDataset, "read_into", noting)
    batches = iter(read(dataset, batch_size=4, workers=2))
    next(batches)
    deadline = time.monotonic() + 10
    while len(decoded) < 24 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(decoded) == 24  # a batch is one task, two for each thread and two more are under way


def test_batches_are_not_written_to_again(dataset: ShardDataset) -> None:
    batches = iter(read(dataset, batch_size=4, workers=2))
    kept = [next(batches) for _ in range(12)]
    copies = [batch.images.clone() for batch in kept]
    for _ in range(12):
        next(batches)
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))


def damaged(dataset: ShardDataset, samples: list[int]) -> ShardDataset:
    for sample in samples:
        row = dataset._index[sample]
        shard = dataset.path / dataset.manifest.shards[int(row["shard"])].file
        data = bytearray(shard.read_bytes())
        data[int(row["offset"]) + 40] ^= 1
        shard.write_bytes(data)
    dataset.close()
    return open_dataset(dataset.path)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_replaced_alike_on_any_number_of_processes(dataset: ShardDataset, workers: int) -> None:
    """23 images, two of them damaged: 46 positions are two epochs, so four places have another image."""
    whole = {i: dataset.read([i])[0].tobytes() for i in range(23)}
    labels = {i: dataset.labels([i])[0].tolist() for i in range(23)}
    dataset = damaged(dataset, [4, 9])
    streams = []
    for world_size in (1, 2):
        seen: dict[int, tuple[bytes, list[float]]] = {}
        told: list[str] = []
        for rank in range(world_size):
            batches = read(dataset, batch_size=2, rank=rank, world_size=world_size, skip_bad=True, workers=workers)
            for batch in islice(batches, 23):
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
    later = read(dataset, batch_size=2, start=20, skip_bad=True, workers=workers)
    for batch in islice(later, 5):
        for image, position in zip(batch.images, batch.positions, strict=True):
            assert image.numpy().tobytes() == streams[0][int(position)][0]


def test_data_of_which_nothing_can_be_read_stops(dataset: ShardDataset) -> None:
    dataset = damaged(dataset, list(range(23)))
    with pytest.raises(UserError, match=r"10 images in a row cannot be read, the last: .*not those that were stored"):
        next(iter(read(dataset, batch_size=2, skip_bad=True)))
