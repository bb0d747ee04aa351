"""What a prepared folder says about itself in manifest.json; see shards.py for the files it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_NAME = "stylepipe-shards"
FORMAT_VERSION = 3  # 1 and 2 have no CRC in the index; 1 has no key for labels.npy
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.npy"
LABELS_FILE = "labels.npy"
LEVEL_OF = "level_of"  # option of a smaller level: the `digest` of the full images it was averaged from


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
        """Parse manifest.json; raise ValueError, KeyError or TypeError where it is none."""
        values = json.loads(text)
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
        if any(Path(record.file).name != record.file for record in manifest.files()):
            raise ValueError("it names a file outside its folder")
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
