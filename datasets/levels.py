"""Smaller copies of a dataset's images, for the low stages of progressive growing.

    OUT/levels/0004/ ... OUT/levels/0128/     for images of 256 px

Each is a prepared dataset of its own: the same images and labels in the same order. An image of a level is the box
average of the full one, as in ProGAN's data (Karras et al. 2018, arXiv:1710.10196), so that training at 8 px never
decodes 1024 px.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from stylepipe.datasets.manifest import LEVEL_OF, FileRecord, Manifest
from stylepipe.datasets.photos import encode
from stylepipe.datasets.processes import available_cpus, in_tasks, map_in_order, task_size
from stylepipe.datasets.progress import with_progress
from stylepipe.datasets.resuming import new_folder
from stylepipe.datasets.shards import LEVELS_FOLDER, ShardDataset, level_folder
from stylepipe.datasets.writer import SHARD_BYTES, ShardWriter, can_resume
from stylepipe.errors import UserError

LOWEST_LEVEL = 4

_LARGEST_RAW = 64  # up to here bare pixels: at most 1.6 times the room of png, and read 7 to 30 times as fast


def level_resolutions(resolution: int, lowest: int = LOWEST_LEVEL) -> list[int]:
    """Return the levels below images of `resolution` px: the powers of two from `lowest` to its half, ascending.

    Raise UserError for a `lowest` that no level has.
    """
    if lowest < LOWEST_LEVEL or lowest & (lowest - 1):
        raise UserError(f"levels from {lowest} px: expected a power of two, {LOWEST_LEVEL} or more")
    return [1 << i for i in range(lowest.bit_length() - 1, resolution.bit_length() - 1)]


def box_averages(pixels: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield an image [R, R, 3] uint8 at each of its levels, ascending: [4, 4, 3] to [R/2, R/2, 3] uint8.

    Each value is the mean of a square of `pixels`, rounded once, halves to even.
    """
    averages = []
    sums = pixels.astype(np.float32)  # exact: the largest is 255 * 256^2 < 2^24
    for side in reversed(level_resolutions(len(pixels))):
        rows = sums[0::2] + sums[1::2]
        sums = rows[:, 0::2] + rows[:, 1::2]
        averages.append(np.rint(sums / (len(pixels) // side) ** 2).astype(np.uint8))
    yield from reversed(averages)


def encode_levels(pixels: npt.NDArray[np.uint8], image_format: str) -> list[bytes]:
    """Return the levels of an image [R, R, 3] uint8, ascending, encoded as `LevelsWriter` stores them."""
    return [
        encode(Image.fromarray(average), level_format(len(average), image_format)) for average in box_averages(pixels)
    ]


def level_format(resolution: int, image_format: str) -> str:
    """Return the format of a level of images in `image_format`: theirs (of kept files png), or bare pixels if small."""
    if resolution <= _LARGEST_RAW:
        return "ppm"
    return "png" if image_format == "keep" else image_format


class DatasetWriter:
    """Writes a dataset into a folder: its images and labels, and their smaller levels if asked for.

    Used as a context manager; `finish` writes the manifests, which declare it whole.

    Attributes:
        full: what writes the images themselves.
    """

    def __init__(
        self,
        folder: Path,
        levels: Sequence[int] = (),
        shard_bytes: int = SHARD_BYTES,
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        self.full = ShardWriter(folder, shard_bytes, resume and resume["full"])
        self._levels = LevelsWriter(folder / LEVELS_FOLDER, levels, shard_bytes, resume and resume["levels"])

    def add(self, images: Sequence[bytes], label: int | npt.NDArray[np.float32] | None = None) -> None:
        """Append one image, as `[full, *encode_levels(...)]`, and its label (see `ShardWriter.add`)."""
        full, *averages = images
        self.full.add(full, label)
        self._levels.add(averages, label)

    def mark(self) -> dict[str, Any]:
        """Bring all that is written to the disk; return what `resume` needs to go on from it."""
        return {"full": self.full.mark(), "levels": self._levels.mark()}

    def finish(self, describe: Callable[[FileRecord], Manifest]) -> Manifest:
        """Close all files and write the manifests; `describe` gives that of the images, from the index's record."""
        manifest = replace(describe(self.full.finish()), shards=tuple(self.full.shards), labels=self.full.labels)
        self._levels.finish(manifest)
        self.full.save_manifest(manifest)
        return manifest

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.full.__exit__(kind, error, at)
        self._levels.__exit__(kind, error, at)


def can_resume_dataset(folder: Path, mark: Mapping[str, Any]) -> bool:
    """Tell whether the files that a mark of `DatasetWriter` speaks of are there, and finished shards as they were."""
    return can_resume(folder, mark["full"]) and all(
        can_resume(folder / LEVELS_FOLDER / level, of_level) for level, of_level in mark["levels"].items()
    )


class LevelsWriter:
    """Writes the levels of a dataset into the folder `levels`; `finish` declares them whole.

    Used as a context manager. Without `resolutions` it does nothing.
    """

    def __init__(
        self,
        levels: Path,
        resolutions: Sequence[int],
        shard_bytes: int = SHARD_BYTES,
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        self._writers: dict[int, ShardWriter] = {}
        for resolution in resolutions:
            folder = level_folder(levels, resolution)
            folder.mkdir(parents=True, exist_ok=resume is not None)
            self._writers[resolution] = ShardWriter(folder, shard_bytes, resume and resume[folder.name])

    def add(self, images: Sequence[bytes], label: int | npt.NDArray[np.float32] | None = None) -> None:
        """Append one image at every level, as from `encode_levels`, and its label (see `ShardWriter.add`)."""
        for writer, image in zip(self._writers.values(), images, strict=True):
            writer.add(image, label)

    def mark(self) -> dict[str, Any]:
        """See `DatasetWriter.mark`."""
        return {f"{resolution:04d}": writer.mark() for resolution, writer in self._writers.items()}

    def finish(self, parent: Manifest) -> None:
        """Close all files and write the manifests: each is that of the full images but for what differs."""
        for resolution, writer in self._writers.items():
            index = writer.finish()
            manifest = replace(
                parent,
                resolution=resolution,
                image_format=level_format(resolution, parent.image_format),
                index=index,
                shards=tuple(writer.shards),
                labels=writer.labels,
                skipped=(),
                options={**parent.options, LEVEL_OF: parent.digest},
            )
            writer.save_manifest(manifest)

    def __enter__(self) -> LevelsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for writer in self._writers.values():
            writer.__exit__(kind, error, at)


def build_levels(dataset: ShardDataset, out: Path, *, workers: int | None = None, progress: bool = True) -> None:
    """Make the levels of a dataset from its own images, in the new folder `out`, which appears when it is whole.

    The result is the same to the byte for any number of workers, and for png what `prepare` writes.

    Args:
        dataset: only read, never changed.
        out: must not exist, or be empty.
        workers: processes; default one per core.
        progress: show a progress bar where stderr is a terminal.

    Raises:
        UserError: an image cannot be read, or `out` cannot be written.
    """
    manifest = dataset.manifest
    average = partial(_average, dataset=dataset)
    tasks = in_tasks(len(dataset), task_size(dataset.resolution))
    averages = chain.from_iterable(map_in_order(average, tasks, min(workers or available_cpus(), len(tasks))))
    images = with_progress(averages, len(dataset), f"averaging {dataset.name} for lower resolutions", progress)
    resolutions = level_resolutions(dataset.resolution)
    shard_bytes = int(manifest.options.get("shard_mb", SHARD_BYTES / 2**20) * 2**20)
    with (
        new_folder(out) as folder,
        LevelsWriter(folder, resolutions, shard_bytes) as writer,
    ):
        for sample, levels in enumerate(images):
            writer.add(levels, dataset.label(sample))
        writer.finish(manifest)


def _average(ids: range, *, dataset: ShardDataset) -> list[list[bytes]]:
    """Do one task, in a worker."""
    return [encode_levels(pixels, dataset.manifest.image_format) for pixels in dataset.read(ids)]
