"""`stylepipe bench saving`: how long a state takes to be written, and how much of that the training notices."""

from __future__ import annotations

import itertools
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
from safetensors import SafetensorError

from stylepipe.cli.settling import settle
from stylepipe.config import Config, filled
from stylepipe.errors import UserError
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training.checkpoint import save_state
from stylepipe.training.engine import Engine
from stylepipe.training.host_copies import HostCopies
from stylepipe.training.timing import amortised, random_batch, time_phase, time_phases


@dataclass(frozen=True)
class Saving:
    """Time what it takes to save a state, and training beside it.

    Rounds of phases take turns: without, and while a state is being written. Prints the state's size, the seconds that
    a step is held up to copy it, that a thread then writes it and that the phases beside that take longer, and the
    share of the training's time that the first and the last make at one state in --state-kimg.
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
    phases, copies = engine.recipe.phases, HostCopies()
    rounds: list[tuple[float, float]] = []
    alone: list[dict[str, float]] = []
    beside: list[list[tuple[str, float]]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ThreadPoolExecutor(1) as pool:
        for number in range(options.repeats + 1):
            alone.append(time_phases(engine, images, labels, 1))
            began = time.perf_counter()
            taken = copies.take(engine.state())
            copies.wait()  # a GPU's phases stand still meanwhile, as copies are in their stream
            held = time.perf_counter() - began
            writing = pool.submit(_write, partial(save_state, Path(folder), number, taken, engine.layout(), {}))
            beside.append([])
            for phase in itertools.cycle(phases):
                if writing.done():
                    break
                beside[-1].append((phase.name, time_phase(engine, phase, images, labels)))
            try:
                rounds.append((held, writing.result()))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"--folder {options.folder}: cannot be written ({error}); make room, or name another"
                ) from error
            for path in Path(folder).iterdir():
                shutil.rmtree(path)
    held, written = (statistics.median(column) for column in zip(*rounds[1:], strict=True))
    usual = {phase.name: statistics.median(times[phase.name] for times in alone[1:]) for phase in phases}
    slower = statistics.median(sum(time - usual[name] for name, time in times) for times in beside[1:])
    step = amortised(engine, usual)
    size = sum(tensor.nbytes for tensor in taken.values())
    share = (held + slower) / (config.state_kimg * 1000 / filled(config.batch_size) * step)
    print(f"a state           {size / 1e6:10.1f} MB")
    print(f"held up           {held:10.3f} s")
    print(f"written in        {written:10.3f} s")
    print(f"slower beside it  {slower:10.3f} s")
    print(f"a step            {step:10.4f} s")
    print(f"{share:.3%} of the training's time, at one state in {config.state_kimg:g} kimg")
    return {
        "bytes": size,
        "held_s": held,
        "written_s": written,
        "slower_s": slower,
        "step_s": step,
        "share": share,
        "state_kimg": config.state_kimg,
        "res": config.res,
        "batch_size": config.batch_size,
        "repeats": options.repeats,
    }


def _write(save: partial[Path]) -> float:
    """Write a state and return the seconds."""
    began = time.perf_counter()
    save()
    return time.perf_counter() - began
