"""`stylepipe bench ops`: time each op at the shapes that StyleGAN2 has."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from stylepipe.cli.bench_cases import CASES, Case, Level
from stylepipe.cli.bench_timing import COMPILED, EAGER, OURS, PASSES, PLAIN, Timing, time_case
from stylepipe.errors import UserError
from stylepipe.kernels import native

MOST_CHANNELS = 512
BATCH_SIZES = {"cuda": 16, "cpu": 1}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
QUICK = (2, 8, 16)  # images, channels, pixels


@dataclass(frozen=True)
class Ops:
    """Time each op, forward and with its gradients, at levels of StyleGAN2.

    Prints for each the milliseconds; the bytes that it has to move at the least, over this time, in percent of what a
    large copy reaches in the same run; the microseconds that the host spends around its kernels, if it has any; and how
    many times as long others take: the op by PyTorch's own operations (eager), the form that people write (plain), and
    torch.compile of that (compile). The last line sums up.
    """

    res: tuple[int, ...] = (32, 256, 1024)
    """Resolutions of the activations, which have the channels of configuration F there."""
    channel_base: int = 32768
    """Resolution r has min(channel_base / r, 512) channels; 16384 is the preset paper256's."""
    batch_size: int | None = None
    """Images at a time. Default: 16 on a GPU, 1 on a CPU."""
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    """Type of the activations. Default: bfloat16 on a GPU, float32 on a CPU."""
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """How activations lie in memory; the networks use channels_last."""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """Also time torch.compile. Default: on a GPU only."""
    repeats: int = 10
    """Rounds that the medians are taken of, after some to warm up; in each, all that is compared has its turn."""
    quick: bool = False
    """Tiny activations instead, to see that all works; the figures then mean nothing."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Row:
    """What the table says about an op, a level and a pass."""

    case: Case
    level: Level
    name: str  # of the pass
    moved: int
    host: float | None
    seconds: dict[str, float]

    def ratio(self, other: str) -> float:
        """Return how many times as long another form takes, NaN where it was not measured."""
        return self.seconds.get(other, float("nan")) / self.seconds[OURS]

    def share(self, copied: float) -> float:
        """Return the bytes per second as a share of a copy's."""
        return self.moved / self.seconds[OURS] / copied


def bench_ops(options: Ops) -> dict[str, Any]:
    """Time the ops, print the table, and return the figures that the JSON file holds."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    levels = _levels(options, device)
    dtype = levels[0].dtype
    implementations = {
        source: native.explain(source, dtype, device) for source in dict.fromkeys(c.source for c in CASES)
    }
    for source, explanation in implementations.items():
        print(f"{source:<10} {explanation}")
    rows, copied = _measure(options, levels)
    print(f"\n{'op':<18} {'activations':<18} {'pass':<16} {'ms':>9} {'of copy':>8} {'host us':>8}", end="")
    others = [EAGER, PLAIN, *([COMPILED] if any(COMPILED in row.seconds for row in rows) else [])]
    print("".join(f" {other:>8}" for other in others))
    for row in rows:
        print(_line(row, copied, others))
    print(_summary(rows, copied, others, levels[0]))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "layout": options.layout,
        "repeats": options.repeats,
        "copy_bytes_per_s": copied,
        "implementations": implementations,
        "ops": [_figures(row, copied) for row in rows],
    }


def _levels(options: Ops, device: torch.device) -> list[Level]:
    """Return the shapes to time, checked."""
    for res in options.res:
        if not 4 <= res <= options.channel_base or res % 2:
            limit = options.channel_base
            raise UserError(
                f"--res {res}: expected even numbers from 4 to {limit}, such as 256 (--channel-base {limit})"
            )
    if not options.res:
        raise UserError("--res: expected at least one resolution, such as 256")
    batch_size = BATCH_SIZES[device.type] if options.batch_size is None else options.batch_size
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: expected 1 or more")
    shapes = [(batch_size, min(options.channel_base // res, MOST_CHANNELS), res) for res in options.res]
    dtype = getattr(torch, options.dtype or DTYPES[device.type])
    memory_format = torch.channels_last if options.layout == "channels_last" else torch.contiguous_format
    return [Level(*shape, dtype, memory_format, device) for shape in ([QUICK] if options.quick else shapes)]


def _measure(options: Ops, levels: list[Level]) -> tuple[list[Row], float]:
    """Return the rows of the table, and the bytes per second of a copy."""
    work = [(level, case) for level in levels for case in CASES]
    rows: list[Row] = []
    copied: list[float] = []
    complaints: set[str] = set()
    rounds = len(work) * len(PASSES) * (options.repeats + 1)
    with tqdm(total=rounds, unit="round", disable=not sys.stderr.isatty()) as bar:
        for level, case in work:
            try:
                timing = time_case(case, level, options.repeats, compiled=options.compile, done=bar.update)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"--batch-size {level.batch_size}: too much for the GPU's memory at {level.res} px; try "
                    f"{max(level.batch_size // 2, 1)}, or smaller --res"
                ) from error
            rows += _rows(case, level, timing)
            copied.append(timing.copied)
            complaints |= {timing.complaint} - {""}
    for complaint in complaints:
        print(f"torch.compile is left out where it fails: {complaint}")
    return rows, statistics.median(copied)


def _rows(case: Case, level: Level, timing: Timing) -> Iterator[Row]:
    least = case.least(level)
    for name, moved in zip(PASSES, (least.forward, least.forward + least.backward), strict=True):
        yield Row(case, level, name, moved, timing.host[name], timing.seconds[name])


def _line(row: Row, copied: float, others: list[str]) -> str:
    level = row.level
    shape = f"{level.batch_size} x {level.channels} x {level.res}^2"
    ratios = "".join(f" {row.ratio(other):7.2f}x" for other in others)
    ms, host = row.seconds[OURS] * 1000, "-" if row.host is None else f"{row.host * 1e6:.0f}"
    return f"{row.case.name:<18} {shape:<18} {row.name:<16} {ms:9.3f} {row.share(copied):8.0%} {host:>8}{ratios}"


def _summary(rows: list[Row], copied: float, others: list[str], level: Level) -> str:
    """Return the last line: medians, and the least of each column."""
    layout = "channels_last" if level.memory_format == torch.channels_last else "contiguous"
    columns = [("of copy", [row.share(copied) * 100 for row in rows], "%")]
    columns += [(other, [row.ratio(other) for row in rows if other in row.seconds], "x") for other in others]
    parts = [f"{name} {statistics.median(of):.3g}{unit} (least {min(of):.3g}{unit})" for name, of, unit in columns]
    kind = str(level.dtype).removeprefix("torch.")
    return f"{kind} {layout}, copy {copied / 1e9:.4g} GB/s; medians: {', '.join(parts)}"


def _figures(row: Row, copied: float) -> dict[str, Any]:
    return {
        "op": row.case.name,
        "batch_size": row.level.batch_size,
        "channels": row.level.channels,
        "res": row.level.res,
        "pass": row.name,
        "bytes": row.moved,
        "seconds": row.seconds,
        "share_of_copy": row.share(copied),
        "host_seconds": row.host,
    }
