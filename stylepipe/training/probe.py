"""`--batch-gpu auto`: the largest micro-batch whose every phase fits the free memory of the device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from stylepipe.config import Config
from stylepipe.errors import UserError
from stylepipe.training import activity
from stylepipe.training.distributed import local_processes, smallest
from stylepipe.training.engine import Engine
from stylepipe.training.estimate import peak_memory
from stylepipe.training.growth import Stage
from stylepipe.training.memory import GIB, free_memory
from stylepipe.training.phase import Recipe
from stylepipe.training.timing import random_batch

HEADROOM = 0.9  # of the free memory: grids and the fragmentation of long runs take some


Build = Callable[[torch.device, int], Recipe]
Stages = Callable[[int], Sequence[Stage]]


def largest_batch_gpu(
    build: Build, stages: Stages, config: Config, c_dim: int, per_process: int, device: torch.device
) -> int:
    """Return the largest divisor of `per_process` that fits, the same on every process.

    A GPU is probed by running every phase; a CPU, where too much memory would end the process, by counting the
    activations that the phases keep.

    Args:
        build: makes a recipe on a device for a micro-batch size.
        stages: gives all stages of the training for a micro-batch size of the last.
        config: resolved settings.
        c_dim: label dimensions.
        per_process: images that one process handles in a step.
        device: this process's.

    Raises:
        UserError: not even one image fits.
    """
    fits = _fits_gpu if device.type == "cuda" else _fits_cpu
    candidates = [n for n in range(per_process, 0, -1) if per_process % n == 0]
    # Every process walks the same list until all of them agree, since their memories may differ.
    for batch_gpu in candidates:
        with activity.during("finding --batch-gpu", "unlimited"):
            fitting = fits(build, stages, config, c_dim, batch_gpu, device)
        if smallest(int(fitting), device):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # the failed tries are not the training's peak
            return batch_gpu
    raise UserError(
        f"--batch-gpu auto: not even one {config.res} px image fits the {free_memory(device) / GIB:.1f} GiB free on "
        f"{device}; lower --res or --network.channel-base, or free memory"
    )


def _fits_gpu(build: Build, stages: Stages, config: Config, c_dim: int, batch_gpu: int, device: torch.device) -> bool:
    free = free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        engine = Engine(build(device, batch_gpu), optim=config.optim, ema=config.ema)
        for stage in stages(batch_gpu):
            stage = replace(stage, batch_size=stage.batch_gpu)  # more are further rounds of the same
            images, labels = random_batch(engine, stage, c_dim)
            for phase in engine.recipe.phases:
                engine.run_phase(phase, stage, images, labels)
        torch.cuda.synchronize(device)
        fits = torch.cuda.max_memory_reserved(device) <= HEADROOM * free
    except torch.OutOfMemoryError:
        fits = False
    engine = images = labels = None  # type: ignore[assignment]
    gc.collect()
    torch.cuda.empty_cache()
    return fits


def _fits_cpu(build: Build, stages: Stages, config: Config, c_dim: int, batch_gpu: int, device: torch.device) -> bool:
    needed = peak_memory(build(torch.device("meta"), batch_gpu), c_dim, stages(batch_gpu))
    return needed <= HEADROOM * free_memory(device) / local_processes()
