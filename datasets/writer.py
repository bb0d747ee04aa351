"""Writing shards: equal samples in equal order give equal bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from stylepipe.datasets.manifest import INDEX_FILE, LABELS_FILE, MANIFEST_FILE, FileRecord, Manifest
from stylepipe.datasets.shards import INDEX_DTYPE, file_sha256

log = logging.getLogger(__name__)

SHARD_BYTES = 256 * 1024 * 1024
_ROWS_FILE, _VECTORS_FILE = "index.partial", "labels.partial"
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"P6": ".ppm"}


class ShardWriter:
    """Append encoded images to shards of at most `shard_bytes` in `folder`, then write their index.

    Used as a context manager; `finish` completes the dataset but for its manifest. Rows of the index and label vectors
    are appended to files of their own meanwhile, so that what is written can be gone on from.

    Args:
        folder: where.
        shard_bytes: size at which the next shard is begun.
        resume: what `mark` said of files that are there; they may have grown since. `can_resume` has found them sound.

    Attributes:
        shards: records of the shards that are complete.
        labels: record of the file of label vectors, once `finish` has written one.
        classes_seen: the class numbers of the images.
        count: images so far.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, resume: Mapping[str, Any] | None = None) -> None:
        self.shards: list[FileRecord] = []
        self.labels: FileRecord | None = None
        self.classes_seen: set[int] = set()
        self.count = 0
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._c_dim = 0
        self._file: IO[bytes] | None = None
        self._rows = open(folder / _ROWS_FILE, "ab")  # noqa: SIM115 (closed with the writer)
        self._vectors = open(folder / _VECTORS_FILE, "ab")  # noqa: SIM115
        if resume is not None:
            self._take_up(resume)

    def add(self, image: bytes, label: int | npt.NDArray[np.float32] | None = None) -> None:
        """Append one encoded image, and beside it its label: the number of its class, or a vector [c_dim] float32.

        The images of a dataset have all a number, all a vector of one length, or none.
        """
        members = [(_suffix_of(image), image)]
        if isinstance(label, int):
            members.append((".cls", b"%d" % label))
            self.classes_seen.add(label)
        elif label is not None:
            members.append((".json", _vector_json(label)))
            self._vectors.write(label.astype("<f4").tobytes())
            self._c_dim = len(label)
        packed = [_member(f"{self.count:08d}{suffix}", data) for suffix, data in members]
        if self._file is not None and self._size + sum(map(len, packed)) > self._shard_bytes - 2 * tarfile.BLOCKSIZE:
            self._close_shard()
        if self._file is None:
            self._open_shard()
        number = label if isinstance(label, int) else -1
        row = (len(self.shards), len(image), self._size + tarfile.BLOCKSIZE, number, zlib.crc32(image))
        self._rows.write(np.array(row, INDEX_DTYPE).tobytes())
        for data in packed:
            self._write(data)
        self._samples += 1
        self.count += 1

    def finish(self) -> FileRecord:
        """Close the last shard, write the label vectors, if any, and the index; return the index's record."""
        if self._file is not None:
            self._close_shard()
        self.close()
        if self._c_dim:
            vectors = np.fromfile(self._folder / _VECTORS_FILE, "<f4").reshape(self.count, self._c_dim)
            self.labels = self._save_array(LABELS_FILE, vectors)
        index = self._save_array(INDEX_FILE, np.fromfile(self._folder / _ROWS_FILE, INDEX_DTYPE))
        for name in (_ROWS_FILE, _VECTORS_FILE):
            (self._folder / name).unlink()
        return index

    def mark(self) -> dict[str, Any]:
        """Bring all that is written to the disk; return what `resume` needs to go on from it."""
        for file in (self._file, self._rows, self._vectors):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        opened = {} if self._file is None else {"size": self._size, "samples": self._samples}
        return {
            "shards": [asdict(record) for record in self.shards],
            "count": self.count,
            "classes": sorted(self.classes_seen),
            "c_dim": self._c_dim,
            **opened,
        }

    def close(self) -> None:
        """Close all files."""
        for file in (self._file, self._rows, self._vectors):
            if file is not None:
                file.close()

    def save_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, which declares the folder whole."""
        (self._folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _take_up(self, mark: Mapping[str, Any]) -> None:
        """Cut all files to what a mark says, and go on from there."""
        self.shards = [FileRecord(**record) for record in mark["shards"]]
        self.count, self._c_dim, self.classes_seen = mark["count"], mark["c_dim"], set(mark["classes"])
        self._rows.truncate(self.count * INDEX_DTYPE.itemsize)
        self._vectors.truncate(self.count * self._c_dim * 4)
        kept = {record.file for record in self.shards}
        if "size" in mark:
            name = _shard_name(len(self.shards))
            kept.add(name)
            os.truncate(self._folder / name, mark["size"])
            self._file = open(self._folder / name, "ab")  # noqa: SIM115 (spans calls)
            with open(self._folder / name, "rb") as file:
                self._hash = hashlib.file_digest(file, "sha256")
            self._size, self._samples = mark["size"], mark["samples"]
        for path in self._folder.glob("shard-*.tar"):
            if path.name not in kept:
                path.unlink()

    def _save_array(self, name: str, array: npt.NDArray[Any]) -> FileRecord:
        path = self._folder / name
        np.save(path, array, allow_pickle=False)
        return FileRecord(name, path.stat().st_size, file_sha256(path), self.count)

    def _open_shard(self) -> None:
        self._file = open(self._folder / _shard_name(len(self.shards)), "wb")  # noqa: SIM115 (spans calls)
        self._hash = hashlib.sha256()
        self._size = self._samples = 0

    def _close_shard(self) -> None:
        assert self._file is not None
        self._write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar: two blocks of zeros
        self._file.close()
        self._file = None
        name = _shard_name(len(self.shards))
        self.shards.append(FileRecord(name, self._size, self._hash.hexdigest(), self._samples))

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)


def can_resume(folder: Path, mark: Mapping[str, Any]) -> bool:
    """Tell whether the files that a mark of `ShardWriter` speaks of are all there, and finished shards as they were."""
    try:
        records = [FileRecord(**record) for record in mark["shards"]]
        whole = all(file_sha256(folder / record.file) == record.sha256 for record in records)
        least = {
            _ROWS_FILE: mark["count"] * INDEX_DTYPE.itemsize,
            _VECTORS_FILE: mark["count"] * mark["c_dim"] * 4,
            **({_shard_name(len(records)): mark["size"]} if "size" in mark else {}),
        }
        return whole and all((folder / name).stat().st_size >= size for name, size in least.items())
    except (OSError, KeyError, TypeError):
        return False


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.tar"


def _suffix_of(image: bytes) -> str:
    """Return the suffix of an encoded image, by how it begins."""
    return next(suffix for beginning, suffix in _SUFFIXES.items() if image.startswith(beginning))


def _vector_json(vector: npt.NDArray[np.float32]) -> bytes:
    """Return a vector as JSON, each number with the fewest digits that give the same float32 again."""
    return json.dumps([float(str(value)) for value in vector]).encode()


def _member(name: str, data: bytes) -> bytes:
    """Return a tar member: a header block that depends on name and size only, the data, the padding."""
    info = tarfile.TarInfo(name)  # its defaults: time 0, owner 0, no names, mode 0644
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
