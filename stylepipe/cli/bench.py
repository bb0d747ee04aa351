"""`stylepipe bench`: measure this machine."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from stylepipe.cli.train import settle
from stylepipe.config import Config, filled
from stylepipe.errors import UserError
from stylepipe.files import atomic_path
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training.allocator import keep_freed_memory
from stylepipe.training.distributed import make_accelerator, use_all_cores
from stylepipe.training.engine import Engine
from stylepipe.training.memory import peak_memory_gib
from stylepipe.training.timing import amortised, random_batch, time_phases


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


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the options say and print the figures."""
    args = list(sys.argv[1:] if argv is None else argv)
    step = tyro.extras.subcommand_cli_from_dict({"step": Step}, args=args, prog="stylepipe bench")
    if step.repeats < 1:
        raise UserError(f"--repeats {step.repeats}: expected 1 or more")
    figures = bench_step(step)
    if step.json is not None:
        try:
            with atomic_path(step.json) as path:
                path.write_text(json.dumps(figures, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {step.json}: cannot write there ({error.strerror})") from error
    print(f"{figures['s_per_kimg']:.2f} s/kimg")


def bench_step(step: Step) -> dict[str, object]:
    """Time the phases; return the figures that the JSON file holds."""
    accelerator = make_accelerator()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        use_all_cores()
    config = settle(step.config, accelerator)
    if not isinstance(config.batch_gpu, int):
        raise UserError(f"--batch-gpu {config.batch_gpu}: expected a number; a benchmark must be repeatable")
    batch_size = filled(config.batch_size)
    engine = Engine(
        GANRecipe(config, accelerator.device), batch_gpu=config.batch_gpu, optim=config.optim, ema=config.ema
    )
    phases = len(engine.recipe.phases)
    with tqdm(total=(step.repeats + 1) * phases, unit="phase", disable=not sys.stderr.isatty()) as bar:
        seconds = time_phases(engine, *random_batch(engine, config.res, 0), step.repeats, bar.update)
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
        "device": device_name(accelerator.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_memory_gib": peak_memory_gib(accelerator.device),
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the kind of processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
