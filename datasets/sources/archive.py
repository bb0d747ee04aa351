"""Photographs in a zip, in a tar, or in the tars of WebDataset shards."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from stylepipe.datasets.manifest import Skipped
from stylepipe.datasets.photos import printable
from stylepipe.datasets.sources import MAX_FILE_BYTES
from stylepipe.datasets.sources.tars import Member, scan_tar
from stylepipe.errors import UserError
from stylepipe.parsing import one_line

LABEL_SUFFIXES = (".cls", ".json")


class ZipSource:
    """The files of a zip archive; see `stylepipe.datasets.sources.Source`. Nothing is ever unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        try:
            infos = [info for info in self._open().infolist() if not info.is_dir()]
        except Exception as error:  # zipfile has no one kind for damage
            found = one_line(error) or type(error).__name__
            raise UserError(f"{path}: is no zip archive that can be read ({found}); copy it again") from error
        encrypted = {info.filename for info in infos if info.flag_bits & 1}
        self.files, self.skipped = sorted_out([info.filename for info in infos], encrypted)

    def read(self, name: str) -> bytes:
        try:
            archive = self._open()
            if archive.getinfo(name).file_size > MAX_FILE_BYTES:  # never more is read than is claimed
                raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
            return archive.read(name)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # zipfile and its decompressors have no one kind for damage
            raise ValueError(one_line(error) or type(error).__name__) from error

    def stamps(self) -> Iterator[bytes]:
        yield _stamp(self.path)

    def label_of(self, name: str) -> None:
        del name

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.path)
        return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}


class _Place(NamedTuple):
    tar: int
    member: Member


class TarSource:
    """The files of a tar, or of the tars of WebDataset shards; see `stylepipe.datasets.sources.Source`.

    Members whose names differ from the first dot of the last part on are one sample: an image, and what belongs to it.
    Of these, .cls and .json are its label, and others that are no images are passed over. Names are those of the
    members; one that an earlier tar has as well comes behind the name of its own.
    """

    def __init__(self, path: Path, tars: Iterable[Path]) -> None:
        self.path = path
        self._tars = tuple(tars)
        self._descriptors: dict[int, int] = {}
        places: dict[str, _Place] = {}
        names: list[str] = []
        faults: list[Skipped] = []
        for number, tar in enumerate(self._tars):
            members, wrong = scan_tar(tar)
            faults += [Skipped(printable(tar.name), "damaged archive", text) for text in wrong]
            for member in members:
                name = member.name
                if name in places and places[name].tar != number:
                    name = f"{tar.name}/{name}"
                names.append(name)
                places.setdefault(name, _Place(number, member))
        images, self._labels = _samples(names)
        self.files, skipped = sorted_out(images, set())
        self.skipped = (*faults, *skipped)
        self._places = {name: places[name] for name in (*self.files, *self._labels.values())}

    def read(self, name: str) -> bytes:
        number, member = self._places[name]
        if member.size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        if number not in self._descriptors:
            self._descriptors[number] = os.open(self._tars[number], os.O_RDONLY | os.O_CLOEXEC)
        data = os.pread(self._descriptors[number], member.size, member.offset)
        if len(data) != member.size:
            raise ValueError(f"the archive ends after {len(data):,} of its {member.size:,} bytes")
        return data

    def stamps(self) -> Iterator[bytes]:
        yield from map(_stamp, self._tars)

    def label_of(self, name: str) -> bytes | None:
        return self.read(self._labels[name]) if name in self._labels else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)


def sorted_out(names: Iterable[str], encrypted: set[str]) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    """Return the names of an archive that are read, sorted by their bytes, and why others are not."""
    kept: set[str] = set()
    skipped = []
    for name in names:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts:
            skipped.append(Skipped(printable(name), "outside the archive"))
        elif not parts or any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX":
            skipped.append(Skipped(printable(name), "hidden"))
        elif name in encrypted:
            skipped.append(Skipped(printable(name), "unreadable", "encrypted"))
        elif name in kept:
            skipped.append(Skipped(printable(name), "twice", "the archive holds another file of that name"))
        else:
            kept.add(name)
    return tuple(sorted(kept, key=os.fsencode)), tuple(skipped)


def _samples(names: Iterable[str]) -> tuple[list[str], Mapping[str, str]]:
    """Return the members that may be images, and the name of the label of each that has one."""
    of_key: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        of_key.setdefault(f"{folder}/{last.lstrip('.').partition('.')[0]}", []).append(name)
    image_suffixes = Image.registered_extensions()
    images, labels = [], {}
    for members in of_key.values():
        found = [name for name in members if Path(name).suffix.lower() in image_suffixes]
        beside = [name for name in members if Path(name).suffix.lower() in LABEL_SUFFIXES]
        images += found or [name for name in members if name not in beside or len(members) == 1]
        for name in found if beside else ():
            labels[name] = min(beside, key=lambda label: LABEL_SUFFIXES.index(Path(label).suffix.lower()))
    return images, labels


def _stamp(path: Path) -> bytes:
    status = os.stat(path)
    return b"\0%s\0%d\0%d" % (os.fsencode(path.name), status.st_size, status.st_mtime_ns)
