"""What `--data` stands for: a prepared folder, photographs to prepare into the user's cache, or drawn faces."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from stylepipe.datasets.drawn_dataset import DRAWN_COUNTS, draw_dataset
from stylepipe.datasets.labels import find_labels
from stylepipe.datasets.levels import build_levels, level_resolutions
from stylepipe.datasets.manifest import FORMAT_VERSION, Manifest
from stylepipe.datasets.photos import printable
from stylepipe.datasets.preparation import Preparation, check_resolution
from stylepipe.datasets.prepare import prepare, tool_versions
from stylepipe.datasets.remote import RemoteDataset, UnreachableError, is_remote
from stylepipe.datasets.shards import LEVELS_FOLDER, ShardDataset, is_prepared, open_dataset, stored_levels
from stylepipe.datasets.sources.opening import open_source
from stylepipe.datasets.store import redacted
from stylepipe.errors import UserError
from stylepipe.files import CACHE_VARIABLE, atomic_path, cache_folder, locked

_DRAWN_WITHOUT_LABELS = "the built-in faces have no labels; name data that has with --data, or leave out --cond"

log = logging.getLogger(__name__)


def dataset_for_training(
    data: str | Path | None,
    resolution: int,
    *,
    workers: int | None = None,
    labels: bool = False,
    levels: int | None = None,
    progress: bool = True,
) -> Path:
    """Return the prepared folder to train on, made now if need be.

    Several processes may call it at once: one prepares, the others wait for it and use the result.

    Args:
        data: a prepared folder (returned as it is) or the location of one (copied into the cache), photographs as
            `open_source` takes them (prepared into the cache, and again only when its files or the options change), or
            None for the built-in drawn faces.
        resolution: of the images, in pixels.
        workers: processes that prepare; default one per core.
        labels: the training needs labels: those of a prepared folder, or as `prepare` finds them for photographs.
        levels: the training also needs the images at smaller resolutions, from this one up (a power of two, 4 or
            more). A folder prepared now gets them in the same pass; ask `levels_for_training` for them.
        progress: show a progress bar where stderr is a terminal.

    Raises:
        UserError: see `open_dataset` and `prepare`; labels asked for and absent; the cache cannot be written.
    """
    check_resolution(resolution)
    with_levels = levels is not None and bool(level_resolutions(resolution, levels))
    if data is None:
        if labels:
            raise UserError(_DRAWN_WITHOUT_LABELS)
        return _built_once(*_drawn_faces(resolution, workers, with_levels, progress))
    if is_remote(data):
        return _downloaded(str(data), resolution, labels, levels)
    data = Path(data)
    if is_prepared(data):
        if not open_dataset(data, resolution).c_dim and labels:
            raise UserError(f"{data}: has no labels; prepare it again with --labels, or train without --cond")
        return data
    how = Preparation(resolution, labels=labels, levels=with_levels)
    return _built_once(*_photographs(data, how, workers, progress))


def levels_for_training(path: Path, lowest: int, *, workers: int | None = None, progress: bool = True) -> Path:
    """Return the folder of the smaller levels of a prepared dataset, for `open_dataset(path, levels=...)`.

    It is the dataset's own where that holds every power of two from `lowest` to half of the resolution. Else levels are
    made from its shards, once, into the cache; the dataset is never written to. Several processes may call it at once.

    Raises:
        UserError: `path` is no whole dataset, an image cannot be read, `lowest` is none of 4, 8, 16, ..., or the cache
            cannot be written.
    """
    dataset = open_dataset(path)
    needed = set(level_resolutions(dataset.resolution, lowest))
    if needed <= set(stored_levels(dataset.levels)):
        return dataset.levels
    stamp = hashlib.sha256(_options_stamp(dataset.manifest.digest)).hexdigest()
    build = partial(build_levels, dataset, workers=workers, progress=progress)
    return _built_once(
        f"{_file_name(dataset.name)}-{dataset.resolution}-levels-{stamp[:16]}",
        build,
        lambda levels: needed <= set(stored_levels(levels)),
    )


def windowed_for_training(
    location: str,
    resolution: int,
    window_shards: int,
    limit_bytes: int | None = None,
    *,
    labels: bool = False,
    levels: int | None = None,
) -> ShardDataset:
    """Return a remote dataset whose shards come into the cache when a `WindowOrder` comes to them.

    Where a whole copy is in the cache already, it is that copy. Several processes may call it at once, and share what
    has come.

    Args:
        location: of a prepared dataset.
        resolution: of the images, in pixels.
        window_shards: the most shards of a window.
        limit_bytes: that shards may have in the cache; None: no limit.
        labels: the training needs labels.
        levels: the training also needs the images at smaller resolutions, from this one up.

    Raises:
        UserError: it cannot be had, does not fit, or the cache cannot be written.
    """
    remote = _open_remote(location, resolution, labels)
    whole = cache_folder() / "datasets" / _remote_key(remote, levels, "remote")
    if is_prepared(whole):
        return open_dataset(whole, resolution, None if levels is None else levels_for_training(whole, levels))
    key, index = _remote_key(remote, None, "windows"), partial(remote.download, shards=False)
    folder = _built_once(key, index, doing="copying the index")
    if levels is not None:
        needed = set(level_resolutions(resolution, levels))

        def has_levels(built: Path) -> bool:
            return needed <= set(stored_levels(built / LEVELS_FOLDER))

        _built_once(key, partial(remote.add_levels, levels=levels), has_levels, "copying the indices of its levels")
    return remote.windowed(folder, window_shards, limit_bytes)


def label_dimensions(photographs: str | Path | None) -> int:
    """Return the c_dim that photographs will have when they are prepared with labels.

    Raises:
        UserError: it has none, they do not fit, or None is given: the drawn faces have none.
    """
    if photographs is None:
        raise UserError(_DRAWN_WITHOUT_LABELS)
    return find_labels(open_source(photographs)).c_dim


def _downloaded(location: str, resolution: int, labels: bool, levels: int | None) -> Path:
    """Return the copy of a remote dataset in the cache."""
    remote = _open_remote(location, resolution, labels)
    key, download = _remote_key(remote, levels, "remote"), partial(remote.download, levels=levels)
    return _built_once(key, download, doing="copying data once")


def _open_remote(location: str, resolution: int, labels: bool) -> RemoteDataset:
    stamp = hashlib.sha256(location.encode()).hexdigest()[:16]
    seen = cache_folder() / "datasets" / f"location-{stamp}.json"
    remote = _reached(location, seen)
    manifest = remote.manifest
    if manifest.resolution != resolution:
        raise UserError(
            f"--data {redacted(location)}: holds images of {manifest.resolution} px, and {resolution} px are asked "
            f"for; use --res {manifest.resolution}"
        )
    if labels and not (manifest.classes or manifest.labels):
        raise UserError(f"--data {redacted(location)}: has no labels; leave out --cond")
    with suppress(OSError):  # of use later only; what needs the cache now will say so
        seen.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(seen) as path:
            path.write_text(manifest.to_json(), encoding="utf-8")
    return remote


def _reached(location: str, seen: Path) -> RemoteDataset:
    """Return what a location holds, or what it held when it was last reached: all that is needed may be here."""
    try:
        return RemoteDataset(location)
    except UnreachableError as error:
        try:
            manifest = Manifest.from_json(seen.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it is damaged
            raise error from None
        log.warning("%s; going on with what is in the cache", error)
        return RemoteDataset(location, manifest)


def _remote_key(remote: RemoteDataset, levels: int | None, kind: str) -> str:
    manifest = remote.manifest
    parts = [_file_name(manifest.name), str(manifest.resolution), kind, manifest.digest[:16]]
    return "-".join(parts if levels is None else [*parts, f"levels{levels}"])


def _photographs(
    path: Path, how: Preparation, workers: int | None, progress: bool
) -> tuple[str, Callable[[Path], object]]:
    """Return the cache key of photographs and how to prepare them."""
    source = open_source(path)
    # Levels are beside what the key stands for: they are made when they are missing.
    stamp = hashlib.sha256(_options_stamp(asdict(replace(how, levels=False))))
    for part in source.stamps():
        stamp.update(part)
    build = partial(prepare, source, how=how, workers=workers, progress=progress)
    return f"{_file_name(path.resolve().stem)}-{how.res}-{stamp.hexdigest()[:16]}", build


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", printable(name))


def _drawn_faces(
    resolution: int, workers: int | None, levels: bool, progress: bool
) -> tuple[str, Callable[[Path], object]]:
    """Return the cache key of the drawn faces, which the code that draws them is a part of, and how to build them."""
    stamp = hashlib.sha256(_options_stamp(resolution, DRAWN_COUNTS[resolution]))
    for module in sorted(Path(__file__).parent.glob("drawn*.py")):
        stamp.update(module.read_bytes())
    count = DRAWN_COUNTS[resolution]
    build = partial(draw_dataset, resolution=resolution, count=count, levels=levels, workers=workers, progress=progress)
    return f"drawn-{resolution}-{stamp.hexdigest()[:16]}", build


def _options_stamp(*options: object) -> bytes:
    return json.dumps([FORMAT_VERSION, tool_versions(), *options]).encode()


def _built_once(
    key: str,
    build: Callable[[Path], object],
    is_built: Callable[[Path], bool] = is_prepared,
    doing: str = "preparing data once",
) -> Path:
    """Return the folder `key` of the cache, built by one process while the others wait."""
    folder = cache_folder() / "datasets" / key
    if is_built(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f"{key}.lock")):
            if not is_built(folder):
                log.info("%s, into %s", doing, folder)
                build(folder)
    except OSError as error:
        raise UserError(
            f"{folder.parent}: cannot be written ({error.strerror or error}); "
            f"set {CACHE_VARIABLE} to a folder that can, with room for the data"
        ) from error
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that ends with this process, however it ends; say so when it has to wait."""
    with locked(path, wait=False) as held:
        if held:
            yield
            return
    log.warning("another process is preparing the same data; waiting for it (lock: %s)", path)
    with locked(path):
        yield
