"""Checking a prepared dataset to the last image, and saving what can be read of a damaged one."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from stylepipe.datasets.labels import kind_of
from stylepipe.datasets.levels import build_levels
from stylepipe.datasets.manifest import INDEX_FILE, LABELS_FILE, Manifest
from stylepipe.datasets.processes import available_cpus, in_tasks, map_in_order, task_size
from stylepipe.datasets.progress import with_progress
from stylepipe.datasets.resuming import new_folder
from stylepipe.datasets.shards import (
    INDEX_DTYPE,
    INDEX_DTYPE_V1,
    LEVELS_FOLDER,
    file_sha256,
    level_folder,
    load_manifest,
    open_dataset,
    stored_levels,
)
from stylepipe.datasets.sources.tars import scan_tar
from stylepipe.datasets.writer import SHARD_BYTES, ShardWriter
from stylepipe.errors import UserError
from stylepipe.parsing import one_line, parse_json

IndexArray = npt.NDArray[np.void]

_PPM = b"P6"  # of colours, the only kind that is stored


@dataclass(frozen=True)
class Fault:
    """Something wrong in a dataset.

    Attributes:
        file: within the folder.
        key: of the sample, or empty where it is the file's.
        cause: what is wrong.
        lost: the image of the sample cannot be had any more, or is not the one that was stored.
    """

    file: str
    key: str
    cause: str
    lost: bool = False


@dataclass(frozen=True)
class _Sample:
    """Where a sample is said to be. `crc` is None where nothing says it."""

    key: str
    shard: str
    offset: int
    size: int
    crc: int | None
    label: int | tuple[float, ...] | None


def find_faults(path: str | Path, *, workers: int | None = None, progress: bool = True) -> list[Fault]:
    """Check every hash of a prepared dataset and of its levels, and decode every image.

    Args:
        path: a folder that `prepare` made.
        workers: processes; default one per core.
        progress: show a progress bar where stderr is a terminal.

    Raises:
        UserError: it is no such folder, or its manifest cannot be read.
    """
    path = Path(path)
    faults = _faults_of(path, "", workers, progress)
    for resolution in stored_levels(path / LEVELS_FOLDER):
        folder = level_folder(path / LEVELS_FOLDER, resolution)
        faults += _faults_of(folder, f"{folder.relative_to(path)}/", workers, progress)
        try:
            open_dataset(path).level(resolution)
        except UserError as error:
            faults.append(Fault(f"{folder.relative_to(path)}/{INDEX_FILE}", "", str(error)))
    return faults


def repair(path: str | Path, out: str | Path, *, workers: int | None = None, progress: bool = True) -> Manifest:
    """Write every image of a damaged dataset that is still the one that was stored into the new folder `out`.

    They keep their order, labels and bytes; levels are made again. Where the index is damaged, the tars themselves say
    what they hold.

    Args:
        path: a folder that `prepare` made; only read.
        out: must not exist, or be empty.
        workers, progress: as for `find_faults`.

    Raises:
        UserError: nothing can be saved, or `out` cannot be written.
    """
    path, out = Path(path), Path(out)
    manifest = load_manifest(path)
    samples, _ = _samples(path, manifest)
    shard_bytes = int(manifest.options.get("shard_mb", SHARD_BYTES / 2**20) * 2**20)
    results = _checked(path, manifest, samples, workers, progress)
    with new_folder(out) as folder, ShardWriter(folder, shard_bytes) as writer:
        for sample, faults in zip(samples, results, strict=True):
            if not any(fault.lost for fault in faults):
                label = np.asarray(sample.label, np.float32) if isinstance(sample.label, tuple) else sample.label
                writer.add(_bytes_of(path, sample), label)
        if not writer.count:
            raise UserError(f"{path}: not one of its {manifest.count:,} images can be saved")
        index = writer.finish()
        repaired = replace(manifest, count=writer.count, index=index, shards=tuple(writer.shards), labels=writer.labels)
        writer.save_manifest(repaired)
    if stored_levels(path / LEVELS_FOLDER):
        build_levels(open_dataset(out), out / LEVELS_FOLDER, workers=workers, progress=progress)
    return repaired


def _faults_of(path: Path, prefix: str, workers: int | None, progress: bool) -> list[Fault]:
    manifest = load_manifest(path)
    causes = {record.file: _cause(path / record.file, record.bytes, record.sha256) for record in manifest.files()}
    faults = [Fault(file, "", cause) for file, cause in causes.items() if cause is not None]
    samples, found = _samples(path, manifest)
    faults += found
    faults += chain.from_iterable(_checked(path, manifest, samples, workers, progress))
    return [replace(fault, file=prefix + fault.file) for fault in faults]


def _cause(path: Path, size: int, sha256: str) -> str | None:
    """Return what is wrong with a whole file."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes instead of {size:,}"
        return None if file_sha256(path) == sha256 else "its SHA-256 is not that of the manifest"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _samples(path: Path, manifest: Manifest) -> tuple[list[_Sample], list[Fault]]:
    """Return the samples in order: as the index has them, or where that is damaged as the tars do.

    A shard that has got the name of another is found by its hash.
    """
    index = _sound(path, manifest, INDEX_FILE, manifest.index.sha256)
    vectors = None
    if manifest.labels is not None:
        vectors = _sound(path, manifest, LABELS_FILE, manifest.labels.sha256)
    if not _are_rows(index, manifest) or (manifest.labels and not _are_vectors(vectors, manifest)):
        return _scanned(path, manifest)
    assert index is not None
    hashes = {record.file: _sha256(path / record.file) for record in manifest.shards}
    by_hash = {sha256: file for file, sha256 in hashes.items()}
    place = [
        record.file if hashes[record.file] == record.sha256 else by_hash.get(record.sha256, record.file)
        for record in manifest.shards
    ]
    return [_of_row(manifest, place, number, row, vectors) for number, row in enumerate(index)], []


def _are_rows(index: IndexArray | None, manifest: Manifest) -> bool:
    return (
        index is not None
        and index.dtype in (INDEX_DTYPE, INDEX_DTYPE_V1)
        and index.shape == (manifest.count,)
        and bool((index["shard"] < len(manifest.shards)).all())
    )


def _are_vectors(vectors: npt.NDArray[Any] | None, manifest: Manifest) -> bool:
    return vectors is not None and vectors.dtype == np.float32 and vectors.shape[:-1] == (manifest.count,)


def _sound(path: Path, manifest: Manifest, name: str, sha256: str) -> npt.NDArray[Any] | None:
    try:
        if file_sha256(path / name) != sha256:
            return None
        array: npt.NDArray[Any] = np.load(path / name, mmap_mode="r", allow_pickle=False)
    except Exception:  # NumPy raises anything at all of damaged headers
        return None
    return array


def _sha256(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None


def _of_row(
    manifest: Manifest, place: Sequence[str], number: int, row: Any, vectors: npt.NDArray[Any] | None
) -> _Sample:
    label: int | tuple[float, ...] | None = int(row["label"]) if manifest.classes is not None else None
    if vectors is not None:
        label = tuple(map(float, vectors[number]))
    crc = int(row["crc"]) if "crc" in (row.dtype.names or ()) else None
    return _Sample(f"{number:08d}", place[int(row["shard"])], int(row["offset"]), int(row["size"]), crc, label)


def _scanned(path: Path, manifest: Manifest) -> tuple[list[_Sample], list[Fault]]:
    """Return what the tars hold, by their headers."""
    samples, faults = [], []
    for record in manifest.shards:
        try:
            members, wrong = scan_tar(path / record.file)
        except UserError as error:
            faults.append(Fault(record.file, "", str(error)))
            continue
        faults += [Fault(record.file, "", cause) for cause in wrong]
        beside = {member.name: member for member in members if member.name.endswith((".cls", ".json"))}
        for member in members:
            key, suffix = os.path.splitext(member.name)
            if suffix in (".cls", ".json"):
                continue
            label = None
            if (text := beside.get(f"{key}.cls", beside.get(f"{key}.json"))) is not None:
                label = _label(_bytes_at(path / record.file, text.offset, text.size))
            samples.append(_Sample(key, record.file, member.offset, member.size, None, label))
    return _of_one_length(samples), faults


def _label(text: bytes) -> int | tuple[float, ...] | None:
    try:
        label = parse_json(text)
    except ValueError:
        return None
    if kind_of(label) is None:
        return None
    return tuple(map(float, label)) if isinstance(label, list) else int(label)


def _of_one_length(samples: list[_Sample]) -> list[_Sample]:
    """Take away label vectors of another length than most have."""
    lengths = Counter(len(sample.label) for sample in samples if isinstance(sample.label, tuple))
    usual = {length for length, _ in lengths.most_common(1)}
    return [
        replace(sample, label=None) if isinstance(sample.label, tuple) and len(sample.label) not in usual else sample
        for sample in samples
    ]


def _checked(
    path: Path, manifest: Manifest, samples: Sequence[_Sample], workers: int | None, progress: bool
) -> Iterator[list[Fault]]:
    """Yield what is wrong with each sample."""
    if not samples:
        return
    classes = None if manifest.classes is None else len(manifest.classes)
    labelled = classes is not None or manifest.labels is not None
    check = partial(_check, path=path, resolution=manifest.resolution, labelled=labelled, classes=classes)
    tasks = [samples[r.start : r.stop] for r in in_tasks(len(samples), task_size(manifest.resolution))]
    found = chain.from_iterable(map_in_order(check, tasks, min(workers or available_cpus(), len(tasks))))
    yield from with_progress(found, len(samples), f"checking {manifest.name} at {manifest.resolution} px", progress)


def _check(
    samples: Sequence[_Sample], *, path: Path, resolution: int, labelled: bool, classes: int | None
) -> list[list[Fault]]:
    """Do one task, in a worker."""
    return [list(_faults_of_sample(path, sample, resolution, labelled, classes)) for sample in samples]


def _faults_of_sample(
    path: Path, sample: _Sample, resolution: int, labelled: bool, classes: int | None
) -> Iterator[Fault]:
    def fault(cause: str, lost: bool) -> Fault:
        return Fault(sample.shard, sample.key, cause, lost)

    try:
        data = _bytes_of(path, sample)
    except OSError as error:
        yield fault(f"cannot be read ({error.strerror or error})", True)
        return
    if len(data) < sample.size:
        yield fault(f"the file ends after {len(data):,} of its {sample.size:,} bytes", True)
        return
    if sample.crc is not None and zlib.crc32(data) != sample.crc:
        yield fault("its bytes are not those that were stored (CRC-32)", True)
        return
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "PPM")) as image:
            if image.size != (resolution, resolution):  # before there is room made for its pixels
                raise ValueError(f"it is {image.width}x{image.height} pixels")
            if image.format == "PPM" and not data.startswith(_PPM):
                raise ValueError("it is a PPM of another kind")
            image.load()
    except Exception as error:  # decoders raise anything at all on broken files
        yield fault(f"cannot be decoded ({one_line(error)})", True)
        return
    known = sample.label in range(classes) if classes is not None else isinstance(sample.label, tuple)
    if labelled and not known:
        yield fault("its label is missing or damaged", True)
    if (cause := _wrong_header(path, sample)) is not None:
        yield fault(cause, False)


def _wrong_header(path: Path, sample: _Sample) -> str | None:
    """Return what is wrong with the header before an image, which other readers of the tar go by."""
    if sample.offset < tarfile.BLOCKSIZE:
        return "there is no room for a header before it"
    block = _bytes_at(path / sample.shard, sample.offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"its header in the tar is damaged ({error})"
    if os.path.splitext(info.name)[0] != sample.key or info.size != sample.size:
        return f"its header in the tar names {info.name!r} of {info.size:,} bytes"
    return None


def _bytes_of(path: Path, sample: _Sample) -> bytes:
    return _bytes_at(path / sample.shard, sample.offset, sample.size)


def _bytes_at(path: Path, offset: int, size: int) -> bytes:
    """Return bytes of a file, fewer where it ends; whatever is asked for, nothing larger than the file is allocated."""
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        file.seek(min(offset, length))
        return file.read(min(size, length))
