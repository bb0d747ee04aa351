"""From photographs to a prepared dataset.

The source is listed and put into one order first; worker processes decode, crop, resize and encode; this process writes
what they return, in order. So the dataset is the same to the byte for any number of workers.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import PIL

from stylepipe.datasets import order
from stylepipe.datasets.labels import LABEL_FILE, Labels, find_labels
from stylepipe.datasets.levels import DatasetWriter, encode_levels, level_resolutions
from stylepipe.datasets.manifest import FileRecord, Manifest, Skipped
from stylepipe.datasets.photos import SkippedPhotoError, Square, encode, printable, read_square
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.processes import available_cpus, in_tasks, map_in_order, task_size
from stylepipe.datasets.progress import with_progress
from stylepipe.datasets.sources import Source
from stylepipe.datasets.sources.opening import open_source
from stylepipe.datasets.writer import new_dataset_folder
from stylepipe.errors import UserError

log = logging.getLogger(__name__)


def prepare(
    source: str | Path | Source,
    out: str | Path,
    how: Preparation,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Turn photographs into shards of square images in the new folder `out`.

    Args:
        source: a folder, zip, tar, folder of WebDataset shards or LMDB (see `open_source`), or one that is open.
        out: must not exist, or be empty; it appears when it is whole.
        how: what is done to each, and how it is stored.
        workers: processes; default one per core. They do not change the result.
        progress: show a progress bar where stderr is a terminal.

    Returns:
        The manifest. Every file that gave no image is in its `skipped`, with the reason.

    Raises:
        UserError: a bad option, no readable photograph, too many unreadable ones, labels that do not fit, or `out`
            cannot be written.
    """
    out = Path(out)
    how.check()
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: expected 1 or more")
    path = Path(source) if isinstance(source, str | Path) else source.path
    if out.resolve().is_relative_to(path.resolve()):
        raise UserError(f"OUT {out} lies inside SOURCE {path}; name a folder outside it")
    if isinstance(source, str | Path):
        source = open_source(source)
    labels = find_labels(source) if how.labels else Labels({}, None, ())
    files = [name for name in source.files if (name in labels.of_file if how.labels else name != LABEL_FILE)]
    files = [files[index] for index in order.image_ids(np.arange(len(files)), len(files), how.shuffle_seed)]
    bad = _Bad(path, how.max_bad)
    skipped = [*source.skipped, *labels.skipped]
    for item in skipped:
        bad.note(item)
    levels = level_resolutions(how.res) if how.levels else []
    with new_dataset_folder(out) as folder, DatasetWriter(folder, levels, how.shard_bytes) as writer:
        results = _converted(source, files, how, workers or available_cpus())
        results = with_progress(results, len(files), f"preparing {path.name or path}", progress)
        for name, result in zip(files, results, strict=True):
            if isinstance(result, Skipped):
                skipped.append(result)
                bad.note(result)
            else:
                writer.add(result, labels.of_file.get(name))
        if not writer.full.count:
            raise UserError(_none_usable(path, skipped))
        if empty := labels.empty_classes(writer.full.classes_seen):
            log.warning("%s: none of the photographs gives an image of class %s", path, ", ".join(empty))

        def describe(index: FileRecord) -> Manifest:
            return Manifest(
                name=printable(path.resolve().stem) or "photographs",
                count=writer.full.count,
                resolution=how.res,
                image_format=how.format,
                index=index,
                shards=(),
                classes=labels.classes,
                skipped=tuple(sorted(skipped, key=lambda s: s.file)),
                options=how.recorded(),
                tool=tool_versions(),
            )

        return writer.finish(describe)


def tool_versions() -> dict[str, str]:
    """Return the versions that decide the bytes: this package's, and Pillow's, which decodes and encodes."""
    return {"stylepipe": importlib.metadata.version("stylepipe"), "pillow": PIL.__version__}


class _Bad:
    """Counts files that cannot be read, and gives up when they are too many."""

    def __init__(self, source: Path, most: int | None) -> None:
        self._source, self._most, self._count = source, most, 0

    def note(self, skipped: Skipped) -> None:
        self._count += skipped.reason in ("unreadable", "damaged archive")
        if self._most is not None and self._count > self._most:
            raise UserError(
                f"--max-bad {self._most}: {self._source} has more files that cannot be read, the last one found is "
                f"{skipped.file} ({skipped.detail}); mend or remove them, or allow more"
            )


def _converted(source: Source, files: Sequence[str], how: Preparation, workers: int) -> Iterator[list[bytes] | Skipped]:
    """Yield the encoded image of each file and its levels, if asked for, or why there is none, in the files' order."""
    convert = partial(_convert, source=source, how=how)
    # Small tasks also where there are few files, so that every worker has some.
    size = min(task_size(how.res), max(1, -(-len(files) // workers)))
    tasks = [files[r.start : r.stop] for r in in_tasks(len(files), size)]
    yield from chain.from_iterable(map_in_order(convert, tasks, min(workers, len(tasks))))


def _convert(names: Sequence[str], *, source: Source, how: Preparation) -> list[list[bytes] | Skipped]:
    """Do one task, in a worker."""
    results: list[list[bytes] | Skipped] = []
    for name in names:
        try:
            data = source.read(name)
            square = read_square(data, how)
            averages = encode_levels(np.asarray(square.image), how.format) if how.levels else []
            results.append([_encoded(square, data, how), *averages])
        except SkippedPhotoError as error:
            results.append(Skipped(printable(name), error.reason, error.detail))
        except (OSError, ValueError) as error:
            detail = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            results.append(Skipped(printable(name), "unreadable", detail))
        except MemoryError as error:
            raise UserError(
                f"{source.path}/{name}: not enough memory to decode it; use fewer workers (--workers)"
            ) from error
    return results


def _encoded(square: Square, data: bytes, how: Preparation) -> bytes:
    if how.format != "keep":
        return encode(square.image, how.format)
    return data if square.unchanged else encode(square.image, "jpeg" if square.lossy else "png")


def _none_usable(source: Path, skipped: Sequence[Skipped]) -> str:
    example = skipped[0]
    detail = f" ({example.detail})" if example.detail else ""
    remedy = "use --min-size 1 or a lower --res" if "smaller" in example.reason else "expected photographs"
    return (
        f"{source}: none of its {len(skipped):,} files gives an image; "
        f"for instance {example.file}: {example.reason}{detail}; {remedy}"
    )
