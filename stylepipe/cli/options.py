"""The options of a training: from the command line, a file of settings, and a network to start from."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from stylepipe.cli.initial import check_settings, settings_of
from stylepipe.config import Config, from_mapping
from stylepipe.errors import UserError
from stylepipe.parsing import one_line, parse_yaml
from stylepipe.run_files import CONFIG_FILE
from stylepipe.training.checkpoint import newest_state

DESCRIPTION = """Train a face model, or a model of any other kind of image.

  accelerate launch launch/train.py --res 256 --data PHOTOGRAPHS --mirror

Also takes --config FILE: a YAML file of these options, such as the config.yaml of an earlier run.
What a flag says wins over the file, the file over the preset, the preset over the default."""


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
    of_run = None if known.config is not None else _config_of_run(argv, known.init)
    default = read_config(known.config, known.init) if of_run is None else from_mapping(Config, *of_run)
    config = tyro.cli(Config, args=rest, default=default, prog="stylepipe train", description=description)
    if default.preset is not None and config.preset != default.preset:
        raise UserError(
            f"--preset {config.preset}: {f'--config {known.config}' if of_run is None else of_run[1]} has the numbers "
            f"of {default.preset} already; give one of them"
        )
    if known.init is not None and config.resume not in ("auto", "none"):
        raise UserError(
            f"--init {known.init} and --resume {config.resume}: a state holds networks already; give one of them"
        )
    if config.init is not None and of_run is None:
        check_settings(config, config.init)
    return config


def _config_of_run(argv: Sequence[str], init: str | None) -> tuple[dict[str, Any], str] | None:
    """Return the settings of the run in --out and their file, if it began from the file `init` that is gone.

    It needs that no more.
    """
    if init is None or Path(init).exists():
        return None
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--out", type=Path)
    out = early.parse_known_args(argv)[0].out
    if out is None or newest_state(out) is None or not (out / CONFIG_FILE).is_file():
        return None
    values = _read_yaml(out / CONFIG_FILE)
    return (values, str(out / CONFIG_FILE)) if values.get("init") == init else None


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
