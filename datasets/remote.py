"""A dataset on a web server, in an object store or behind a command, copied here once to be trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from stylepipe.datasets.fetching import fetch
from stylepipe.datasets.levels import level_resolutions
from stylepipe.datasets.manifest import MANIFEST_FILE, Manifest
from stylepipe.datasets.resuming import resumable_folder
from stylepipe.datasets.shards import LEVELS_FOLDER, file_sha256
from stylepipe.datasets.store import RemoteError, Store, open_store
from stylepipe.errors import UserError

log = logging.getLogger(__name__)

_NOT_FOUND = (404, 410)


def is_remote(data: str | Path) -> bool:
    """Tell whether `--data` names a location rather than a path."""
    return "://" in str(data) or str(data).startswith("pipe:")


class RemoteDataset:
    """What a location holds.

    Args:
        location: see `stylepipe.datasets.store.open_store`.

    Attributes:
        manifest: of the dataset there.

    Raises:
        UserError: it cannot be reached, or holds no dataset.
    """

    def __init__(self, location: str) -> None:
        self._store = open_store(location)
        try:
            self.manifest = _read_manifest(self._store, MANIFEST_FILE)
        except RemoteError as error:
            raise UserError(f"{error}; expected a dataset that `stylepipe prepare` made at --data") from error

    @property
    def c_dim(self) -> int:
        """Number of classes or length of the label vectors; 0 without labels."""
        if self.manifest.labels is None:
            return len(self.manifest.classes or ())
        header = 128  # bytes of an array file of two dimensions, before its numbers
        return (self.manifest.labels.bytes - header) // (4 * self.manifest.count)

    def download(self, out: Path, levels: int | None = None) -> None:
        """Copy it into the new folder `out`, every file checked by its hash; a download that was cut goes on.

        Args:
            out: must not exist, or be empty; it appears when it is whole.
            levels: also copy the stored levels from this resolution up, where they are there.

        Raises:
            UserError: a file cannot be had, or `out` cannot be written.
        """
        # Files are named when they are whole, so what is there is all the progress there is.
        with resumable_folder(out, self.manifest.digest, lambda folder, progress: True) as work:
            work.mark({})
            for folder, manifest in self._parts(levels):
                (work.folder / folder).mkdir(parents=True, exist_ok=True)
                for record in manifest.files():
                    target = work.folder / folder / record.file
                    if not (target.exists() and file_sha256(target) == record.sha256):
                        log.info("downloading %s (%.0f MB)", folder + record.file, record.bytes / 1e6)
                        fetch(self._store, folder + record.file, target, size=record.bytes, sha256=record.sha256)
                (work.folder / folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")

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


def _read_manifest(store: Store, name: str) -> Manifest:
    try:
        return Manifest.from_json(store.read(name).decode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{store.url(name)}: is not the manifest of a dataset that can be read here ({error})"
        ) from error
