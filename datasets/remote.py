"""A dataset on a web server, in an object store or behind a command.

It is either copied here as a whole, or read in windows of shards: index and labels are copied, shards come when the
order of the run comes to them, and stay as long as there is room.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from stylepipe.datasets.fetching import RetryPolicy, fetch, patiently
from stylepipe.datasets.levels import level_resolutions
from stylepipe.datasets.manifest import LEVEL_OF, MANIFEST_FILE, FileRecord, Manifest
from stylepipe.datasets.resuming import resumable_folder
from stylepipe.datasets.shard_cache import ShardCache
from stylepipe.datasets.shard_files import ShardFile, open_files_limit
from stylepipe.datasets.shards import (
    LEVELS_FOLDER,
    ShardDataset,
    file_sha256,
    is_prepared,
    level_folder,
    load_manifest,
    stored_levels,
)
from stylepipe.datasets.store import RemoteError, Store, open_store
from stylepipe.errors import UserError
from stylepipe.files import atomic_path
from stylepipe.parsing import one_line

log = logging.getLogger(__name__)

GB = 10**9

_NOT_FOUND = (404, 410)


def is_remote(data: str | Path) -> bool:
    """Tell whether `--data` names a location rather than a path."""
    return re.match(r"\w+://|pipe:", str(data)) is not None


class UnreachableError(UserError):
    """Tells that a location did not answer, or not well; what it holds is not known."""


class RemoteDataset:
    """What a location holds.

    Args:
        location: see `stylepipe.datasets.store.open_store`.
        manifest: of the dataset there, if it is known; else it is read.

    Attributes:
        manifest: of the dataset there.

    Raises:
        UnreachableError: there is no answer.
        UserError: it holds no dataset.
    """

    def __init__(self, location: str, manifest: Manifest | None = None) -> None:
        self._store = open_store(location)
        try:
            self.manifest = _read_manifest(self._store, MANIFEST_FILE) if manifest is None else manifest
        except RemoteError as error:
            expected = "expected a dataset that `stylepipe prepare` made at --data"
            kind = UnreachableError if error.retry else UserError
            raise kind(f"{error}; {expected}, on a server that can be reached") from error

    @property
    def c_dim(self) -> int:
        """Number of classes or length of the label vectors; 0 without labels."""
        if self.manifest.labels is None:
            return len(self.manifest.classes or ())
        header = 128  # bytes of an array file of two dimensions, before its numbers
        return (self.manifest.labels.bytes - header) // (4 * self.manifest.count)

    def download(self, out: Path, levels: int | None = None, *, shards: bool = True) -> None:
        """Copy it into the new folder `out`, every file checked by its hash; a download that was cut goes on.

        Args:
            out: must not exist, or be empty; it appears when it is whole.
            levels: also copy the stored levels from this resolution up, where they are there.
            shards: without them, `out` is for `WindowedDataset`.

        Raises:
            UserError: a file cannot be had, or `out` cannot be written.
        """
        # Files are named when they are whole, so what is there is all the progress there is.
        with resumable_folder(out, self.manifest.digest, lambda folder, progress: True) as work:
            work.mark({})
            for within, manifest in self._parts(levels):
                self._copy(manifest.files() if shards else manifest.side_files(), within, work.folder)
                (work.folder / within / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")

    def add_levels(self, folder: Path, levels: int) -> None:
        """Copy the indices of the stored levels from a resolution up into a folder from `download` without shards."""
        for within, manifest in self._parts(levels):
            if within and not is_prepared(folder / within):
                self._copy(manifest.side_files(), within, folder)
                with atomic_path(folder / within / MANIFEST_FILE) as path:
                    path.write_text(manifest.to_json(), encoding="utf-8")

    def windowed(self, folder: Path, window_shards: int, limit_bytes: int | None) -> WindowedDataset:
        """Return the dataset, with shards that come into `folder` when they are needed.

        Args:
            folder: with its index and labels, from `download` without shards.
            window_shards: the most shards of a window of the order in which it will be read.
            limit_bytes: that shards may have here; None: no limit.

        Raises:
            UserError: the limit is smaller than two windows, or the folder cannot be used.
        """
        whole = ShardDataset(folder, load_manifest(folder))
        levels = [_level_of(whole, resolution) for resolution in stored_levels(whole.levels)]
        for dataset in (whole, *levels):
            dataset.check_index()
        shards, parts = list(whole.manifest.shards), {whole.resolution: 0}
        for level in levels:
            parts[level.resolution] = len(shards)
            within = level.path.relative_to(folder)
            shards += [replace(record, file=f"{within.as_posix()}/{record.file}") for record in level.manifest.shards]
        _check_windows([whole, *levels], window_shards, limit_bytes)
        return WindowedDataset(folder, whole.manifest, ShardCache(self._store, shards, folder, limit_bytes), parts)

    def _copy(self, records: Iterable[FileRecord], within: str, folder: Path) -> None:
        """Download files of a part, those that are not here and whole already."""
        (folder / within).mkdir(parents=True, exist_ok=True)
        for record in records:
            target = folder / within / record.file
            if not (target.exists() and file_sha256(target) == record.sha256):
                log.info("downloading %s (%.0f MB)", within + record.file, record.bytes / 1e6)
                fetch(self._store, within + record.file, target, size=record.bytes, sha256=record.sha256)

    def _parts(self, levels: int | None) -> Iterator[tuple[str, Manifest]]:
        """Yield the folders within the dataset and their manifests: its levels, then the dataset itself."""
        for resolution in [] if levels is None else level_resolutions(self.manifest.resolution, levels):
            folder = f"{LEVELS_FOLDER}/{resolution:04d}/"
            try:
                yield folder, _read_manifest(self._store, folder + MANIFEST_FILE)
            except RemoteError as error:
                if error.status not in _NOT_FOUND:
                    raise
        yield "", self.manifest


class WindowedDataset(ShardDataset):
    """A remote dataset of which only some shards are here at a time, for a `WindowOrder`; see `RemoteDataset.windowed`.

    Args:
        folder: with the index and labels of the images and of their levels.
        manifest: of the images.
        cache: of the shards of all levels.
        parts: the number in the cache of the first shard of each resolution.
    """

    def __init__(self, folder: Path, manifest: Manifest, cache: ShardCache, parts: Mapping[int, int]) -> None:
        super().__init__(folder, manifest, shards=_Part(cache, parts[manifest.resolution]))
        self._cache, self._parts = cache, parts

    waits = True

    @property
    def previewed(self) -> range:
        """The images of the first shard."""
        return range(self.manifest.shards[0].samples)

    def level(self, resolution: int) -> ShardDataset:
        """See `ShardDataset.level`."""
        if resolution == self.resolution:
            return self
        if resolution not in self._parts:
            raise UserError(
                f"{self.name}: has no images of {resolution} px where it is stored; prepare it again with --levels, or "
                f"train with --data-window 0, which copies all of it and makes them here"
            )
        folder = level_folder(self.levels, resolution)
        return WindowedDataset(folder, load_manifest(folder), self._cache, self._parts)


class _Part(NamedTuple):
    """The shards of one resolution in a cache, as `Shards`."""

    cache: ShardCache
    first: int

    def open(self, shard: int) -> ShardFile:
        return self.cache.open(self.first + shard)

    def prefetch(self, shards: Collection[int]) -> None:
        self.cache.prefetch([self.first + shard for shard in shards])

    def renew(self, shard: int, damaged: ShardFile) -> bool:
        return self.cache.renew(self.first + shard, damaged)

    def close(self) -> None:
        self.cache.close()


def _level_of(dataset: ShardDataset, resolution: int) -> ShardDataset:
    folder = level_folder(dataset.levels, resolution)
    manifest = load_manifest(folder)
    if manifest.options.get(LEVEL_OF) != dataset.manifest.digest:
        raise UserError(
            f"{dataset.name}: what is stored as its level of {resolution} px is one of other images; copy the dataset "
            f"there again"
        )
    return ShardDataset(folder, manifest)


def _check_windows(levels: Sequence[ShardDataset], window_shards: int, limit_bytes: int | None) -> None:
    """Refuse windows of which two, one to read and one to come, are more than may be here or may be open."""
    ranges = levels[0].ranges_of_shards()
    most_bytes, most_files = 0, 0
    for level in levels:
        sizes = [record.bytes for record in level.manifest.shards]
        touched = [level.shards_of([ids]) for ids in ranges]
        windows = sorted((sum(sizes[shard] for shard in shards) for shards in touched), reverse=True)
        most_bytes = max(most_bytes, min(2 * sum(windows[:window_shards]), sum(sizes)))
        files = sorted(map(len, touched), reverse=True)
        most_files = max(most_files, min(2 * sum(files[:window_shards]), len(sizes)))
    if limit_bytes is not None and limit_bytes < most_bytes:
        raise UserError(
            f"--data-cache-gb {limit_bytes / GB:g}: two windows of {window_shards} shards, one to read and one to "
            f"come, take up to {most_bytes / GB:.3g} GB; allow that much, or use a smaller --data-window"
        )
    if most_files > (limit := open_files_limit()) // 2:
        raise UserError(
            f"--data-window {window_shards}: the shards of two windows are kept open, up to {most_files:,}, and this "
            f"process may open {limit:,} files; use a smaller window, or raise the limit: ulimit -n {4 * most_files}"
        )


def _read_manifest(store: Store, name: str) -> Manifest:
    try:
        return Manifest.from_json(patiently(lambda: store.read(name), RetryPolicy(tries=3)).decode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{store.url(name)}: is not the manifest of a dataset that can be read here ({one_line(error)})"
        ) from error
