"""The prepared dataset: what stands on disk, and random access to it.

    OUT/
      shard-00000.tar ...   plain WebDataset tars; sample 17 is `00000017.png` (or `.jpg`), and with labels
                            `00000017.cls`, the class number in ASCII, or `00000017.json`, a list of numbers.
                            Sizes, owners and times are fixed, so equal samples give equal bytes.
      index.npy             one record per sample: shard, offset and size of the image, class number (-1: none), and
                            from format 3 on the CRC-32 of the image
      labels.npy            with label vectors only: the same as the .json members, [count, c_dim] float32
      manifest.json         `Manifest`; written last, so a folder with a manifest is whole
      levels/0008/ ...      with --levels only: the same images box-averaged to 8 px, a dataset like this one (see
                            levels.py); up to 64 px its images are `.ppm`, which is bare pixels behind a short header

Any WebDataset reader can stream the tars. Here the index gives random access by pread instead, which is
faster and lets the order of the data be a pure function of the position (see order.py).
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stylepipe.datasets.decoding import check_header, decode_into
from stylepipe.datasets.manifest import FORMAT_NAME, INDEX_FILE, LABELS_FILE, LEVEL_OF, MANIFEST_FILE, Manifest
from stylepipe.datasets.order import GlobalOrder, Order, WindowOrder
from stylepipe.datasets.shard_files import LocalShards, ShardFile, Shards
from stylepipe.errors import UserError
from stylepipe.files import cache_folder
from stylepipe.parsing import one_line

INDEX_DTYPE_V1 = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("label", "<i4")])
INDEX_DTYPE = np.dtype([*INDEX_DTYPE_V1.descr, ("crc", "<u4")])
LEVELS_FOLDER = "levels"

FOREIGN_TARS = (
    f"holds tar files but no {MANIFEST_FILE}, so they were not made by `stylepipe prepare`; "
    "prepare them first: stylepipe prepare"
)

_HEADERS_CHECKED = 64


class ShardDataset:
    """Random access to a prepared folder; may be used by several threads.

    Cheap to pickle; files are opened where they are read.

    Attributes:
        path: the folder.
        manifest: what it holds.
        levels: where its smaller levels are, if there are any.
        shards: where its shards come from, those of its folder by default.
    """

    def __init__(
        self, path: Path, manifest: Manifest, levels: Path | None = None, shards: Shards | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.levels = path / LEVELS_FOLDER if levels is None else levels
        self.shards: Shards = LocalShards(path, manifest.shards) if shards is None else shards
        self._index = _load_index(path, manifest)
        self._vectors = _load_vectors(path, manifest)

    @property
    def name(self) -> str:
        """The name of the data, for run directories: that of the folder it was prepared from."""
        return self.manifest.name

    @property
    def resolution(self) -> int:
        """Height and width of every image, in pixels."""
        return self.manifest.resolution

    waits = False
    """Reading may have to wait for a server."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes that labels are of, if they are."""
        return self.manifest.classes

    @property
    def summary(self) -> str:
        """What it holds, in words."""
        return f"{len(self)} images"

    @property
    def facts(self) -> dict[str, Any]:
        """What tells it from other data, for the states of a run."""
        return {"name": self.name, "images": len(self), "digest": self.manifest.digest}

    @property
    def previewed(self) -> range:
        """The images that a look at the data chooses from: all, where any can be read at any time."""
        return range(len(self))

    @property
    def c_dim(self) -> int:
        """Number of classes or length of the label vectors; 0 without labels."""
        return len(self.manifest.classes or ()) if self._vectors is None else int(self._vectors.shape[1])

    def __len__(self) -> int:
        return self.manifest.count

    def read(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Decode images: [n, R, R, 3] uint8, NHWC. Raise UserError naming a sample that cannot be read."""
        images = np.empty((len(ids), self.resolution, self.resolution, 3), dtype=np.uint8)
        for image, sample in zip(images, ids, strict=True):
            self.read_into(int(sample), image)
        return images

    def read_into(self, sample: int, out: npt.NDArray[np.uint8]) -> None:
        """Decode one image into `out`, [R, R, 3] uint8, contiguous. Raise UserError naming it if it cannot be read."""
        self.visit(sample, lambda data: decode_into(data, out))

    def visit(self, sample: int, use: Callable[[bytes], object]) -> None:
        """Pass the bytes of an image's file on; raise UserError naming it if it cannot be read, or `use` raises."""
        shard, size, offset, _, *crc = self._index[sample].item()

        def attempt(file: ShardFile) -> None:
            data = file.read(size, offset)
            if crc and zlib.crc32(data) != crc[0]:
                raise ValueError("its bytes are not those that were stored")
            use(data)

        try:
            file = self.shards.open(shard)
            try:
                attempt(file)
            except Exception:
                if not self.shards.renew(shard, file):
                    raise
                attempt(self.shards.open(shard))
        except (MemoryError, UserError):
            raise
        except Exception as error:  # decoders raise many types on damaged data
            from_system = isinstance(error, OSError) and error.errno is not None
            remedy = "check that the disk is there" if from_system else _remedy(self.path, self.manifest)
            file = self.path / self.manifest.shards[shard].file
            raise UserError(f"{file}: sample {sample:08d} cannot be read ({error}); {remedy}") from error

    def prefetch(self, ranges: Sequence[range]) -> None:
        """Announce that the images of these ranges of ids will be read after those that were announced before."""
        self.shards.prefetch(self.shards_of(ranges))

    def order(self, window_shards: int, seed: int) -> Order:
        """Return an order of the images: in windows of so many shards, or over all (0)."""
        if window_shards == 0:
            return GlobalOrder(len(self), seed)
        return WindowOrder([record.samples for record in self.manifest.shards], window_shards, seed)

    def ranges_of_shards(self) -> list[range]:
        """Return the images of each shard, as ranges of ids."""
        ends = accumulate(record.samples for record in self.manifest.shards)
        return [range(end - record.samples, end) for record, end in zip(self.manifest.shards, ends, strict=True)]

    def shards_of(self, ranges: Sequence[range]) -> list[int]:
        """Return the shards that hold these ranges of ids, ascending."""
        shards = self._index["shard"]
        return sorted({shard for r in ranges for shard in range(shards[r.start], shards[r.stop - 1] + 1)})

    def labels(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the label vectors, of classes one-hot: [n, c_dim] float32; [n, 0] without labels."""
        if self._vectors is not None:
            return np.array(self._vectors[np.asarray(ids, dtype=np.int64)])
        one_hot = np.zeros((len(ids), self.c_dim), dtype=np.float32)
        if self.c_dim:
            one_hot[np.arange(len(ids)), self._index["label"][np.asarray(ids)]] = 1
        return one_hot

    def label(self, sample: int) -> int | npt.NDArray[np.float32] | None:
        """Return one label as it is stored: the number of a class, a vector [c_dim] float32, or None."""
        if self._vectors is not None:
            return np.array(self._vectors[sample])
        return int(self._index["label"][sample]) if self.c_dim else None

    def of_class(self, number: int) -> npt.NDArray[np.int64]:
        """Return which images are of a class, in order: [n] int64."""
        return np.flatnonzero(self._index["label"] == number)

    def level(self, resolution: int) -> ShardDataset:
        """Return the same images, labels and order at another resolution: itself at its own, else a stored level.

        Raise UserError where that level is not stored, is damaged, or is one of other images.
        """
        if resolution == self.resolution:
            return self
        folder = level_folder(self.levels, resolution)
        if not is_prepared(folder):
            raise UserError(
                f"{self.levels}: holds no images of {resolution} px; prepare the photographs again with --levels, "
                f"which stores every power of two below --res"
            )
        level = open_dataset(folder)
        if level.resolution != resolution or level.manifest.options.get(LEVEL_OF) != self.manifest.digest:
            raise UserError(f"{folder}: holds no level of the images in {self.path}; {_remove_levels(self.levels)}")
        return level

    def check_index(self) -> None:
        """See that the index places every image inside of its shard; raise UserError."""
        if any(record.samples < 1 for record in self.manifest.shards) or not self.manifest.shards:
            raise _damaged(self.path, self.manifest, f"{MANIFEST_FILE} names a shard without images, or none at all")
        bounds = np.cumsum([0, *(record.samples for record in self.manifest.shards)])
        if bounds[-1] != len(self):
            raise _damaged(self.path, self.manifest, f"{MANIFEST_FILE} counts {len(self):,} images and others by shard")
        for shard, record in enumerate(self.manifest.shards):
            rows = self._index[bounds[shard] : bounds[shard + 1]]
            # No sum of what stands there: it may be too large for its type, and come round to a small one.
            inside = (rows["size"] <= record.bytes) & (rows["offset"] <= record.bytes - rows["size"].astype(np.int64))
            inside &= rows["shard"] == shard
            if not inside.all():
                sample = bounds[shard] + int(np.argmin(inside))
                raise _damaged(
                    self.path, self.manifest, f"{INDEX_FILE} places sample {sample:08d} outside of its shard"
                )
        if self.manifest.classes is not None:
            known = (self._index["label"] >= 0) & (self._index["label"] < len(self.manifest.classes))
            if not known.all():
                sample = int(np.argmin(known))
                raise _damaged(self.path, self.manifest, f"{INDEX_FILE} gives sample {sample:08d} no class that it has")

    def check_headers(self) -> None:
        """See that the first images of up to 64 shards are what the manifest says; raise UserError naming one."""
        firsts = [ids.start for ids in self.ranges_of_shards()]
        for sample in firsts[:: -(-len(firsts) // _HEADERS_CHECKED)]:
            self.visit(sample, lambda data: check_header(data, self.resolution))

    def close(self) -> None:
        """Close the open shards; reading opens them again."""
        self.shards.close()

    def __getstate__(self) -> dict[str, Any]:
        # Index and labels are mapped again from the files in the other process, not sent through a pipe.
        return {"path": self.path, "manifest": self.manifest, "levels": self.levels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def open_dataset(path: str | Path, resolution: int | None = None, levels: Path | None = None) -> ShardDataset:
    """Open a prepared folder after cheap checks: the manifest, the size of every file, what the index says of them.

    `levels` is where its smaller levels are, if not in the folder itself: see `levels_for_training`.

    Raise UserError where it is no prepared folder, is incomplete, or has another resolution than asked for.
    """
    path = Path(path)
    manifest = load_manifest(path)
    if resolution is not None and manifest.resolution != resolution:
        raise UserError(
            f"{path}: holds images of {manifest.resolution} px, and {resolution} px are asked for; "
            f"use --res {manifest.resolution}, or prepare the photographs again with --res {resolution}"
        )
    for record in manifest.files():
        try:
            size = (path / record.file).stat().st_size
        except OSError as error:
            raise _damaged(path, manifest, f"{record.file} is missing or unreadable ({error.strerror})") from error
        if size != record.bytes:
            raise _damaged(path, manifest, f"{record.file} has {size:,} bytes instead of {record.bytes:,}")
    dataset = ShardDataset(path, manifest, levels)
    dataset.check_index()
    return dataset


def level_folder(levels: Path, resolution: int) -> Path:
    """Return where the level of a resolution is stored."""
    return levels / f"{resolution:04d}"


def stored_levels(levels: Path) -> list[int]:
    """Return the resolutions of the levels that a folder of levels holds, ascending; opens none of them."""
    return sorted(int(folder.name) for folder in levels.glob("[0-9]" * 4) if is_prepared(folder))


def is_prepared(path: str | Path) -> bool:
    """Tell whether a folder holds a prepared dataset: it has a manifest that names our format, whole or damaged."""
    try:
        return FORMAT_NAME.encode() in (Path(path) / MANIFEST_FILE).read_bytes()
    except OSError:
        return False


def load_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a prepared folder; raise UserError saying what the folder is instead."""
    path = Path(path)
    if not path.exists():
        here = " on this machine; only training takes a location" if re.match(r"\w{2,}:/", str(path)) else ""
        raise UserError(f"{path}: no such folder; expected a dataset made by `stylepipe prepare`{here}")
    if not path.is_dir():
        raise UserError(f"{path}: is a file; expected a folder made by `stylepipe prepare`")
    try:
        return Manifest.from_json((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: {_what_stands_there(path)}") from error
    except OSError as error:
        raise UserError(f"{path / MANIFEST_FILE}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / MANIFEST_FILE}: is not the manifest of a dataset that can be read here ({one_line(error)}); "
            "prepare the photographs again"
        ) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_index(path: Path, manifest: Manifest) -> npt.NDArray[np.void]:
    index = _mapped(path, manifest, INDEX_FILE)
    if index.dtype not in (INDEX_DTYPE, INDEX_DTYPE_V1) or index.shape != (manifest.count,):
        raise _damaged(path, manifest, f"{INDEX_FILE} does not hold {manifest.count:,} samples")
    return index


def _load_vectors(path: Path, manifest: Manifest) -> npt.NDArray[np.float32] | None:
    """Return the label vectors [count, c_dim], or None where labels are classes or absent."""
    if manifest.labels is None:
        return None
    vectors = _mapped(path, manifest, LABELS_FILE)
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != manifest.count or not vectors.shape[1]:
        raise _damaged(path, manifest, f"{LABELS_FILE} does not hold {manifest.count:,} label vectors")
    return vectors


def _mapped(path: Path, manifest: Manifest, name: str) -> npt.NDArray[Any]:
    """Map an array file into memory."""
    try:
        array: npt.NDArray[Any] = np.load(path / name, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy takes a header apart as it would Python, and raises whatever that raises
        raise _damaged(path, manifest, f"{name} cannot be read ({one_line(error)})") from error
    return array


def _damaged(path: Path, manifest: Manifest, finding: str) -> UserError:
    return UserError(f"{path}: {finding}; {_remedy(path, manifest)}")


def _remedy(path: Path, manifest: Manifest) -> str:
    if LEVEL_OF in manifest.options:
        return _remove_levels(path.parent)
    if path.resolve().is_relative_to(cache_folder().resolve()):
        return f"remove {path}, and training prepares it again in the cache"
    return "copy the dataset again from its source, or prepare it anew"


def _remove_levels(levels: Path) -> str:
    return f"remove {levels}, and training makes it again in the cache"


def _what_stands_there(path: Path) -> str:
    names = [entry.name for entry in path.iterdir()]
    if not names:
        return "is empty; expected a dataset made by `stylepipe prepare`"
    if any(name.endswith(".tar") for name in names):
        return FOREIGN_TARS
    return f"has no {MANIFEST_FILE}; prepare it first: stylepipe prepare {path} OUT --res R"
