"""Writing shards: equal samples in equal order give equal bytes."""

from __future__ import annotations

import hashlib
import json
import logging
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from stylepipe.datasets.appended import Appended, is_sound
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
        self._file: Appended | None = None
        self._rows = Appended(folder / _ROWS_FILE, resume and resume["rows"])
        self._vectors = Appended(folder / _VECTORS_FILE, resume and resume["vectors"])
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
        if self._c_dim:
            vectors = np.frombuffer(self._vectors.read(), "<f4").reshape(self.count, self._c_dim)
            self.labels = self._save_array(LABELS_FILE, vectors)
        index = self._save_array(INDEX_FILE, np.frombuffer(self._rows.read(), INDEX_DTYPE))
        self._rows.remove()
        self._vectors.remove()
        return index

    def mark(self) -> dict[str, Any]:
        """Bring all that is written to the disk; return what `resume` needs to go on from it."""
        opened: dict[str, Any] = {}
        if self._file is not None:
            opened = {"shard": self._file.mark(), "samples": self._samples}
        return {
            "rows": self._rows.mark(),
            "vectors": self._vectors.mark(),
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
        kept = {record.file for record in self.shards}
        if "shard" in mark:
            name = _shard_name(len(self.shards))
            kept.add(name)
            self._file = Appended(self._folder / name, mark["shard"])
            with open(self._folder / name, "rb") as file:
                self._hash = hashlib.file_digest(file, "sha256")
            self._size, self._samples = mark["shard"]["bytes"], mark["samples"]
        for path in self._folder.glob("shard-*.tar"):
            if path.name not in kept:
                path.unlink()

    def _save_array(self, name: str, array: npt.NDArray[Any]) -> FileRecord:
        path = self._folder / name
        np.save(path, array, allow_pickle=False)
        return FileRecord(name, path.stat().st_size, file_sha256(path), self.count)

    def _open_shard(self) -> None:
        self._file = Appended(self._folder / _shard_name(len(self.shards)))
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
    """Tell whether the files that a mark of `ShardWriter` speaks of are there, and what it speaks of as it was."""
    records = mark["shards"]
    appended = {_ROWS_FILE: mark["rows"], _VECTORS_FILE: mark["vectors"]}
    if "shard" in mark:
        appended[_shard_name(len(records))] = mark["shard"]
    try:
        whole = all(file_sha256(folder / record["file"]) == record["sha256"] for record in records)
    except OSError:
        return False
    return whole and all(is_sound(folder / name, of_file) for name, of_file in appended.items())


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
