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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from stylepipe.datasets import order
from stylepipe.datasets.align import Detector, Landmarks, Points, align, load_detector, read_landmarks, side
from stylepipe.datasets.appended import is_sound
from stylepipe.datasets.copies import Copies
from stylepipe.datasets.dedupe import Fingerprint, fingerprint
from stylepipe.datasets.labels import LABEL_FILE, Labels, find_labels
from stylepipe.datasets.levels import DatasetWriter, can_resume_dataset, encode_levels, level_resolutions
from stylepipe.datasets.manifest import FORMAT_VERSION, FileRecord, Manifest, Skipped
from stylepipe.datasets.photos import SkippedPhotoError, Square, encode, printable, read_square
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.processes import available_cpus, in_tasks, map_in_order, task_size
from stylepipe.datasets.progress import with_progress
from stylepipe.datasets.resuming import resumable_folder
from stylepipe.datasets.shards import file_sha256
from stylepipe.datasets.skips import Skips
from stylepipe.datasets.sources import Source
from stylepipe.datasets.sources.opening import open_source
from stylepipe.errors import UserError
from stylepipe.parsing import one_line

log = logging.getLogger(__name__)

_SKIPS_FILE, _COPIES_FILE = "skips.partial", "copies.partial"
_NAMED = 8  # files of a task whose worker was killed


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
    if files:
        files = [files[index] for index in order.image_ids(np.arange(len(files)), len(files), how.shuffle_seed)]
    landmarks = None if how.landmarks is None else _landmarks(how.landmarks, source)
    levels = level_resolutions(how.res) if how.levels else []
    left_out = [*source.skipped, *labels.skipped]
    with resumable_folder(out, _plan(source, how), _can_go_on) as work:
        past = work.progress or {"done": 0, "skips": None, "copies": None, "writer": None}
        done = int(past["done"])
        if done:
            log.info("%s: going on after %s of %s files", out, f"{done:,}", f"{len(files):,}")
        with (
            DatasetWriter(work.folder, levels, how.shard_bytes, past["writer"]) as writer,
            Skips(work.folder / _SKIPS_FILE, past["skips"], path, left_out, how.max_bad) as skips,
            Copies(
                work.folder / _COPIES_FILE, past["copies"], _stored(files[:done], skips) if how.dedupe else ()
            ) as copies,
        ):
            results = _converted(source, files[done:], how, landmarks, workers or available_cpus())
            results = with_progress(results, len(files) - done, f"preparing {path.name or path}", progress)
            for done, result in enumerate(results, done + 1):  # noqa: B020 - the iterator has it already
                name = files[done - 1]
                skipped = result if isinstance(result, Skipped) else None
                if isinstance(result, Converted) and result.fingerprint is not None:
                    skipped = copies.copied(printable(name), result.fingerprint)
                if skipped is not None:
                    skips.add(skipped)
                elif isinstance(result, Converted):
                    writer.add(result.images, labels.of_file.get(name))
                if work.due():
                    marks = {"skips": skips.mark(), "copies": copies.mark(), "writer": writer.mark()}
                    work.mark({"done": done, **marks})
            copies.finish()
            return _finished(writer, skips.finish(), source, labels, how)


def _landmarks(file: str, source: Source) -> Landmarks:
    """Read the landmarks; say so where they are of other photographs."""
    landmarks = read_landmarks(file)
    absent = set(landmarks.of_file).difference(source.files)
    if len(absent) == len(landmarks.of_file):
        raise UserError(
            f"--landmarks {file}: names none of the photographs in {source.path}; expected their paths relative to it, "
            f"such as {source.files[0]}"
        )
    if absent:
        log.warning("%s: %s of its photographs are not in %s", file, f"{len(absent):,}", source.path)
    return landmarks


def _stored(files: Sequence[str], skips: Skips) -> list[str]:
    """Return the names of those files, all of them done, whose images were stored."""
    return [told for name in files if (told := printable(name)) not in skips.names]


def _finished(
    writer: DatasetWriter, skipped: Sequence[Skipped], source: Source, labels: Labels, how: Preparation
) -> Manifest:
    """Write index and manifests."""
    path = source.path
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
            options=how.recorded() | _digest_of_landmarks(how),
            tool=tool_versions(),
        )

    return writer.finish(describe)


def tool_versions() -> dict[str, str]:
    """Return the versions that decide the bytes: this package's, and Pillow's, which decodes and encodes."""
    return {"stylepipe": importlib.metadata.version("stylepipe"), "pillow": PIL.__version__}


def _plan(source: Source, how: Preparation) -> str:
    """Return what tells this preparation from any other: the source as it is now, options and versions."""
    digest = hashlib.sha256(b"".join(source.stamps())).hexdigest()
    options = asdict(replace(how, max_bad=None)) | _digest_of_landmarks(how)
    return json.dumps({"format": FORMAT_VERSION, "source": digest, "options": options, "tool": tool_versions()})


def _can_go_on(folder: Path, progress: Mapping[str, Any]) -> bool:
    """Tell whether all that a mark speaks of is there and sound."""
    return (
        is_sound(folder / _SKIPS_FILE, progress["skips"])
        and is_sound(folder / _COPIES_FILE, progress["copies"])
        and can_resume_dataset(folder, progress["writer"])
    )


def _digest_of_landmarks(how: Preparation) -> dict[str, str]:
    return {} if how.landmarks is None else {"landmarks_sha256": file_sha256(Path(how.landmarks))}


class Converted(NamedTuple):
    """What a worker made of a photograph: the encoded image and its levels, and what tells copies from others."""

    images: list[bytes]
    fingerprint: Fingerprint | None


def _converted(
    source: Source, files: Sequence[str], how: Preparation, landmarks: Landmarks | None, workers: int
) -> Iterator[Converted | Skipped]:
    """Yield what becomes of each file, in their order."""
    detector = None if how.detector is None else load_detector(how.detector)
    convert = partial(_convert, source=source, how=how, detector=detector)
    # Small tasks also where there are few files, so that every worker has some.
    size = min(task_size(how.res), max(1, -(-len(files) // workers)))
    points = {} if landmarks is None else landmarks.of_file
    tasks = [[(name, points.get(name)) for name in files[r.start : r.stop]] for r in in_tasks(len(files), size)]
    yield from chain.from_iterable(map_in_order(convert, tasks, min(workers, len(tasks)), _names_in))


def _names_in(task: Sequence[tuple[str, Points | None]]) -> str:
    """Return the files of a task, the first of many."""
    names = ", ".join(printable(name) for name, _ in task[:_NAMED])
    return names if len(task) <= _NAMED else f"{names} and {len(task) - _NAMED} more"


def _convert(
    task: Sequence[tuple[str, Points | None]], *, source: Source, how: Preparation, detector: Detector | None
) -> list[Converted | Skipped]:
    """Do one task, in a worker."""
    results: list[Converted | Skipped] = []
    for name, points in task:
        cut = partial(_aligned, points=points, how=how, detector=detector) if how.crop == "align" else None
        try:
            data = source.read(name)
            square = read_square(data, how, cut)
            pixels = np.asarray(square.image)
            averages = encode_levels(pixels, how.format) if how.levels else []
            images = [_encoded(square, data, how), *averages]
            results.append(Converted(images, fingerprint(pixels) if how.dedupe else None))
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


def _aligned(
    upright: Image.Image, *, points: Points | None, how: Preparation, detector: Detector | None
) -> Image.Image:
    """Return the square around the face."""
    if detector is not None:
        found = detector(np.asarray(upright))
        points = found[0] if len(found) else None
    if points is None:
        raise SkippedPhotoError("no face", "none was found" if detector else "the landmarks have none for it")
    if side(points) < how.smallest:
        raise SkippedPhotoError(f"smaller than {how.smallest} px", f"{side(points):.0f} px around the face")
    return align(upright, points, how.res)


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
        f"for instance {one_line(example.file)}: {one_line(example.reason + detail)}; {remedy}"
    )
