"""Which kind of source a path is."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from stylepipe.datasets.shards import is_prepared
from stylepipe.datasets.sources import Source
from stylepipe.datasets.sources.archive import TarSource, ZipSource
from stylepipe.datasets.sources.folder import FolderSource
from stylepipe.datasets.sources.lmdb import DATA_FILE, LmdbSource
from stylepipe.errors import UserError
from stylepipe.parsing import one_line

EXPECTED = "expected a folder of photographs, a zip, a tar, a folder of WebDataset shards, or an LMDB"


def open_source(path: str | Path) -> Source:
    """Open photographs, whatever holds them.

    Raises:
        UserError: it is missing, empty, something else, or a dataset that is prepared already.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {EXPECTED}")
    source = _of_folder(path) if path.is_dir() else _of_file(path)
    if not source.files:
        skipped = source.skipped
        left_out = f" but {one_line(skipped[0].file)}, which is skipped ({skipped[0].reason})" if skipped else ""
        raise UserError(f"{path}: holds no files{left_out}; {EXPECTED}")
    return source


def _of_folder(path: Path) -> Source:
    if is_prepared(path):
        raise UserError(f"{path}: is a prepared dataset already; train on it with --data {path}")
    if (path / DATA_FILE).is_file():
        return LmdbSource(path)
    try:
        names = sorted(os.listdir(path), key=os.fsencode)
    except OSError:
        return FolderSource(path)  # which says what is wrong
    shards = [path / name for name in names if name.endswith(".tar") and not name.startswith(".")]
    beside = [name for name in names if not name.startswith(".") and not name.endswith((".tar", ".json", ".txt"))]
    return TarSource(path, shards) if shards and not beside else FolderSource(path)


def _of_file(path: Path) -> Source:
    if zipfile.is_zipfile(path):
        return ZipSource(path)
    if path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UserError(f"{path}: is compressed, which cannot be read at any place; decompress it first")
    if path.suffix == ".tar":
        return TarSource(path, [path])
    raise UserError(f"{path}: is a file of another kind; {EXPECTED}")
