"""`stylepipe train`: train a model on photographs, or on drawn faces that are built in."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object

from stylepipe.cli.dry_run import dry_run
from stylepipe.cli.initial import check_settings, origin_of, settings_of, start_from
from stylepipe.cli.joined import joined
from stylepipe.config import Config, filled, from_mapping
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
from stylepipe.kernels import native
from stylepipe.parsing import one_line, parse_yaml
from stylepipe.presets import PRESETS, resolve, with_batch_gpu, with_precision
from stylepipe.recipes.build import schedule_of
from stylepipe.recipes.conditioning import check_labels
from stylepipe.recipes.gan import GANRecipe, trial
from stylepipe.run_files import CONFIG_FILE
from stylepipe.training import activity
from stylepipe.training.checkpoint import State, newest_state
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

# Two images at a time at 1024 px: in float32 the presets' four take 16 GB, more than many a machine without a GPU has.
CPU_BATCH_PIXELS = 2048

DATA_WINDOW = 16  # shards: 4 GB as `prepare` makes them, thousands of images of 1024 px

STREAM_NOTICE = "the data is streamed and drawn at random: a run that goes on shows other images than one in one piece"

DESCRIPTION = """Train a face model, or a model of any other kind of image.

  accelerate launch launch/train.py --res 256 --data PHOTOGRAPHS --mirror

Also takes --config FILE: a YAML file of these options, such as the config.yaml of an earlier run.
What a flag says wins over the file, the file over the preset, the preset over the default."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the options say."""
    config = parse(sys.argv[1:] if argv is None else argv)
    with joined() as accelerator:
        train(config, accelerator)


def parse(argv: Sequence[str], description: str = DESCRIPTION) -> Config:
    """Read options; `--config FILE` gives the defaults for what no flag says, `--init NETWORK` for what neither says.

    Raises:
        UserError: the file is no YAML of known options, or the network file can be no beginning of what they ask for.
    """
    argv = [re.sub(r"^--loss(?=$|=)", "--loss.kind", argument) for argument in argv]
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--init")
    known, rest = early.parse_known_args(argv)
    begun = None if known.config is not None else _config_of_run(argv, known.init)
    default = read_config(known.config, known.init) if begun is None else begun
    config = tyro.cli(Config, args=rest, default=default, prog="stylepipe train", description=description)
    if default.preset is not None and config.preset != default.preset:
        raise UserError(
            f"--preset {config.preset}: --config {known.config} has the numbers of {default.preset} already; "
            f"give one of them"
        )
    if known.init is not None and config.resume not in ("auto", "none"):
        raise UserError(
            f"--init {known.init} and --resume {config.resume}: a state holds networks already; give one of them"
        )
    if config.init is not None and begun is None:
        check_settings(config, config.init)
    return config


def _config_of_run(argv: Sequence[str], init: str | None) -> Config | None:
    """Return the settings of the run in --out, if it began from the file `init` that is gone: it needs that no more."""
    if init is None or Path(init).exists():
        return None
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--out", type=Path)
    out = early.parse_known_args(argv)[0].out
    if out is None or newest_state(out) is None or not (out / CONFIG_FILE).is_file():
        return None
    values = _read_yaml(out / CONFIG_FILE)
    return from_mapping(Config, values, str(out / CONFIG_FILE)) if values.get("init") == init else None


def read_config(path: Path | None, init: str | None) -> Config:
    """Return the options of a YAML file, if any, and below them those of the network file to start from, if any."""
    values = {} if path is None else _read_yaml(path)
    config = from_mapping(Config, values, f"--config {path}")
    init = config.init if init is None else init
    if init is None:
        return config
    suggested = settings_of(init)
    network = suggested["network"] | values.get("network", {})
    return from_mapping(Config, suggested | values | {"network": network, "init": init}, f"--init {init}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; expected a YAML file of options") from error
    except ValueError as error:
        raise UserError(f"--config {path}: not YAML: {one_line(error)}; expected options by name") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected options by name, found {type(values).__name__}")
    return values


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


def settle(config: Config, accelerator: Accelerator) -> Config:
    """Fill every option that the preset and the device decide.

    Raises:
        UserError: a precision or kernels that the device has not, an unknown choice of kernels, what `resolve` refuses.
    """
    on_cpu = accelerator.device.type == "cpu"
    if native.mode() == "cuda" and on_cpu:  # before anything is made
        raise UserError(
            f"{native.VARIABLE}=cuda: no GPU to train on, expected one; stylepipe doctor tells what is in the way, and "
            f"{native.VARIABLE}=auto trains on the CPU"
        )
    config = resolve(config, accelerator.num_processes, max(1, CPU_BATCH_PIXELS // config.res) if on_cpu else None)
    config = settle_data(config)
    if on_cpu:
        if config.precision == "fp16":
            raise UserError("--precision fp16: expected fp32, bf16 or auto on a CPU")
        return with_precision(config, "fp32" if config.precision == "auto" else config.precision)
    precision: str = config.precision
    if precision == "auto":
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the one thing that accelerate's setting does
        precision = asked if asked in ("bf16", "fp16") else best
    # Float32 means float32: only where half precision is accepted may its matrix products be rounded to TF32.
    rounding = "ieee" if precision == "fp32" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = rounding
    torch.backends.cudnn.conv.fp32_precision = rounding  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = True
    return with_precision(config, precision)


def settle_data(config: Config) -> Config:
    """Fill how the data is shuffled; raise UserError for an option that nothing would come of."""
    if config.data is not None and is_stream(config.data):
        for option, value in (("--cond", config.cond), ("--data-window", config.data_window)):
            if value:
                raise UserError(f"{option}: {config.data} has no labels and no order that is known before; prepare it")
    remote = config.data is not None and is_remote(config.data)
    if config.data_window is None:
        config = replace(config, data_window=DATA_WINDOW if remote else 0)
    if config.data_cache_gb is not None and not (remote and config.data_window):
        reason = "--data-window 0 copies all of it" if remote else "--data is no location, so nothing is copied"
        raise UserError(f"--data-cache-gb {config.data_cache_gb:g}: {reason}; leave it out")
    return config


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
