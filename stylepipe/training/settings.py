"""The settings of a run, as its files hold them, and what becomes of a run that goes on with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from stylepipe.config import Config
from stylepipe.datasets.training_data import TrainingData
from stylepipe.errors import UserError
from stylepipe.training.checkpoint import State

_NOT_IN_CONFIG_FILE = ("out", "resume", "dry_run", "max_hours")  # these say where and how to run, not what


def config_mapping(config: Config) -> dict[str, Any]:
    """Return the settings that make the run, as they stand in config.yaml."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_IN_CONFIG_FILE}


def changes_since(state: State, config: Config, dataset: TrainingData) -> list[str]:
    """Return a line for each setting that is not the one that a state was saved with, and one if the data is not."""
    before = state.info.get("config", {})
    # A state without it was saved when the order was always over all images.
    lines = changed_settings({"data_window": 0, **before}, config_mapping(config))
    data, now = state.info.get("data"), dataset.facts
    if data is not None and data != now:
        lines.append(
            f"the data is not that of the state: {_told(data)} -> {_told(now)}; from here on its images are shown"
        )
    if config.augment == "ada" == before.get("augment"):
        # The state's p goes on: the option says where a training begins.
        lines = [line for line in lines if " aug.p " not in line]
    return lines


def _told(facts: Mapping[str, Any]) -> str:
    """Return the facts of data in a few words."""
    words = [f"{key} {value[:12] if key == 'digest' else value}" for key, value in facts.items()]
    return ", ".join(words)


def penalties_changed(state: State, config: Config) -> bool:
    """Tell whether the weights of R1, R2 or the gradient penalty are not those that a state was saved with."""
    before = state.info.get("config", {}).get("loss", {})
    return any(before.get(name) != getattr(config.loss, name) for name in ("r1_gamma", "r2_gamma", "gp_weight"))


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """Return a line for each setting in which a run that goes on differs from the one that saved the state."""
    lines = []
    for key, value in now.items():
        if isinstance(value, Mapping):
            lines += changed_settings(before.get(key, {}), value, f"{path}{key}.")
        elif key in before and before[key] != value:
            lines.append(f"changed since the state was saved: {path}{key} {before[key]} -> {value}")
    return lines


def check_growth(state: State, config: Config) -> None:
    """See that a state of a growing training goes on under the schedule that it was saved under.

    Raises:
        UserError: batch or growth is another one, so that its steps would not meet the beginnings of levels.
    """
    now = config_mapping(config)
    before = state.info.get("config", {})
    grew = before.get("growth", {}).get("start_res", before.get("res")) != before.get("res")
    if now["growth"]["start_res"] == now["res"] and not grew:
        return
    changed = changed_settings(before, {key: now[key] for key in ("growth", "batch_size")})
    if changed:
        what = changed[0].rpartition(": ")[2]
        raise UserError(
            f"{state.path}: a growing training goes on as it was, and {what} has changed; take the settings of that "
            f"run (its config.yaml, with --config), or start anew in another --out"
        )
