"""From a folder of photographs to a prepared dataset.

The folder is walked and sorted first; worker processes decode, crop, resize and encode; this process writes what they
return, in order. So the dataset is the same to the byte for any number of workers.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import PIL

from stylepipe.config import MAX_RES, MIN_RES
from stylepipe.datasets.labels import Labels, find_labels
from stylepipe.datasets.levels import LevelsWriter, encode_levels, level_resolutions
from stylepipe.datasets.manifest import Manifest, Skipped
from stylepipe.datasets.photos import SkippedPhotoError, encode, printable, read_square
from stylepipe.datasets.processes import available_cpus, in_tasks, map_in_order, task_size
from stylepipe.datasets.progress import with_progress
from stylepipe.datasets.shards import FOREIGN_TARS, LEVELS_FOLDER, is_prepared
from stylepipe.datasets.writer import SHARD_BYTES, ShardWriter, new_dataset_folder
from stylepipe.errors import UserError

log = logging.getLogger(__name__)

_FORMATS = ("png", "jpeg")


@dataclass(frozen=True)
class Photos:
    """The files of a folder: names relative to `root`, sorted by their bytes, and what is left out unread."""

    root: Path
    files: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def prepare(
    source: str | Path,
    out: str | Path,
    resolution: int,
    *,
    workers: int | None = None,
    image_format: str = "png",
    upscale: bool = False,
    labels: bool = False,
    levels: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Manifest:
    """Turn the photographs below `source` into shards of square images in the new folder `out`.

    Args:
        source: searched recursively, through symbolic links too. Hidden files and folders are left out.
        out: must not exist, or be empty; it appears when it is whole.
        resolution: height and width of the images, a power of two from 8 to 1024.
        workers: processes; default one per core. They do not change the result.
        image_format: `png` (lossless) or `jpeg` (quality 95, 4:4:4; a quarter of the size, decoded faster).
        upscale: enlarge photographs whose shorter side is below `resolution`; otherwise they are skipped.
        labels: label the images: from `dataset.json` in `source`, or else by the top-level sub-folder (see labels.py).
        levels: store the images also at every power of two from 4 px to half of `resolution` (see levels.py), for
            progressive growing. Nothing else in `out` depends on it.
        shard_bytes: size at which the next shard is begun.
        progress: show a progress bar where stderr is a terminal.

    Returns:
        The manifest. Every file that gave no image is in its `skipped`, with the reason.

    Raises:
        UserError: a bad option, no readable photograph, labels that do not fit, or `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    check_resolution(resolution)
    if image_format not in _FORMATS:
        raise UserError(f"--format {image_format}: expected one of {', '.join(_FORMATS)}")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: expected 1 or more")
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"OUT {out} lies inside SOURCE {source}; name a folder outside it")
    photos = find_photos(source)
    found = find_labels(source, photos.files, photos.skipped) if labels else Labels({}, None, ())
    if labels:
        photos = replace(photos, files=tuple(name for name in photos.files if name in found.of_file))

    skipped = [*photos.skipped, *found.skipped]
    smaller = level_resolutions(resolution) if levels else []
    with (
        new_dataset_folder(out) as folder,
        ShardWriter(folder, image_format, shard_bytes) as writer,
        LevelsWriter(folder / LEVELS_FOLDER, smaller, image_format, shard_bytes) as levels_writer,
    ):
        results = _converted(photos, resolution, image_format, upscale, levels, workers or available_cpus())
        results = with_progress(results, len(photos.files), f"preparing {source.name or source}", progress)
        for name, result in zip(photos.files, results, strict=True):
            if isinstance(result, Skipped):
                skipped.append(result)
            else:
                full, *averages = result
                writer.add(full, found.of_file.get(name))
                levels_writer.add(averages, found.of_file.get(name))
        if not writer.count:
            raise UserError(_none_usable(source, skipped))
        if empty := found.empty_classes(writer.classes_seen):
            log.warning("%s: none of the photographs gives an image of class %s", source, ", ".join(empty))
        manifest = Manifest(
            name=printable(source.resolve().name) or "photographs",
            count=writer.count,
            resolution=resolution,
            image_format=image_format,
            index=writer.finish(),
            shards=tuple(writer.shards),
            labels=writer.labels,
            classes=found.classes,
            skipped=tuple(sorted(skipped, key=lambda s: s.file)),
            options={"upscale": upscale, "labels": labels, "shard_bytes": shard_bytes},
            tool=tool_versions(),
        )
        levels_writer.finish(manifest)
        writer.save_manifest(manifest)
    return manifest


def find_photos(source: Path) -> Photos:
    """List every file below a folder; raise UserError where it is missing, empty or a prepared dataset.

    Any file may be an image, whatever its name. Hidden ones (`.DS_Store`, AppleDouble's `._*`), special files, loops of
    links and folders that cannot be listed are `skipped`.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder; expected a folder of photographs")
    if not source.is_dir():
        raise UserError(f"{source}: is a file; expected a folder of photographs")
    if is_prepared(source):
        raise UserError(f"{source}: is a prepared dataset already; train on it with --data {source}")
    found = list(_walk(source, "", ()))
    files = sorted((item for item in found if isinstance(item, str)), key=os.fsencode)
    if not files:
        left_out = f" but {found[0].file}, which is skipped" if found and isinstance(found[0], Skipped) else ""
        raise UserError(f"{source}: holds no files{left_out}; expected a folder of photographs")
    if all(name.endswith(".tar") for name in files):
        raise UserError(f"{source}: {FOREIGN_TARS}")
    return Photos(source, tuple(files), tuple(item for item in found if isinstance(item, Skipped)))


def check_resolution(resolution: int) -> None:
    """Raise UserError unless it is a power of two from 8 to 1024."""
    if not MIN_RES <= resolution <= MAX_RES or resolution & (resolution - 1):
        raise UserError(f"--res {resolution}: expected a power of two from {MIN_RES} to {MAX_RES}")


def tool_versions() -> dict[str, str]:
    """Return the versions that decide the bytes: this package's, and Pillow's, which decodes and encodes."""
    return {"stylepipe": importlib.metadata.version("stylepipe"), "pillow": PIL.__version__}


def _walk(root: Path, below: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str | Skipped]:
    """Yield the relative name of every file below root/below, or why an entry is left out."""
    try:
        here = os.stat(root / below)
        entries = list(os.scandir(root / below))
    except OSError as error:
        yield Skipped(printable(below), "unreadable", error.strerror or str(error))
        return
    if (here.st_dev, here.st_ino) in ancestors:
        yield Skipped(printable(below), "loop", "a symbolic link to a folder that holds it")
        return
    for entry in entries:
        name = os.path.join(below, entry.name)
        if entry.name.startswith("."):
            yield Skipped(printable(name), "hidden")
            continue
        try:
            mode = entry.stat().st_mode  # follows links
        except OSError as error:
            yield Skipped(printable(name), "unreadable", error.strerror or str(error))
            continue
        if stat.S_ISDIR(mode):
            yield from _walk(root, name, (*ancestors, (here.st_dev, here.st_ino)))
        elif stat.S_ISREG(mode):
            yield name
        else:
            yield Skipped(printable(name), "not a file")


def _converted(
    photos: Photos, resolution: int, image_format: str, upscale: bool, levels: bool, workers: int
) -> Iterator[list[bytes] | Skipped]:
    """Yield the encoded image of each file and its levels, if asked for, or why there is none, in the files' order."""
    convert = partial(
        _convert, root=photos.root, resolution=resolution, image_format=image_format, upscale=upscale, levels=levels
    )
    # Small tasks also where there are few files, so that every worker has some.
    size = min(task_size(resolution), -(-len(photos.files) // workers))
    tasks = [photos.files[r.start : r.stop] for r in in_tasks(len(photos.files), size)]
    yield from chain.from_iterable(map_in_order(convert, tasks, min(workers, len(tasks))))


def _convert(
    names: Sequence[str], *, root: Path, resolution: int, image_format: str, upscale: bool, levels: bool
) -> list[list[bytes] | Skipped]:
    """Do one task, in a worker."""
    results: list[list[bytes] | Skipped] = []
    for name in names:
        try:
            image = read_square(root / name, resolution, upscale)
            averages = encode_levels(np.asarray(image), image_format) if levels else []
            results.append([encode(image, image_format), *averages])
        except SkippedPhotoError as error:
            results.append(Skipped(printable(name), error.reason, error.detail))
        except MemoryError as error:
            raise UserError(f"{root / name}: not enough memory to decode it; use fewer workers (--workers)") from error
    return results


def _none_usable(source: Path, skipped: Sequence[Skipped]) -> str:
    example = skipped[0]
    detail = f" ({example.detail})" if example.detail else ""
    remedy = "use --upscale or a lower --res" if "smaller" in example.reason else "expected photographs"
    return (
        f"{source}: none of its {len(skipped):,} files gives an image; "
        f"for instance {example.file}: {example.reason}{detail}; {remedy}"
    )
