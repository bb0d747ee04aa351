"""`stylepipe bench data`: how fast a dataset is read, as shares of decoding alone, beside the usual ways."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
import webdataset
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from stylepipe.datasets.decoding import decode_into, decoders
from stylepipe.datasets.reader import Reader
from stylepipe.datasets.shards import ShardDataset, open_dataset
from stylepipe.errors import UserError

_FILES = 256  # images that decoders alone have in memory, and that become files of a temporary folder
_WARM_UP_BATCHES = 2
_TASK_PIXELS = 1 << 22  # of decoders alone: so many at a time that handing over costs nothing


@dataclass(frozen=True)
class Data:
    """Time the reading of a prepared dataset that the page cache holds, against the usual ways, in turns.

    Prints images per second and shares of what the decoders alone do with as many threads: of this package's reader,
    of plain webdataset (shards streamed, shuffled in a buffer), and of a folder of files. Both of these decode with the
    same libraries, in processes of torch's DataLoader.
    """

    folder: tyro.conf.Positional[Path]
    """The dataset."""
    res: int | None = None
    """Read its stored level of this resolution. Default: its own."""
    workers: tuple[int, ...] = (1, 2)
    """Threads or processes that decode."""
    batch_size: int = 16
    """Images per batch."""
    seconds: float = 4
    """Time for each measurement."""
    repeats: int = 3
    """Measurements of each, in turns; the median is printed."""
    json: Path | None = None
    """Also write the figures to this file."""


def bench_data(options: Data) -> dict[str, Any]:
    """Measure, print the table, and return the figures that the JSON file holds.

    Raises:
        UserError: an option that nothing can be measured with, or no dataset.
    """
    if min(options.workers, default=0) < 1 or options.batch_size < 1 or options.seconds <= 0:
        raise UserError("--workers, --batch-size and --seconds: expected 1 or more, 1 or more, and above 0")
    whole = open_dataset(options.folder)
    dataset = whole if options.res is None else whole.level(options.res)
    torch.set_num_threads(1)  # as in a process that trains on a GPU: it decodes on the other cores
    with tempfile.TemporaryDirectory() as folder:
        _write_files(dataset, Path(folder))
        ways: dict[str, Callable[[int], Generator[Any, None, None]]] = {
            "decoders alone": partial(_decoders, dataset, options.batch_size),
            "stylepipe": partial(_stylepipe, dataset, options.batch_size),
            "webdataset": partial(_webdataset, dataset, options.batch_size),
            "folder": partial(_folder, Path(folder), dataset.resolution, options.batch_size),
        }
        rates: dict[tuple[str, int], list[float]] = defaultdict(list)
        total = options.repeats * len(ways) * len(options.workers)
        with tqdm(total=total, unit="measurement", disable=not sys.stderr.isatty()) as bar:
            for _ in range(options.repeats):
                for workers in options.workers:
                    for name, way in ways.items():
                        rates[name, workers].append(_rate(way(workers), options.seconds))
                        bar.update()
    medians = {key: statistics.median(found) for key, found in rates.items()}
    names = ", ".join(f"{kind} by {name}" for kind, name in decoders().items())
    print(f"{dataset.name}, {len(dataset):,} images of {dataset.resolution} px; {names}")
    for workers in options.workers:
        for name in ways:
            share = medians[name, workers] / medians["decoders alone", workers]
            print(f"{workers:>2} x {name:<15} {medians[name, workers]:10.1f} images/s {share:7.1%}")
    return {
        "resolution": dataset.resolution,
        "batch_size": options.batch_size,
        "images_per_second": {f"{workers} x {name}": rate for (name, workers), rate in medians.items()},
    }


def _rate(batches: Generator[Any, None, None], seconds: float) -> float:
    """Return images per second; each item is a batch of images, or how many there were."""
    with closing(batches):
        for _ in range(_WARM_UP_BATCHES):
            next(batches)
        start, images = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds or not images:
            batch = next(batches)
            images += batch if isinstance(batch, int) else len(batch)
    return images / elapsed


def _decoders(dataset: ShardDataset, batch_size: int, threads: int) -> Generator[int, None, None]:
    """Decode images whose files are in memory, into batches that are used again; yield how many at a time."""
    files: list[bytes] = []
    for sample in range(min(len(dataset), _FILES)):
        dataset.visit(sample, files.append)
    batches = np.zeros((2 * threads * batch_size, dataset.resolution, dataset.resolution, 3), dtype=np.uint8)
    in_task = max(1, _TASK_PIXELS // dataset.resolution**2)

    def decode(first: int) -> int:
        for number in range(first, first + in_task):
            decode_into(files[number % len(files)], batches[number % len(batches)])
        return in_task

    with ThreadPoolExecutor(threads) as pool:
        firsts = count(0, in_task)
        under_way = deque(pool.submit(decode, first) for first in islice(firsts, 2 * threads))
        try:
            while True:
                yield under_way.popleft().result()
                under_way.append(pool.submit(decode, next(firsts)))
        finally:
            pool.shutdown(cancel_futures=True)


def _stylepipe(dataset: ShardDataset, batch_size: int, workers: int) -> Generator[torch.Tensor, None, None]:
    with closing(iter(Reader(dataset, dataset.order(0, 0), batch_size=batch_size, workers=workers))) as batches:
        for batch in batches:
            yield batch.images


def _webdataset(dataset: ShardDataset, batch_size: int, workers: int) -> Generator[torch.Tensor, None, None]:
    shards = [str(dataset.path / record.file) for record in dataset.manifest.shards]
    samples = webdataset.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(1000)
    images = samples.map(partial(_decoded_sample, resolution=dataset.resolution))
    yield from DataLoader(images, batch_size=batch_size, num_workers=workers)


def _folder(folder: Path, resolution: int, batch_size: int, workers: int) -> Generator[torch.Tensor, None, None]:
    images = _Folder(sorted(folder.iterdir()), resolution)
    order = RandomSampler(images, replacement=True, num_samples=sys.maxsize)
    yield from DataLoader(images, batch_size=batch_size, sampler=order, num_workers=workers)


class _Folder(Dataset[torch.Tensor]):
    """Files of images, as the usual data set over a folder has them."""

    def __init__(self, files: list[Path], resolution: int) -> None:
        self._files, self._resolution = files, resolution

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return _decoded(self._files[index].read_bytes(), self._resolution)


def _write_files(dataset: ShardDataset, folder: Path) -> None:
    for sample in range(min(len(dataset), _FILES)):
        dataset.visit(sample, (folder / f"{sample:08d}").write_bytes)


def _decoded_sample(sample: dict[str, Any], resolution: int) -> torch.Tensor:
    return _decoded(next(sample[suffix] for suffix in ("jpg", "png", "ppm") if suffix in sample), resolution)


def _decoded(data: bytes, resolution: int) -> torch.Tensor:
    out = np.empty((resolution, resolution, 3), dtype=np.uint8)
    decode_into(data, out)
    return torch.from_numpy(out)
