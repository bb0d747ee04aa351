"""How long each phase takes: the measurement behind `stylepipe bench step` and the estimate of `--dry-run`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stylepipe.training.engine import Engine
from stylepipe.training.growth import Stage
from stylepipe.training.phase import Phase


def random_batch(engine: Engine, stage: Stage, c_dim: int) -> tuple[Tensor, Tensor]:
    """Return (images, labels) like this process's share of a stage's batch, of random content, on the device."""
    count, res = stage.batch_size // engine.world_size, stage.resolution
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, res, res, 3), dtype=torch.uint8, generator=generator)
    return images.to(engine.device), torch.zeros(count, c_dim, device=engine.device)


def time_phases(
    engine: Engine, images: Tensor, labels: Tensor, repeats: int, done: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the median seconds of each phase over `repeats` runs, after one to warm up.

    The phases take turns, so that a slow moment of the machine does not fall on one of them alone. The optimizers
    and networks of `engine` move on. `done` is called after each run of a phase.
    """

    def seconds(phase: Phase) -> float:
        elapsed = time_phase(engine, phase, images, labels)
        done()
        return elapsed

    rows = [[seconds(phase) for phase in engine.recipe.phases] for _ in range(repeats + 1)]
    medians = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    return {phase.name: median for phase, median in zip(engine.recipe.phases, medians, strict=True)}


def time_phase(engine: Engine, phase: Phase, images: Tensor, labels: Tensor) -> float:
    """Return the seconds of one run of a phase of the last stage."""
    _wait(engine.device)
    start = time.perf_counter()
    engine.run_phase(phase, engine.recipe.schedule.final(), images, labels)
    _wait(engine.device)
    return time.perf_counter() - start


def amortised(engine: Engine, per_phase: Mapping[str, float]) -> float:
    """Return the mean cost of a step in the unit of `per_phase`: a phase counts once every `interval` steps."""
    return sum(per_phase[phase.name] / phase.interval for phase in engine.recipe.phases)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
