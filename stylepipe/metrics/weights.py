"""Weights of published feature networks: files that the user has, found and checked; nothing is downloaded.

A file is looked for in the folder that STYLEPIPE_WEIGHTS names, in `weights` of stylepipe's cache, and where torch.hub
keeps what other programs have downloaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from stylepipe.errors import UserError

WEIGHTS_VARIABLE = "STYLEPIPE_WEIGHTS"


@dataclass(frozen=True)
class WeightFile:
    """A file of weights as its authors published it.

    Attributes:
        name: of the file.
        url: where users get it.
        sha256: how its digest begins; None where no digest has been published.
    """

    name: str
    url: str
    sha256: str | None = None


@dataclass(frozen=True)
class FoundWeights:
    """A file of weights that is here.

    Attributes:
        path: of the file.
        sha256: its whole digest.
    """

    path: Path
    sha256: str


def find_weights(file: WeightFile, cache: Path) -> FoundWeights:
    """Find a file and check that it is the published one.

    Args:
        file: what is looked for.
        cache: stylepipe's cache folder.

    Raises:
        UserError: it is nowhere, or is another file; says what to put where.
    """
    folders = weight_folders(cache)
    for folder in folders:
        path = folder / file.name
        if path.is_file():
            try:
                digest = _checked_digest(path, path.stat().st_mtime_ns)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from error
            if file.sha256 is not None and not digest.startswith(file.sha256):
                raise UserError(
                    f"{path}: is not the published file (SHA-256 {digest[:8]}... instead of {file.sha256}...); get it "
                    f"again from {file.url}"
                )
            return FoundWeights(path, digest)
    raise UserError(f"{file.name} is not here: put the file from {file.url} into {folders[0]}")


def weight_folders(cache: Path) -> list[Path]:
    """Return where weights are looked for, in this order."""
    asked = os.environ.get(WEIGHTS_VARIABLE)
    return [*([Path(asked)] if asked else []), cache / "weights", Path(torch.hub.get_dir()) / "checkpoints"]


@contextmanager
def as_downloaded(files: Sequence[FoundWeights]) -> Iterator[None]:
    """Let libraries that download through torch.hub find these files there already."""
    before = torch.hub.get_dir()
    with TemporaryDirectory(prefix="stylepipe-weights-") as folder:
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        for file in files:
            (checkpoints / file.path.name).symlink_to(file.path.resolve())
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


@lru_cache
def _checked_digest(path: Path, changed: int) -> str:
    """Return the digest of a file, and see that it holds tensors only: libraries would run whatever else is in it."""
    del changed  # a file that is replaced is read again
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises many types
        raise UserError(f"{path}: holds no plain tensors ({' '.join(str(error).split())[:200]})") from error
    return digest
