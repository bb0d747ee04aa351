"""The drawn faces as a dataset, or as a folder of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.levels import DatasetWriter, encode_levels, level_resolutions
from stylepipe.datasets.manifest import FileRecord, Manifest
from stylepipe.datasets.photos import encode
from stylepipe.datasets.prepare import tool_versions
from stylepipe.datasets.processes import available_cpus, in_tasks, map_in_order
from stylepipe.datasets.progress import with_progress
from stylepipe.datasets.resuming import new_folder

# Constants, so that the built-in data is the same everywhere; chosen to be drawn within 40 s on two cores.
DRAWN_COUNTS = {8: 4096, 16: 4096, 32: 4096, 64: 4096, 128: 4096, 256: 2048, 512: 1024, 1024: 512}

_FORMAT = "png"
_FACES_PER_TASK = 16


def draw_dataset(
    out: Path,
    *,
    resolution: int,
    count: int,
    seed: int = 0,
    levels: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Draw faces 0..count - 1 of a seed into the new folder `out`, as `prepare` would store them.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    smaller = level_resolutions(resolution) if levels else []
    with new_folder(out) as folder, DatasetWriter(folder, smaller) as writer:
        for face in _drawn(resolution, count, seed, levels, workers, progress):
            writer.add(face)

        def describe(index: FileRecord) -> Manifest:
            options = {"seed": seed}
            return Manifest("drawn", count, resolution, _FORMAT, index, (), options=options, tool=tool_versions())

        return writer.finish(describe)


def draw_folder(
    out: Path, *, resolution: int, count: int, seed: int = 0, workers: int | None = None, progress: bool = True
) -> None:
    """Draw the same faces into a new folder of PNG files, `00000000.png` and so on.

    Raises:
        UserError: `out` exists, or cannot be written.
    """
    with new_folder(out) as folder:
        for index, (face, *_) in enumerate(_drawn(resolution, count, seed, False, workers, progress)):
            (folder / f"{index:08d}.png").write_bytes(face)


def _drawn(
    resolution: int, count: int, seed: int, levels: bool, workers: int | None, progress: bool
) -> Iterator[list[bytes]]:
    draw = partial(_draw, resolution=resolution, seed=seed, levels=levels)
    tasks = in_tasks(count, _FACES_PER_TASK)
    faces = chain.from_iterable(map_in_order(draw, tasks, min(workers or available_cpus(), len(tasks))))
    return with_progress(faces, count, f"drawing faces at {resolution} px", progress)


def _draw(indices: range, *, resolution: int, seed: int, levels: bool) -> list[list[bytes]]:
    """Do one task, in a worker: of each face the full image, then its levels."""
    faces = []
    for index in indices:
        face = draw_face(index, resolution, seed)
        averages = encode_levels(np.asarray(face), _FORMAT) if levels else []
        faces.append([encode(face, _FORMAT), *averages])
    return faces
