"""`stylepipe bench saving`: how long a state takes to be written, and how much of that the training notices."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from accelerate import Accelerator

from stylepipe.cli.train import settle
from stylepipe.config import Config, filled
from stylepipe.errors import UserError
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training.checkpoint import save_state
from stylepipe.training.engine import Engine
from stylepipe.training.host_copies import HostCopies
from stylepipe.training.timing import amortised, random_batch, time_phases


@dataclass(frozen=True)
class Saving:
    """Time what it takes to save a state, and training beside it.

    Rounds of phases take turns: without, and while a state is being written. Prints the state's size, the seconds that
    a step is held up to copy it and that a thread then writes it, and the share of the training's time that both make
    at one state in --state-kimg.
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """Settings of the training."""
    folder: Path = Path()
    """Where to write, a temporary folder of about twice the state's size: the disk that --out will be on."""
    repeats: int = 3
    """Rounds that the medians are taken of, after one to warm up."""
    json: Path | None = None
    """Also write the figures to this file."""


def bench_saving(options: Saving, accelerator: Accelerator) -> dict[str, Any]:
    """Measure, print, and return the figures that the JSON file holds."""
    config = settle(options.config, accelerator)
    if not isinstance(config.batch_gpu, int):
        raise UserError(f"--batch-gpu {config.batch_gpu}: expected a number; a benchmark must be repeatable")
    if not options.folder.is_dir():
        raise UserError(f"--folder {options.folder}: no such folder; expected one on the disk to measure")
    engine = Engine(GANRecipe(config, accelerator.device), optim=config.optim, ema=config.ema)
    images, labels = random_batch(engine, engine.recipe.schedule.final(), c_dim=0)
    copies, rounds = HostCopies(), []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ThreadPoolExecutor(1) as pool:
        for number in range(options.repeats + 1):
            alone = amortised(engine, time_phases(engine, images, labels, 1))
            began = time.perf_counter()
            taken = copies.take(engine.state())
            held = time.perf_counter() - began
            writing = pool.submit(_write, partial(save_state, Path(folder), number, taken, engine.layout(), {}), copies)
            beside = [amortised(engine, time_phases(engine, images, labels, 1))]
            while not writing.done():
                beside.append(amortised(engine, time_phases(engine, images, labels, 1)))
            rounds.append((held, writing.result(), alone, statistics.median(beside)))
            for path in Path(folder).iterdir():
                shutil.rmtree(path)
    held, written, alone, beside_median = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    size = sum(tensor.nbytes for tensor in taken.values())
    steps_between = config.state_kimg * 1000 / filled(config.batch_size)
    slower = max(0.0, beside_median / alone - 1) * written
    share = (held + slower) / (steps_between * alone)
    print(f"a state           {size / 1e6:10.1f} MB")
    print(f"held up           {held:10.3f} s")
    print(f"written in        {written:10.3f} s")
    print(f"a step alone      {alone:10.4f} s")
    print(f"a step beside it  {beside_median:10.4f} s")
    print(f"{share:.3%} of the training's time, at one state in {config.state_kimg:g} kimg")
    return {
        "bytes": size,
        "held_s": held,
        "written_s": written,
        "step_s": alone,
        "step_beside_s": beside_median,
        "share": share,
        "state_kimg": config.state_kimg,
        "res": config.res,
        "batch_size": config.batch_size,
        "repeats": options.repeats,
    }


def _write(save: partial[Path], copies: HostCopies) -> float:
    """Write a state and return the seconds."""
    copies.wait()
    began = time.perf_counter()
    save()
    return time.perf_counter() - began
