"""Batches in page-locked memory: written by threads, copied while the device works, and never overwritten too soon."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from stylepipe.datasets.drawn_dataset import draw_dataset
from stylepipe.datasets.reader import Reader
from stylepipe.datasets.shards import open_dataset

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_batches_arrive_whole_while_the_device_is_behind(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "faces", resolution=64, count=48, workers=2, progress=False)
    dataset = open_dataset(tmp_path / "faces")
    options = {"batch_size": 16, "mirror": True}
    order = dataset.order(0, 0)
    expected = [batch.shown_on(CPU) for batch in islice(Reader(dataset, order, **options), 40)]
    busy = torch.randn(4096, 4096, device=GPU)
    arrived = []
    for batch in islice(Reader(dataset, order, workers=4, device=GPU, **options), 40):
        assert batch.images.is_pinned()
        assert batch.labels.is_pinned()
        for _ in range(4):
            busy = busy @ busy  # the copies queue up behind this
            busy /= busy.norm()
        arrived.append(batch.shown_on(GPU))
        del batch
    torch.cuda.synchronize()
    for found, image in zip(arrived, expected, strict=True):
        assert torch.equal(found.cpu(), image)


def test_handing_a_batch_over_does_not_wait_for_the_device(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "faces", resolution=64, count=48, workers=2, progress=False)
    dataset = open_dataset(tmp_path / "faces")
    batches = iter(Reader(dataset, dataset.order(0, 0), batch_size=16, mirror=True, workers=2, device=GPU))
    next(batches).shown_on(GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            next(batches).shown_on(GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
