"""`stylepipe train`: train a model on photographs, or on drawn faces that are built in."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from stylepipe.cli.dry_run import dry_run
from stylepipe.cli.initial import origin_of, start_from
from stylepipe.cli.joined import joined
from stylepipe.cli.options import parse
from stylepipe.cli.settling import settle
from stylepipe.config import Config, filled
from stylepipe.datasets.cache import (
    dataset_for_training,
    label_dimensions,
    levels_for_training,
    windowed_for_training,
)
from stylepipe.datasets.remote import GB, RemoteDataset, is_remote
from stylepipe.datasets.shards import ShardDataset, file_sha256, is_prepared, open_dataset
from stylepipe.datasets.streaming import StreamedDataset, is_stream
from stylepipe.datasets.training_data import TrainingData
from stylepipe.errors import UserError
from stylepipe.presets import PRESETS, with_batch_gpu
from stylepipe.recipes.build import schedule_of
from stylepipe.recipes.conditioning import check_labels
from stylepipe.recipes.gan import GANRecipe, trial
from stylepipe.training import activity
from stylepipe.training.checkpoint import State
from stylepipe.training.distributed import on_every_process, on_main_process, together
from stylepipe.training.estimate import estimate, format_duration
from stylepipe.training.growth import Stage
from stylepipe.training.launched import command_again
from stylepipe.training.measuring import best_metric_of, evaluation_of
from stylepipe.training.probe import largest_batch_gpu
from stylepipe.training.run_folder import check_goes_on, find_state, make_run_folder, only_run_in
from stylepipe.training.trainer import Trainer
from stylepipe.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

STREAM_NOTICE = "the data is streamed and drawn at random: a run that goes on shows other images than one in one piece"


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the options say."""
    config = parse(sys.argv[1:] if argv is None else argv)
    with joined() as accelerator:
        train(config, accelerator)


def train(config: Config, accelerator: Accelerator) -> None:
    """Run the training that `config` asks for, to its end or until it is asked to stop."""
    config = on_every_process(accelerator, settle, config, accelerator)
    with Watchdog(config.stall_minutes * 60, " (--stall-minutes says how long a process may take)") as watchdog:
        train_watched(config, accelerator, watchdog)


def train_watched(config: Config, accelerator: Accelerator, watchdog: Watchdog) -> None:
    """Run the training of settled options."""
    state = shared_state(config, accelerator)
    with activity.during("preparing the data", "unlimited"):
        dataset, c_dim = on_every_process(accelerator, look_up, config, state, accelerator)
    if config.batch_gpu == "auto":
        config = choose_batch_gpu(config, c_dim, accelerator)
    if config.dry_run:
        if accelerator.is_main_process:
            dry_run(config, c_dim, accelerator.device, accelerator.num_processes)
        return
    assert dataset is not None
    check_same(accelerator, dataset, config.init if state is None else None)
    evaluation = on_every_process(accelerator, evaluation_of, config, dataset, accelerator)
    measured = evaluation.names if evaluation is not None else "none"
    config = replace(config, metrics=measured, best_metric=best_metric_of(config, evaluation))
    out = on_main_process(accelerator, make_run_folder, config, dataset.name, state)
    watchdog.remedy = f"to go on from the newest state: {command_again(out)}"
    with ExitStack() as stack:
        on_main_process(accelerator, stack.enter_context, only_run_in(out, state))
        recipe = make_recipe(config, dataset, c_dim, accelerator)
        lines = [STREAM_NOTICE] if isinstance(dataset, StreamedDataset) else []
        origin: dict[str, str] = {}
        if config.init is not None and state is None:
            lines += on_every_process(accelerator, start_from, recipe, config.init, dataset.classes)
            origin = origin_of(config.init)
        trainer = stack.enter_context(
            closing(Trainer(config, recipe, dataset, accelerator, out, state, origin, evaluation))
        )
        del state
        for line in lines:
            trainer.say(line)
        trainer.run()
        if trainer.finished:
            tell_full_length(config, trainer, c_dim)


def shared_state(config: Config, accelerator: Accelerator) -> State | None:
    """Return the state to go on from; the main process reads it, for all machines, and only it has the tensors."""
    found: list[State] = []

    def without_tensors() -> State | None:
        state = find_state(config)
        if state is None:
            return None
        found.append(state)
        return replace(state, tensors={})

    state = on_main_process(accelerator, without_tensors)
    return found[0] if found else state


def look_up(config: Config, state: State | None, accelerator: Accelerator) -> tuple[TrainingData | None, int]:
    """Return data and label dimensions; talks to no other process.

    What is quick to refuse comes first, since preparing photographs may take long. A dry run prepares nothing.
    """
    if config.freeze_d > 0 and config.init is None and state is None:
        raise UserError(
            f"--freeze-d {config.freeze_d}: new networks have learnt nothing to keep; expected --init NETWORK"
        )
    if state is not None:
        check_goes_on(config, state)
    if config.dry_run and config.data is not None and is_stream(config.data):
        return None, 0
    if config.dry_run and config.data is not None and is_remote(config.data):
        return None, RemoteDataset(config.data).c_dim if config.cond else 0
    if config.dry_run and config.data is not None and not Path(config.data).exists():
        raise UserError(f"--data {config.data}: no such folder; expected photographs or what `stylepipe prepare` made")
    if config.dry_run and not (config.data is not None and is_prepared(config.data)):
        return None, label_dimensions(config.data) if config.cond else 0
    dataset = open_data(config)
    check_labels(config, dataset.classes)
    if isinstance(dataset, ShardDataset) and dataset.manifest.skipped and accelerator.is_main_process:
        left_out = Counter(skipped.reason for skipped in dataset.manifest.skipped)
        reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common(3))
        logger.info("%d images of %s; left out: %s", len(dataset), dataset.name, reasons)
    return dataset, dataset.c_dim if config.cond else 0


def open_data(config: Config) -> TrainingData:
    """Open the data; every process asks: the first on its machine prepares or copies it, the others wait for it."""
    lowest = filled(config.growth.start_res)
    levels = None if config.dry_run or lowest == config.res else lowest
    window = filled(config.data_window)
    if config.data is not None and is_stream(config.data):
        return StreamedDataset(config.data, config.res, skip_bad=config.on_bad == "skip")
    if window and config.data is not None and is_remote(config.data):
        limit = None if config.data_cache_gb is None else round(config.data_cache_gb * GB)
        return windowed_for_training(config.data, config.res, window, limit, labels=config.cond, levels=levels)
    path = dataset_for_training(config.data, config.res, labels=config.cond, levels=levels)
    dataset = open_dataset(path, config.res, None if levels is None else levels_for_training(path, levels))
    if config.on_bad == "stop":
        dataset.check_headers()
    return dataset


def check_same(accelerator: Accelerator, dataset: TrainingData, init: str | None) -> None:
    """See that all processes found the same data and the same network to start from: machines may share no disk."""
    if accelerator.num_processes == 1:
        return
    network = file_sha256(Path(init))[:12] if init is not None else None
    with together("what all processes have found"):
        everywhere = gather_object([(str(dataset.facts), network)])
    if len(set(everywhere)) > 1:
        raise UserError(
            f"--data and --init: the machines disagree on (data, digest of the network): {everywhere}; put both on a "
            f"disk that all of them share, or copy them to each"
        )


def tell_full_length(config: Config, trainer: Trainer, c_dim: int) -> None:
    """Say how long the preset's full training would take at the speed of this one."""
    world_size = trainer.accelerator.num_processes
    full_kimg = filled(PRESETS[str(config.preset)](config.res, world_size, config.batch_size).kimg)
    if filled(config.growth.start_res) < config.res:  # what was measured was another network for the most part
        return
    steps = (trainer.total_images - trainer.first_image) // filled(config.batch_size)
    if trainer.total_images >= full_kimg * 1000 or trainer.sec_per_kimg is None or steps == 0:
        return
    # A short run has lazy phases more often than a long one, its first step all of them.
    first = trainer.first_image // filled(config.batch_size)
    batch_gpu = trainer.stage.batch_gpu
    recipe = trial(config, c_dim, torch.device("meta"), batch_gpu)
    cost = estimate(recipe, c_dim, batch_gpu).flops
    done = sum(cost[p.name] * len(range(-first % p.interval, steps, p.interval)) for p in recipe.phases) / steps
    sec_per_kimg = trainer.sec_per_kimg * sum(cost[p.name] / p.interval for p in recipe.phases) / done
    trainer.say(
        f"at {sec_per_kimg:.3g} s/kimg as here, the full {full_kimg:,.0f} kimg of {config.preset} "
        f"would take {format_duration(sec_per_kimg * full_kimg)}"
    )


def choose_batch_gpu(config: Config, c_dim: int, accelerator: Accelerator) -> Config:
    """Set the micro-batch to the largest that fits the memory of every process."""
    per_process = filled(config.batch_size) // accelerator.num_processes
    build = partial(trial, config, c_dim)

    def stages(batch_gpu: int) -> Sequence[Stage]:
        return schedule_of(with_batch_gpu(config, batch_gpu), accelerator.num_processes).stages()

    return with_batch_gpu(config, largest_batch_gpu(build, stages, config, c_dim, per_process, accelerator.device))


def make_recipe(config: Config, dataset: TrainingData, c_dim: int, accelerator: Accelerator) -> GANRecipe:
    """Build what is trained; labels of generated images are drawn from those of the data."""
    device, world_size = accelerator.device, accelerator.num_processes
    if c_dim == 0:
        return GANRecipe(config, device, world_size=world_size)

    assert isinstance(dataset, ShardDataset)  # streams have no labels

    def labels_at(ids: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(dataset.labels(ids))

    vectors = dataset.classes is None
    return GANRecipe(config, device, c_dim, labels_at, len(dataset), vectors, world_size)
