"""`stylepipe train`: train a model on photographs, or on drawn faces that are built in."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
import tyro
import yaml
from accelerate import Accelerator

from stylepipe.cli.dry_run import dry_run
from stylepipe.config import Config, filled, from_mapping
from stylepipe.datasets.cache import dataset_for_training
from stylepipe.datasets.shards import ShardDataset, open_dataset
from stylepipe.errors import UserError
from stylepipe.presets import PRESETS, resolve, with_batch_gpu, with_precision
from stylepipe.recipes.gan import GANRecipe, trial
from stylepipe.training.allocator import keep_freed_memory
from stylepipe.training.checkpoint import State, load_state, newest_state
from stylepipe.training.distributed import (
    leave,
    make_accelerator,
    on_every_process,
    on_main_process,
    use_all_cores,
)
from stylepipe.training.estimate import format_duration
from stylepipe.training.launched import check_launch
from stylepipe.training.probe import largest_batch_gpu
from stylepipe.training.trainer import Trainer

DESCRIPTION = """Train a face model, or a model of any other kind of image.

  accelerate launch launch/train.py --res 256 --data PHOTOGRAPHS --mirror

Also takes --config FILE: a YAML file of these options, such as the config.yaml of an earlier run.
What a flag says wins over the file, the file over the preset, the preset over the default."""


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the options say; exits with 128 + signal number where a signal ended it."""
    config = parse(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    accelerator = make_accelerator()
    try:
        check_launch(accelerator.num_processes)
        if accelerator.is_main_process:
            logging.basicConfig(level=logging.WARNING, format="%(message)s")
            logging.getLogger("stylepipe").setLevel(logging.INFO)
        use_all_cores(accelerator)
        interrupt_code = train(config, accelerator)
    finally:
        leave()
    if interrupt_code:
        sys.exit(interrupt_code)


def parse(argv: Sequence[str], description: str = DESCRIPTION) -> Config:
    """Read options; `--config FILE` gives the defaults for what no flag says.

    Raises:
        UserError: the file is no YAML of known options.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    known, rest = early.parse_known_args(argv)
    default = Config() if known.config is None else read_config(known.config)
    return tyro.cli(Config, args=rest, default=default, prog="stylepipe train", description=description)


def read_config(path: Path) -> Config:
    """Read a YAML file of options."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; expected a YAML file of options") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected options by name, found {type(values).__name__}")
    return from_mapping(Config, values, f"--config {path}")


def train(config: Config, accelerator: Accelerator) -> int:
    """Run the training that `config` asks for; return the exit code that a request to stop calls for, else 0."""
    config, dataset, c_dim, state = on_every_process(accelerator, look_up, config, accelerator)
    if config.batch_gpu == "auto":
        config = choose_batch_gpu(config, c_dim, accelerator)
    if config.dry_run:
        if accelerator.is_main_process:
            dry_run(config, c_dim, accelerator.device, accelerator.num_processes)
        return 0
    out = on_main_process(accelerator, make_out, config, dataset.name, state)
    recipe = make_recipe(config, dataset, c_dim, accelerator.device)
    with closing(Trainer(config, recipe, dataset, accelerator, out, state)) as trainer:
        interrupt = trainer.run()
        full_kimg = filled(PRESETS[str(config.preset)](config.res, accelerator.num_processes, config.batch_size).kimg)
        if not interrupt.exit_code and trainer.total_images < full_kimg * 1000 and trainer.sec_per_kimg is not None:
            trainer.say(
                f"at {trainer.sec_per_kimg:.3g} s/kimg as here, the full {full_kimg:,.0f} kimg of {config.preset} "
                f"would take {format_duration(trainer.sec_per_kimg * full_kimg)}"
            )
    return interrupt.exit_code


def look_up(config: Config, accelerator: Accelerator) -> tuple[Config, ShardDataset, int, State | None]:
    """Return resolved settings, data, label dimensions and the state to go on from; talks to no other process."""
    config = settle(config, accelerator)
    # Every process asks: the first on its machine prepares the data, the others wait for it.
    folder = dataset_for_training(
        config.data, config.res, labels=config.cond, progress=accelerator.is_local_main_process
    )
    dataset = open_dataset(folder, config.res)
    return config, dataset, label_dimensions(config, dataset), find_state(config)


def settle(config: Config, accelerator: Accelerator) -> Config:
    """Fill every option that the preset and the device decide."""
    config = resolve(config, accelerator.num_processes)
    precision = config.precision
    if accelerator.device.type == "cpu":
        if precision in ("bf16", "fp16"):
            raise UserError(f"--precision {precision}: expected fp32 or auto on a CPU")
        precision = "fp32"
    elif precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return with_precision(config, precision)


def label_dimensions(config: Config, dataset: ShardDataset) -> int:
    """Return how many numbers a label has in this training; 0 without --cond."""
    if config.cond and dataset.c_dim == 0:
        raise UserError(
            f"--cond: {dataset.name} has no labels; prepare it with `stylepipe prepare --labels`, which takes the "
            f"names of sub-folders as classes, or leave --cond out"
        )
    return dataset.c_dim if config.cond else 0


def choose_batch_gpu(config: Config, c_dim: int, accelerator: Accelerator) -> Config:
    """Set the micro-batch to the largest that fits the memory of every process."""
    per_process = filled(config.batch_size) // accelerator.num_processes
    build = partial(trial, config, c_dim)
    return with_batch_gpu(config, largest_batch_gpu(build, config, c_dim, per_process, accelerator.device))


def make_recipe(config: Config, dataset: ShardDataset, c_dim: int, device: torch.device) -> GANRecipe:
    """Build what is trained; labels of generated images are drawn from those of the data."""
    if c_dim == 0:
        return GANRecipe(config, device)
    return GANRecipe(config, device, c_dim, lambda ids: torch.from_numpy(dataset.labels(ids)), len(dataset))


def find_state(config: Config) -> State | None:
    """Read the state that `--resume` names, or the newest in `--out`."""
    if config.resume == "none":
        return None
    if config.resume != "auto":
        return load_state(Path(config.resume))
    newest = newest_state(Path(config.out)) if config.out is not None else None
    return load_state(newest) if newest is not None else None


def make_out(config: Config, data_name: str, state: State | None) -> Path:
    """Make the folder of the run and check that it can be written.

    Raises:
        UserError: it cannot, or it holds another run that this one would overwrite.
    """
    if config.out is None:
        numbers = [int(m[1]) for path in Path("runs").glob("*") if (m := re.match(r"(\d{5,})-", path.name))]
        out = Path("runs") / f"{max(numbers, default=-1) + 1:05d}-{config.preset}-{data_name}-{config.res}"
    else:
        out = Path(config.out)
    if state is None and newest_state(out) is not None:
        raise UserError(
            f"--resume none: {out} holds a run already, which a new one would overwrite; give another --out, or leave "
            f"--resume out to go on"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}); give another folder") from error
    return out
