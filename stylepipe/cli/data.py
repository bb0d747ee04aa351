"""`stylepipe data`: look at a prepared dataset, check it to the last image, save what is whole of it, draw faces."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stylepipe.datasets.drawn_dataset import draw_dataset, draw_folder
from stylepipe.datasets.preparation import check_resolution
from stylepipe.datasets.shards import ShardDataset, open_dataset, stored_levels
from stylepipe.datasets.verifying import Fault, find_faults, repair
from stylepipe.errors import UserError
from stylepipe.images import check_suffix, grid_shape, make_grid, save_image
from stylepipe.parsing import one_line

EXIT_FAULTS = 1
_SHOWN = 50  # faults, classes and reasons that are listed one by one
_LINE = 1000  # characters


@dataclass(frozen=True)
class Inspect:
    """Tell what a prepared dataset holds: counts, sizes, labels, levels, and what was left out of it."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The dataset."""
    sheet: Path | None = None
    """Also write a contact sheet of images spread over all of it: a .png or .webp."""


@dataclass(frozen=True)
class Verify:
    """Check every hash of a prepared dataset and decode every image; name each fault, and exit with 1 if there is one.

    Levels are checked too.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The dataset. It is only read."""
    repair: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """If there is a fault, write all images that are whole into this new folder, in their order and with their bytes
    and labels."""
    workers: int | None = None
    """Processes that decode. Default: one per core."""


@dataclass(frozen=True)
class Faces:
    """Write the drawn faces that are built in, as pictures or ready to train on."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """New folder."""
    res: int
    """Resolution in pixels, a power of two from 8 to 1024."""
    count: int = 1024
    """How many."""
    seed: int = 0
    """Which; the built-in ones are of seed 0."""
    form: Annotated[Literal["folder", "shards"], tyro.conf.arg(name="as")] = "folder"
    """A folder of PNG files, or a dataset as `stylepipe prepare` makes it."""
    levels: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With shards: store smaller images too, for presets that grow."""
    workers: int | None = None
    """Processes that draw. Default: one per core."""


COMMANDS: dict[str, Callable[..., Inspect | Verify | Faces]] = {"inspect": Inspect, "verify": Verify, "faces": Faces}


def main(argv: Sequence[str] | None = None) -> None:
    """Inspect, verify or draw; exits with 1 where a dataset has a fault."""
    args = list(sys.argv[1:] if argv is None else argv)
    chosen = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=args, prog="stylepipe data")
    if isinstance(chosen, Inspect):
        inspect(chosen)
    elif isinstance(chosen, Verify):
        verify(chosen)
    else:
        faces(chosen)


def inspect(options: Inspect) -> None:
    """Print what a dataset holds, and write its contact sheet if asked for."""
    if options.sheet is not None:
        check_suffix(options.sheet)
    dataset = open_dataset(options.folder)
    print("\n".join(one_line(line, _LINE) for line in described(dataset)))
    if options.sheet is not None:
        columns, rows = grid_shape(dataset.resolution)
        count = min(columns * rows, len(dataset))
        save_image(options.sheet, make_grid(dataset.read([i * len(dataset) // count for i in range(count)]), columns))
        print(f"sheet     {options.sheet}")


def described(dataset: ShardDataset) -> list[str]:
    """Return lines about a dataset."""
    manifest = dataset.manifest
    size = sum(record.bytes for record in manifest.shards)
    lines = [
        f"name      {dataset.name}",
        f"images    {len(dataset):,} of {dataset.resolution} px, {manifest.image_format}",
        f"shards    {len(manifest.shards):,}, {size / 1e6:,.1f} MB; {size / len(dataset) / 1e3:,.1f} kB an image",
        f"digest    {manifest.digest}",
        f"made by   {', '.join(f'{name} {version}' for name, version in manifest.tool.items())}",
        f"options   {', '.join(f'{name} {value}' for name, value in manifest.options.items()) or '-'}",
    ]
    levels = stored_levels(dataset.levels)
    lines.append(f"levels    {', '.join(f'{level} px' for level in levels) or '-'}")
    if manifest.classes is not None:
        lines.append(f"classes   {len(manifest.classes):,}")
        counts = [(name, len(dataset.of_class(number))) for number, name in enumerate(manifest.classes)]
        lines += [f"          {count:>9,}  {name}" for name, count in counts[:_SHOWN]]
        lines += [f"          ... and {len(counts) - _SHOWN:,} more"] if len(counts) > _SHOWN else []
    else:
        lines.append(f"labels    {f'vectors of {dataset.c_dim}' if manifest.labels else '-'}")
    lines.append(f"left out  {len(manifest.skipped):,}")
    reasons = Counter(skipped.reason for skipped in manifest.skipped)
    return lines + [f"          {count:>9,}  {reason}" for reason, count in reasons.most_common(_SHOWN)]


def verify(options: Verify) -> None:
    """Name each fault of a dataset; repair it if asked for."""
    faults = find_faults(options.folder, workers=options.workers)
    if not faults:
        print(f"{options.folder}: {len(open_dataset(options.folder)):,} images, all of them whole")
        return
    for fault in faults[:_SHOWN]:
        print(line_of(fault))
    if len(faults) > _SHOWN:
        print(f"... and {len(faults) - _SHOWN:,} more")
    lost = len({(fault.file, fault.key) for fault in faults if fault.lost and not fault.file.startswith("levels/")})
    print(f"{options.folder}: {len(faults):,} faults, {lost:,} images lost")
    if options.repair is not None:
        manifest = repair(options.folder, options.repair, workers=options.workers)
        print(f"{options.repair}: {manifest.count:,} images saved")
    sys.exit(EXIT_FAULTS)


def line_of(fault: Fault) -> str:
    """Return a fault as one line: file, sample, cause."""
    return one_line(f"{fault.file}{f': sample {fault.key}' if fault.key else ''}: {fault.cause}", _LINE)


def faces(options: Faces) -> None:
    """Draw faces."""
    check_resolution(options.res)
    if options.count < 1:
        raise UserError(f"--count {options.count}: expected 1 or more")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected 0 or more")
    if options.levels and options.form == "folder":
        raise UserError("--levels: a folder of pictures has none; add --as shards, or leave it out")
    how = {"resolution": options.res, "count": options.count, "seed": options.seed, "workers": options.workers}
    if options.form == "folder":
        draw_folder(options.out, **how)  # type: ignore[arg-type]
    else:
        draw_dataset(options.out, levels=options.levels, **how)  # type: ignore[arg-type]
    print(f"{options.count:,} faces of {options.res} px in {options.out}")
