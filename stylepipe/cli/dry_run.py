"""`stylepipe train --dry-run`: what a training would be, would take and would cost."""

from __future__ import annotations

from dataclasses import replace

import torch
import yaml
from torch import nn

from stylepipe.config import Config, filled, largest_divisor
from stylepipe.recipes.build import schedule_of
from stylepipe.recipes.gan import trial
from stylepipe.training.engine import Engine
from stylepipe.training.estimate import estimate, flops_per_image, format_duration, peak_memory
from stylepipe.training.growth import Stage
from stylepipe.training.memory import GIB, free_memory
from stylepipe.training.settings import config_mapping
from stylepipe.training.timing import amortised, random_batch, time_phases

_FEW = 4  # images, to count operations on: they are as many for each
_CPU_SAMPLE_RES = 128  # on a CPU the speed is measured on networks of this resolution: seconds instead of minutes


def dry_run(config: Config, c_dim: int, device: torch.device, world_size: int) -> None:
    """Print resolved settings, parameter table, and estimates of memory and time."""
    assert isinstance(config.batch_gpu, int)
    kimg = filled(config.kimg)
    print(yaml.safe_dump(config_mapping(config), sort_keys=False))

    recipe = trial(config, c_dim, torch.device("meta"), config.batch_gpu)
    memory_bytes = peak_memory(recipe, c_dim, schedule_of(config, world_size).stages())
    for name, network in recipe.networks.items():
        print(parameter_table(name, network))
    print(
        f"memory   about {memory_bytes / GIB:.1f} GiB per device "
        f"({free_memory(device) / GIB:.1f} GiB free on this {device.type})"
    )
    parts = _work(config, c_dim, world_size)
    per_image = sum(flops * images for _, images, flops in parts) / sum(images for _, images, _ in parts)
    if len(parts) > 1:
        print("\nstage                  kimg  TFLOP/kimg")
        for stage, images, flops in parts:
            name = f"{stage.resolution} px{', fading in' if stage.fading else ''}"
            print(f"{name:<20} {images / 1000:>6.4g} {flops / 1e9:>11.4g}")
        print()
    sec_per_kimg = per_image * 1000 / _measured_flops(config, c_dim, device) / world_size
    print(f"work     {per_image * 1000 / 1e12:.1f} TFLOP/kimg")
    print(f"time     about {sec_per_kimg:.3g} s/kimg on {world_size} of this device, as measured now:")
    print(f"         {format_duration(sec_per_kimg * kimg)} for {kimg:g} kimg")


def _work(config: Config, c_dim: int, world_size: int) -> list[tuple[Stage, int, float]]:
    """Return the stages that the training comes through, each with its images and its operations per image."""
    recipe = trial(config, c_dim, torch.device("meta"), _FEW)
    stages = schedule_of(config, world_size).stages()
    ends = [*(stage.images_seen for stage in stages[1:]), round(filled(config.kimg) * 1000)]
    parts = []
    for stage, end in zip(stages, ends, strict=True):
        if stage.images_seen < ends[-1]:
            flops = flops_per_image(recipe, estimate(recipe, c_dim, _FEW, stage), _FEW)
            parts.append((stage, min(end, ends[-1]) - stage.images_seen, flops))
    return parts


def parameter_table(name: str, network: nn.Module) -> str:
    """Return lines of part, number of parameters, for each block of a network and in all."""
    rows = []
    for child_name, child in network.named_children():
        blocks = [(f"{child_name}.{n}", m) for n, m in child.named_children() if n.startswith("b")]
        rows += blocks or [(child_name, child)]
    counts = [(f"{name}.{part}", sum(p.numel() for p in module.parameters())) for part, module in rows]
    counts.append((f"{name} in all", sum(p.numel() for p in network.parameters())))
    return "\n".join(f"{part:<24} {count:>12,}" for part, count in counts) + "\n"


def _measured_flops(config: Config, c_dim: int, device: torch.device) -> float:
    """Return the floating point operations per second that training steps reach on this device, now."""
    res = config.res if device.type == "cuda" else min(config.res, _CPU_SAMPLE_RES)
    assert isinstance(config.batch_gpu, int)
    batch_gpu = config.batch_gpu if device.type == "cuda" else largest_divisor(config.batch_gpu, 4)
    growth = replace(config.growth, start_res=min(filled(config.growth.start_res), res))
    config = replace(config, res=res, growth=growth)
    recipe = trial(config, c_dim, device, batch_gpu)
    engine = Engine(recipe, optim=config.optim, ema=config.ema)
    seconds = (
        amortised(engine, time_phases(engine, *random_batch(engine, recipe.schedule.final(), c_dim), repeats=1))
        / batch_gpu
    )
    cost = estimate(trial(config, c_dim, torch.device("meta"), batch_gpu), c_dim, batch_gpu)
    return flops_per_image(recipe, cost, batch_gpu) / seconds
