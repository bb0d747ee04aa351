"""From photographs to a prepared dataset.

The source is listed and put into one order first; worker processes decode, crop, resize and encode; this process writes
what they return, in order. So the dataset is the same to the byte for any number of workers, and after a kill the work
goes on where it stood (see resuming.py).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL

from stylepipe.datasets import order
from stylepipe.datasets.labels import LABEL_FILE, Labels, find_labels
from stylepipe.datasets.levels import DatasetWriter, can_resume_dataset, encode_levels, level_resolutions
from stylepipe.datasets.manifest import FORMAT_VERSION, FileRecord, Manifest, Skipped
from stylepipe.datasets.photos import SkippedPhotoError, Square, encode, printable, read_square
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.processes import available_cpus, in_tasks, map_in_order, task_size
from stylepipe.datasets.progress import with_progress
from stylepipe.datasets.resuming import resumable_folder
from stylepipe.datasets.sources import Source
from stylepipe.datasets.sources.opening import open_source
from stylepipe.errors import UserError

log = logging.getLogger(__name__)

_SKIPPED_FILE = "skipped.partial"


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
    levels = level_resolutions(how.res) if how.levels else []
    with resumable_folder(out, _plan(source, how), _can_go_on) as work:
        past = work.progress or {"done": 0, "skipped": None, "writer": None}
        if past["done"]:
            log.info("%s: going on after %s of %s files", out, f"{past['done']:,}", f"{len(files):,}")
        with (
            DatasetWriter(work.folder, levels, how.shard_bytes, past["writer"]) as writer,
            _Journal(work.folder / _SKIPPED_FILE, past["skipped"]) as skipped,
        ):
            for item in [*skipped.items, *source.skipped, *labels.skipped]:
                bad.note(item)
            results = _converted(source, files[past["done"] :], how, workers or available_cpus())
            results = with_progress(results, len(files) - past["done"], f"preparing {path.name or path}", progress)
            for done, result in enumerate(results, past["done"] + 1):
                name = files[done - 1]
                if isinstance(result, Skipped):
                    skipped.add(result)
                    bad.note(result)
                else:
                    writer.add(result, labels.of_file.get(name))
                if work.due():
                    work.mark({"done": done, "skipped": skipped.mark(), "writer": writer.mark()})
            return _finished(writer, skipped.finish(), source, labels, how)


def _finished(
    writer: DatasetWriter, skipped: Sequence[Skipped], source: Source, labels: Labels, how: Preparation
) -> Manifest:
    """Write index and manifests."""
    path, everything = source.path, [*source.skipped, *labels.skipped, *skipped]
    if not writer.full.count:
        raise UserError(_none_usable(path, everything))
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
            skipped=tuple(sorted(everything, key=lambda s: s.file)),
            options=how.recorded(),
            tool=tool_versions(),
        )

    return writer.finish(describe)


def tool_versions() -> dict[str, str]:
    """Return the versions that decide the bytes: this package's, and Pillow's, which decodes and encodes."""
    return {"stylepipe": importlib.metadata.version("stylepipe"), "pillow": PIL.__version__}


def _plan(source: Source, how: Preparation) -> str:
    """Return what tells this preparation from any other: the source as it is now, options and versions."""
    digest = hashlib.sha256(b"".join(source.stamps())).hexdigest()
    options = asdict(replace(how, max_bad=None))
    return json.dumps({"format": FORMAT_VERSION, "source": digest, "options": options, "tool": tool_versions()})


def _can_go_on(folder: Path, progress: Mapping[str, Any]) -> bool:
    try:
        return (folder / _SKIPPED_FILE).stat().st_size >= progress["skipped"] and can_resume_dataset(
            folder, progress["writer"]
        )
    except (OSError, KeyError, TypeError):
        return False


class _Journal:
    """The files that were skipped so far, appended to a file of lines. Used as a context manager.

    Args:
        path: the file.
        size: bytes of it to go on from, None to begin.

    Attributes:
        items: what it held up to there.
    """

    def __init__(self, path: Path, size: int | None) -> None:
        self._path = path
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - `close` closes it
        self._file.truncate(size or 0)
        self.items = self._read()

    def add(self, skipped: Skipped) -> None:
        self._file.write(json.dumps(asdict(skipped)) + "\n")

    def mark(self) -> int:
        """Bring all lines to the disk; return their size in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._path.stat().st_size

    def finish(self) -> list[Skipped]:
        """Return all that was skipped; the file goes."""
        self._file.close()
        items = self._read()
        self._path.unlink()
        return items

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _read(self) -> list[Skipped]:
        with open(self._path, encoding="utf-8") as file:
            return [Skipped(**json.loads(line)) for line in file]


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
