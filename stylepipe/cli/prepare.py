"""`stylepipe prepare SOURCE OUT --res R`: photographs to shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from stylepipe.datasets.manifest import MANIFEST_FILE, Manifest
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.shards import open_dataset, stored_levels


@dataclass(frozen=True)
class PrepareOptions:
    """Turn photographs into shards to train on: plain WebDataset tars, an index and a manifest.

    Each photograph is turned upright, cropped to a square, converted to 8-bit sRGB and resized with a Lanczos filter.
    Files that give no image are named in the manifest with the reason. The result is the same to the byte for any
    number of workers.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of photographs, searched recursively; or a zip, a tar, a folder of WebDataset shards or an LMDB of them.
    Any format that Pillow reads."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """New folder for the shards. It appears when it is whole."""
    how: Annotated[Preparation, tyro.conf.arg(name="")]
    workers: int | None = None
    """Processes that decode and resize. Default: one per core."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare a dataset and print one line about it."""
    options = tyro.cli(PrepareOptions, prog="stylepipe prepare", args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    manifest = prepare(options.source, options.out, options.how, workers=options.workers)
    print(summary(manifest, options.out))


def summary(manifest: Manifest, out: Path) -> str:
    """Say in one line what was written, where, and how many files were skipped why."""
    size = sum(record.bytes for record in manifest.files())
    dataset = open_dataset(out)
    levels = [dataset.level(resolution).manifest for resolution in stored_levels(dataset.levels)]
    classes = (
        f" of {len(manifest.classes)} classes" if manifest.classes else " with label vectors" if manifest.labels else ""
    )
    line = f"{manifest.count:,} images{classes} at {manifest.resolution} px in {out} ({size / 1e6:,.1f} MB)"
    if levels:
        more = sum(record.bytes for level in levels for record in level.files())
        line += f" and from {levels[0].resolution} to {levels[-1].resolution} px ({more / 1e6:,.1f} MB)"
    if not manifest.skipped:
        return f"{line}; no file skipped"
    reasons = Counter(skipped.reason for skipped in manifest.skipped)
    counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
    return f"{line}; skipped {counted} (named in {MANIFEST_FILE})"
