"""The sentences of a run's log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from stylepipe.config import Config
from stylepipe.datasets.training_data import TrainingData
from stylepipe.training.growth import Schedule, Stage
from stylepipe.training.phase import Recipe


def opening_line(
    config: Config,
    recipe: Recipe,
    dataset: TrainingData,
    accelerator: Accelerator,
    out: Path,
    first_image: int,
    total_images: int,
) -> str:
    """Say what is trained, on what, from where to where, and into which folder."""
    count, stage = accelerator.num_processes, recipe.schedule.at(first_image)
    processes = "1 process" if count == 1 else f"{count} processes"
    sizes = [
        f"{name} {sum(p.numel() for p in network.parameters()) / 1e6:.2f}M parameters"
        for name, network in recipe.networks.items()
    ]
    begins = "from" if first_image == 0 else "going on from"
    return (
        f"{config.preset} at {config.res} px on {dataset.name} ({dataset.summary}), "
        f"{processes} on {accelerator.device.type}, "
        f"batch {_batch(stage)}, {config.precision}; {', '.join(sizes)}; "
        f"{_plan(recipe.schedule, config.res, first_image, total_images)}"
        f"{begins} {first_image / 1000:g} to {total_images / 1000:g} kimg, in {out}"
    )


def stage_line(stage: Stage) -> str:
    """Say that another resolution or batch size begins."""
    return f"now at {stage.resolution} px, batch {_batch(stage)}"


def tick_line(stats: Mapping[str, float], headline: Mapping[str, float | None]) -> str:
    """Return the line of the log for one tick; a dash stands for what no step since the last one has measured."""
    parts = [f"kimg {stats['Progress/kimg']:<9.3f}", f"s/kimg {stats['Timing/sec_per_kimg']:<8.2f}"]
    parts += [f"{label} {'-' if value is None else format(value, '.4f'):<8}" for label, value in headline.items()]
    return "  ".join(parts) + f"  mem {stats['Resources/peak_memory_gib']:.2f} GiB"


def _batch(stage: Stage) -> str:
    return f"{stage.batch_size} ({stage.batch_gpu} at a time per device)"


def _plan(schedule: Schedule, full: int, first_image: int, total_images: int) -> str:
    """Say where growing begins and how far it comes; nothing where nothing grows."""
    if len(schedule.stages()) == 1:
        return ""
    first, last = schedule.at(first_image), schedule.at(max(first_image, total_images - 1))
    short = ""
    if (last.resolution, last.fading) != (full, False):
        whole = next(s for s in schedule.stages() if (s.resolution, s.fading) == (full, False))
        short = (
            f" (the full {full} px are there from {whole.images_seen / 1000:g} kimg on; --growth.stable-kimg and "
            f"--growth.fade-kimg make it sooner)"
        )
    return f"growing from {first.resolution} to {last.resolution} px{short}; "
