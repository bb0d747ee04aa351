"""Measuring a generator: real and generated images to numbers, shared by all processes, whatever the metrics."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from stylepipe.datasets.processes import available_cpus
from stylepipe.datasets.shards import ShardDataset
from stylepipe.datasets.store import RemoteError
from stylepipe.errors import UserError
from stylepipe.metrics.extraction import Counts, Extraction, ImageSource, Rows, SharedRows, Team, Wanted, collect
from stylepipe.metrics.path_length import EPSILON
from stylepipe.metrics.registry import Metric
from stylepipe.metrics.stored_rows import StoredRows, store_rows
from stylepipe.training import activity
from stylepipe.training.distributed import local_processes, on_every_process
from stylepipe.training.exact import full_float32
from stylepipe.training.phase import Generated
from stylepipe.version import code_version

ROWS_VERSION = 2  # of what extractors take of images: raised when any of them changes
REAL_PIXELS = 1 << 22  # at a time, on the device
_ATTEMPTS = 10  # images that cannot be read one after the other


@dataclass(frozen=True)
class Measurement:
    """What a metric says of a generator, with all that moves it.

    Attributes:
        metric: its name.
        results: its numbers by name, the most telling first.
        best: which of that number is better, the lowest or the highest; None if neither is.
        settings: what moves them besides the network; numbers of other settings are not to be compared.
        seconds: that the whole measuring took, of which metrics share most.
    """

    metric: str
    results: Mapping[str, float]
    best: str | None
    settings: Mapping[str, Any]
    seconds: float

    def line(self, images_seen: int | None, network: str) -> dict[str, Any]:
        """Return what metrics.jsonl says of it."""
        return {
            "metric": self.metric,
            "images_seen": images_seen,
            "network": network,
            "results": dict(self.results),
            "best": self.best,
            "settings": dict(self.settings),
            "code": code_version(),
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.results.items())


class MeasuringStoppedError(Exception):
    """A request to stop came while a generator was being measured; it is raised on every process."""


class Evaluation:
    """Measures generators against the images of a dataset; every process takes part.

    Args:
        metrics: what to measure.
        dataset: the real images, at the full resolution.
        accelerator: device and processes.
        cache: stylepipe's cache folder, where what is taken of real images is kept.
        images: how many generated ones to take, in place of each metric's own number.
        skip_bad: where a real image cannot be read, take the next that can.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        dataset: ShardDataset,
        accelerator: Accelerator,
        cache: Path,
        images: int | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.metrics = metrics
        self._dataset, self._accelerator, self._cache = dataset, accelerator, cache
        self._images, self._skip_bad = images, skip_bad
        self._device = accelerator.device
        self._team = Team(accelerator.process_index, accelerator.num_processes)
        self._kept: dict[Path, Rows] = {}  # of real images, in memory where the cache cannot be written
        self._stopping: Callable[[], bool] = lambda: False
        self._stopped = False

    @property
    def names(self) -> str:
        """The metrics, as --metrics has them."""
        return ",".join(metric.name for metric in self.metrics)

    def metrics_at(self, resolution: int) -> list[Metric]:
        """Return those that images of a resolution are large enough for."""
        return [metric for metric in self.metrics if metric.extraction.lowest <= resolution]

    def check(self, resolution: int) -> None:
        """Raise UserError where images of this resolution are too small, or too few, for a metric."""
        for metric in self.metrics:
            if metric.extraction.lowest > resolution:
                raise UserError(f"{metric.name}: expected images of {metric.extraction.lowest} px at least")
            self._counts(metric)

    def measure(self, generated: Generated, stopping: Callable[[], bool] = lambda: False) -> list[Measurement]:
        """Measure a generator by the metrics that its images are large enough for.

        Args:
            generated: its images.
            stopping: is asked before each batch whether this process, perhaps alone, is to leave off.

        Raises:
            MeasuringStoppedError: one of the processes was to leave off.
            UserError: too few images for a metric, or real ones that cannot be read.
        """
        self._stopping, self._stopped = stopping, False
        start = time.perf_counter()
        with full_float32(self._device):
            found = self._found(generated)
        seconds = time.perf_counter() - start
        return [replace(measurement, seconds=seconds) for measurement in found]

    def _found(self, generated: Generated) -> list[Measurement]:
        dataset = self._dataset.level(generated.resolution)
        metrics = self.metrics_at(generated.resolution)
        extractions = {metric.extraction.name: metric.extraction for metric in metrics}
        compared = {metric.extraction.name: metric.extraction for metric in metrics if metric.compares}
        counts = {metric.extraction.name: self._counts(metric) for metric in metrics}
        real = self._real_rows(compared, dataset, generated.seed, counts)
        fake = self._fake_rows(extractions, generated, counts)
        found = []
        for metric in metrics:
            name = metric.extraction.name
            rows = (real[name] if metric.compares else None, fake[name])
            results = on_every_process(self._accelerator, metric.result, *rows, generated.seed, self._team)
            settings: dict[str, Any] = {
                "resolution": generated.resolution,
                "images": counts[name].fake,
                "seed": generated.seed,
                **generated.facts(metric.extraction.paths),
                "features": dict(metric.extraction.facts),
            }
            if metric.compares:
                settings |= {"real_images": counts[name].real, "data": dataset.facts}
            found.append(Measurement(metric.name, results, metric.best, settings, 0.0))
        return found

    def _counts(self, metric: Metric) -> Counts:
        counts = metric.extraction.counts(len(self._dataset), self._images)
        least = max(metric.at_least, 2 * self._team.size)  # pairs for every process
        if counts.fake < least or (metric.compares and counts.real < least):
            real = f"{counts.real} real and " if metric.compares else ""
            raise UserError(f"{metric.name}: {real}{counts.fake} generated images; expected {least} at least")
        return counts

    def _real_rows(
        self, extractions: Mapping[str, Extraction], dataset: ShardDataset, seed: int, counts: Mapping[str, Counts]
    ) -> dict[str, Rows]:
        """Return rows of the real images by extraction, taken now where the cache has none."""
        about = {name: _about(extractions[name], dataset, seed, counts[name].real) for name in sorted(extractions)}
        folders = {name: self._cache / "statistics" / f"{name}-{_digest(facts)}" for name, facts in about.items()}
        missing = []
        for name, folder in folders.items():
            if self._team.all(folder.is_dir(), self._device):
                self._kept[folder] = StoredRows(folder, self._device)
            elif folder not in self._kept:
                missing.append(name)
        if missing:
            real = {name: (extractions[name], counts[name].real) for name in missing}
            wanted = self._wanted(real, dataset.resolution, seed, real=True)
            with ThreadPoolExecutor(max(1, available_cpus() // local_processes()), "decoding") as pool:
                source = _RealImages(dataset, self._skip_bad, pool, self._device)
                batch = min(64, max(2, REAL_PIXELS // dataset.resolution**2))
                taken = self._collect("real images", source, wanted, batch)
            for name, rows in taken.items():
                folder = folders[name]
                if self._accelerator.is_local_main_process:
                    store_rows(folder, rows, about[name])
                else:
                    for part in rows:
                        rows[part]  # takes part in gathering them
                stored = self._team.all(folder.is_dir(), self._device)
                self._kept[folder] = StoredRows(folder, self._device) if stored else rows
        return {name: self._kept[folder] for name, folder in folders.items()}

    def _fake_rows(
        self, extractions: Mapping[str, Extraction], generated: Generated, counts: Mapping[str, Counts]
    ) -> dict[str, Rows]:
        rows: dict[str, Rows] = {}
        for paths, source in ((False, generated.images), (True, partial(generated.paths, epsilon=EPSILON))):
            fake = {name: (e, counts[name].fake) for name, e in extractions.items() if e.paths == paths}
            if fake:
                wanted = self._wanted(fake, generated.resolution, generated.seed, real=False)
                rows |= self._collect("generated images", source, wanted, max(2, generated.batch // 2 * 2))
        return rows

    def _wanted(
        self, of: Mapping[str, tuple[Extraction, int]], resolution: int, seed: int, *, real: bool
    ) -> dict[str, Wanted]:
        def make() -> dict[str, Wanted]:
            return {
                name: Wanted(extraction.extractor(resolution, seed, real, self._device), count)
                for name, (extraction, count) in of.items()
            }

        return on_every_process(self._accelerator, make)

    def _collect(
        self, what: str, source: ImageSource, wanted: Mapping[str, Wanted], batch: int
    ) -> dict[str, SharedRows]:
        shown = partial(self._shown, what)
        take = partial(collect, source, wanted, batch=batch, team=self._team, device=self._device, progress=shown)
        with activity.during(f"measuring {what}", "unlimited" if self._dataset.waits else "working"):
            rows = on_every_process(self._accelerator, take)
        if not self._team.all(not self._stopped, self._device):
            raise MeasuringStoppedError
        return rows

    def _shown(self, what: str, parts: Sequence[list[int]]) -> Iterator[list[int]]:
        """Show a bar while the batches are gone through, on the main process."""
        off = None if self._accelerator.is_main_process else True
        with tqdm(total=sum(map(len, parts)), desc=what, unit="img", disable=off, leave=False) as bar:
            for part in parts:
                self._stopped = self._stopping()
                if self._stopped:
                    return
                activity.get_on()
                yield part
                bar.update(len(part))


class _RealImages:
    """The images of a dataset by number, in its own order, which is a random one."""

    def __init__(self, dataset: ShardDataset, skip_bad: bool, pool: ThreadPoolExecutor, device: torch.device) -> None:
        self._dataset, self._skip_bad, self._pool, self._device = dataset, skip_bad, pool, device

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Return [n, R, R, 3] uint8 on the device."""
        side = self._dataset.resolution
        images = np.empty((len(numbers), side, side, 3), dtype=np.uint8)
        list(self._pool.map(self._read, numbers, images))
        return torch.from_numpy(images).to(self._device)

    def _read(self, number: int, out: NDArray[np.uint8]) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                return self._dataset.read_into((number + attempt) % len(self._dataset), out)
            except RemoteError:
                raise
            except UserError:
                if not self._skip_bad or attempt == _ATTEMPTS - 1:
                    raise
        return None


def _about(extraction: Extraction, dataset: ShardDataset, seed: int, count: int) -> dict[str, Any]:
    """Return all that rows of real images depend on."""
    return {
        "version": ROWS_VERSION,
        "extraction": extraction.name,
        "facts": dict(extraction.facts),
        "resolution": dataset.resolution,
        "seed": seed if extraction.seeded else None,
        "images": count,
        "data": dataset.facts,
    }


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
