"""What a prepared folder says about itself in manifest.json; see shards.py for the files it names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from stylepipe.config import MAX_RES
from stylepipe.datasets.preparation import MAX_SHARD_MB
from stylepipe.parsing import one_line, parse_json

FORMAT_NAME = "stylepipe-shards"
FORMAT_VERSION = 3  # 1 and 2 have no CRC in the index; 1 has no key for labels.npy
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.npy"
LABELS_FILE = "labels.npy"
LEVEL_OF = "level_of"  # option of a smaller level: the `digest` of the full images it was averaged from

_RESOLUTIONS = [1 << level for level in range(2, MAX_RES.bit_length())]
_SHA256 = re.compile("[0-9a-f]{64}")
_FORMATS = ("png", "jpeg", "keep", "ppm")
_LONGEST_NAME = 255
_MAX_BYTES = 1 << 62  # what is more is no size of a file, nor any number of images


@dataclass(frozen=True)
class FileRecord:
    """One file of the dataset: name within the folder, size in bytes, SHA-256, number of samples it holds or lists."""

    file: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Skipped:
    """One source file that is not in the dataset: its relative name, a short reason, the detail."""

    file: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds. Depends on source and options only: no times, hosts or absolute paths."""

    name: str
    count: int
    resolution: int
    image_format: str
    index: FileRecord
    shards: tuple[FileRecord, ...]
    labels: FileRecord | None = None
    classes: tuple[str, ...] | None = None
    skipped: tuple[Skipped, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tool: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 that tells these images, labels and order from any others, wherever they were prepared."""
        shards = [record.sha256 for record in self.shards]
        return hashlib.sha256(json.dumps([self.name, self.classes, shards, self.index.sha256]).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        values = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse manifest.json; raise ValueError, KeyError, TypeError or AttributeError where it is none."""
        values = parse_json(text)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        if values.pop("format") != FORMAT_NAME:
            raise ValueError(f"its format is not {FORMAT_NAME}")
        version = values.pop("format_version")
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(
                f"it has format version {version!r}, and this stylepipe reads versions up to {FORMAT_VERSION}"
            )
        values["index"] = FileRecord(**values["index"])
        if values.get("labels") is not None:
            if version == 1:
                raise ValueError("it names labels, which format version 1 has not")
            values["labels"] = FileRecord(**values["labels"])
        values["shards"] = tuple(FileRecord(**record) for record in values["shards"])
        values["skipped"] = tuple(Skipped(**record) for record in values["skipped"])
        if values["classes"] is not None:
            values["classes"] = tuple(values["classes"])
        manifest = cls(**values)
        manifest._check()
        return manifest

    def files(self) -> Iterator[FileRecord]:
        """Yield the record of every file but the manifest itself."""
        yield from self.shards
        yield from self.side_files()

    def side_files(self) -> Iterator[FileRecord]:
        """Yield the records of the files beside the shards."""
        if self.labels is not None:
            yield self.labels
        yield self.index

    def _check(self) -> None:
        """Raise ValueError where a value is none of its kind: others allocate and open what the manifest says."""
        records = list(self.files())
        texts = [self.name, *(self.classes or ()), *self.tool.values(), *self.options, *self.tool]
        texts += [text for skipped in self.skipped for text in (skipped.file, skipped.reason, skipped.detail)]
        shard_mb = self.options.get("shard_mb", 1)
        if not all(isinstance(text, str) for text in texts) or not _is_name(self.name):
            raise ValueError("a name or another text in it is none")
        "".join(texts).encode()  # half characters can neither be printed nor written
        if not (_is_count(self.resolution) and self.resolution in _RESOLUTIONS):
            raise ValueError(f"its resolution is {one_line(self.resolution)}")
        if self.image_format not in _FORMATS:
            raise ValueError(f"its image_format is {one_line(self.image_format)}")
        if not all(_is_name(record.file) for record in records):
            raise ValueError("a name of a file in it is none within its folder")
        if self.index.file != INDEX_FILE or (self.labels is not None and self.labels.file != LABELS_FILE):
            raise ValueError(f"it has other names for {INDEX_FILE} or {LABELS_FILE}")
        if len({record.file for record in records}) < len(records):
            raise ValueError("it names a file twice")
        if not all(map(_is_count, (self.count, *(n for record in records for n in (record.bytes, record.samples))))):
            raise ValueError("a size or a number of images in it is none")
        if not all(isinstance(record.sha256, str) and _SHA256.fullmatch(record.sha256) for record in records):
            raise ValueError("a SHA-256 in it is none")
        if isinstance(shard_mb, bool) or not isinstance(shard_mb, (int, float)) or not 0 < shard_mb <= MAX_SHARD_MB:
            raise ValueError(f"its shard_mb is {one_line(shard_mb)}")


def _is_name(name: Any) -> bool:
    """Tell whether this can be the name of something within a folder, and be shown."""
    return (
        isinstance(name, str)
        and name not in (".", "..")
        and "/" not in name
        and name.isprintable()
        and 0 < len(name) <= _LONGEST_NAME
    )


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < _MAX_BYTES
