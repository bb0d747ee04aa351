"""`stylepipe bench`: measure this machine."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import Accelerator
from tqdm import tqdm

from stylepipe.cli.bench_data import Data, bench_data
from stylepipe.cli.bench_ops import Ops, bench_ops
from stylepipe.cli.bench_saving import Saving, bench_saving
from stylepipe.cli.bench_scaling import Scaling, bench_scaling
from stylepipe.cli.settling import settle
from stylepipe.config import Config, filled
from stylepipe.errors import UserError
from stylepipe.files import atomic_path
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe, trial
from stylepipe.training.allocator import keep_freed_memory
from stylepipe.training.distributed import make_accelerator, use_all_cores
from stylepipe.training.engine import Engine
from stylepipe.training.memory import peak_memory_gib
from stylepipe.training.timing import amortised, random_batch, time_phases
from stylepipe.training.traffic import Traffic, count_traffic


@dataclass(frozen=True)
class Step:
    """Time each phase of a training step on random images.

    Prints the median seconds of each phase and, as its last line, seconds per thousand images, with the lazy
    regularizers at their share: G main + path length / 4 + D main + R1 / 16.
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """Settings of the training to time."""
    repeats: int = 10
    """Runs of each phase that the median is taken of, after one to warm up."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Bytes:
    """Count the bytes that StyleGAN2, configuration F, moves per image and phase; nothing is run.

    Prints megabytes: of the convolutions, and of all other passes without our kernels and with them; each for computing
    the loss and for its gradient. Every operation is taken to read each input once and to write each output once. The
    last line of a resolution is a step's average image, lazy regularizers at their share.
    """

    res: tuple[int, ...] = (256, 1024)
    """Resolutions of the images."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Activations of the highest four resolutions."""
    json: Path | None = None
    """Also write the figures to this file."""


COMMANDS: dict[str, Callable[..., Step | Ops | Bytes | Data | Scaling | Saving]] = {
    "step": Step,
    "ops": Ops,
    "bytes": Bytes,
    "data": Data,
    "scaling": Scaling,
    "saving": Saving,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the options say and print the figures."""
    args = list(sys.argv[1:] if argv is None else argv)
    options = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=args, prog="stylepipe bench")
    if not isinstance(options, Bytes) and options.repeats < 1:
        raise UserError(f"--repeats {options.repeats}: expected 1 or more")
    if options.json is not None:
        check_writable(options.json)
    if isinstance(options, Bytes):
        figures = bench_bytes(options)
    elif isinstance(options, Scaling):
        figures = bench_scaling(options)
    elif isinstance(options, Data):
        keep_freed_memory()  # as training does; on a GPU page-locked batches are kept as well
        figures = bench_data(options) | machine(torch.device("cpu"))
    else:
        accelerator = make_accelerator()
        if accelerator.device.type == "cpu":
            keep_freed_memory()
            use_all_cores()
        if isinstance(options, Step):
            figures = bench_step(options, accelerator)
        elif isinstance(options, Saving):
            figures = bench_saving(options, accelerator)
        else:
            figures = bench_ops(options)
        figures |= machine(accelerator.device)
    if options.json is not None:
        with atomic_path(options.json) as path:
            path.write_text(json.dumps(figures, indent=2) + "\n")
    if isinstance(options, Step):
        print(f"{figures['s_per_kimg']:.2f} s/kimg")


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before anything is measured."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--json {path}: cannot write there ({error.strerror}); name a file in a folder that takes one"
        ) from error


def bench_step(step: Step, accelerator: Accelerator) -> dict[str, Any]:
    """Time the phases, print them, and return the figures that the JSON file holds."""
    config = settle(step.config, accelerator)
    if not isinstance(config.batch_gpu, int):
        raise UserError(f"--batch-gpu {config.batch_gpu}: expected a number; a benchmark must be repeatable")
    batch_size = filled(config.batch_size)
    engine = Engine(GANRecipe(config, accelerator.device), optim=config.optim, ema=config.ema)
    phases = len(engine.recipe.phases)
    images, labels = random_batch(engine, engine.recipe.schedule.final(), c_dim=0)
    with tqdm(total=(step.repeats + 1) * phases, unit="phase", disable=not sys.stderr.isatty()) as bar:
        seconds = time_phases(engine, images, labels, step.repeats, bar.update)
    for name, median in seconds.items():
        print(f"{name:<14} {median:8.4f} s")
    return {
        "s_per_kimg": amortised(engine, seconds) / batch_size * 1000,
        "phase_seconds": seconds,
        "res": config.res,
        "batch_size": batch_size,
        "batch_gpu": config.batch_gpu,
        "channel_base": config.network.channel_base,
        "channel_max": config.network.channel_max,
        "precision": config.precision,
        "repeats": step.repeats,
    }


def bench_bytes(options: Bytes) -> dict[str, Any]:
    """Count, print the table, and return the figures that the JSON file holds."""
    print(f"{'':<20} {'without kernels':>18} {'with kernels':>18} {'convolutions':>18}")
    print(f"{'MB per image':<20}" + f" {'loss':>9}{'gradient':>9}" * 3)
    phases: dict[str, Any] = {}
    for res in options.res:
        config = with_precision(resolve(Config(res=res, preset="stylegan2"), 1), options.precision)
        build = partial(trial, config, 0, torch.device("meta"))
        composed, fused = (count_traffic(build, res, compiled=compiled) for compiled in (False, True))
        for without, of in zip(composed, fused, strict=True):
            columns = [(without.loss.passes, without.gradient.passes), (of.loss.passes, of.gradient.passes)]
            columns.append((of.loss.convolutions, of.gradient.convolutions))
            print(f"{res:>4} px {of.name:<13}" + "".join(f" {a / 1e6:9.1f}{b / 1e6:9.1f}" for a, b in columns))
        means = [sum((phase.amortised for phase in each), Traffic()) for each in (composed, fused)]
        columns_of_mean = (means[0].passes, means[1].passes, means[1].convolutions)
        print(f"{res:>4} px {'a step':<13}" + "".join(f" {total / 1e6:18.1f}" for total in columns_of_mean))
        kinds = {"without_kernels": composed, "with_kernels": fused}
        phases[str(res)] = {kind: [asdict(phase) for phase in each] for kind, each in kinds.items()}
    return {"precision": options.precision, "bytes_per_image": phases}


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_memory_gib": peak_memory_gib(device),
    }
