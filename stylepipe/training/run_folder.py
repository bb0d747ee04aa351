"""The folder of a run: made, found again, and kept for one run at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stylepipe.config import Config
from stylepipe.errors import UserError
from stylepipe.files import locked
from stylepipe.run_files import BEST_NETWORK, network_files
from stylepipe.training.checkpoint import (
    DAMAGED,
    DamagedStateError,
    State,
    load_state,
    newest_state,
    newest_whole_state,
)

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"

# Options of the networks without which a state's weights have no place.
_OF_WEIGHTS = (
    *("kind", "z_dim", "w_dim", "channel_base", "channel_max", "mapping_layers"),
    *("g_architecture", "d_architecture", "mbstd_channels", "d_conditioning", "norm"),
)


def find_state(config: Config) -> State | None:
    """Read the state that `--resume` names, or the newest in `--out` that is whole."""
    if config.resume == "none":
        return None
    if config.resume != "auto":
        try:
            return load_state(Path(config.resume))
        except DamagedStateError as damage:
            raise UserError(f"--resume {config.resume}: {damage}; give an older one") from damage
    if config.out is None:
        return None
    state, wrong = newest_whole_state(Path(config.out))
    for error in wrong:
        logger.warning("%s; passed over, and kept as %s-<kimg>", error, DAMAGED)
    return state


def check_goes_on(config: Config, state: State) -> None:
    """See that the networks of a state fit these settings, as far as the state's own settings tell.

    Raises:
        UserError: names the first option that differs, with both values.
    """
    saved = state.info.get("config", {})
    if config.init is not None and saved.get("init") != config.init:
        began = "from new networks" if saved.get("init") is None else f"with --init {saved['init']}"
        raise UserError(
            f"--init {config.init}: {state.path} is of a run that began {began}; leave --init as it was to go on, or "
            f"give another --out"
        )
    now: dict[str, Any] = {"res": config.res, "cond": config.cond}
    now |= {f"network.{name}": getattr(config.network, name) for name in _OF_WEIGHTS}
    before = {name: saved[name] for name in ("res", "cond") if name in saved}
    before |= {f"network.{name}": value for name, value in saved.get("network", {}).items()}
    for name, value in now.items():
        if name not in before or before[name] == value:
            continue
        init = saved.get("init")
        again = f"--init {init}, as that run had, " if init is not None and config.init is None else ""
        raise UserError(
            f"{_flag(name, value)}: {state.path} is of a run with {_flag(name, before[name])}; give {again}the "
            f"settings of that run (its config.yaml, with --config), or another --out"
        )


def make_run_folder(config: Config, data_name: str, state: State | None) -> Path:
    """Make the folder of the run and check that it can be written.

    Raises:
        UserError: it cannot, or it holds another run that this one would overwrite.
    """
    if config.out is not None and Path(config.out).is_file():
        raise UserError(f"--out {config.out}: is a file; expected a folder")
    if config.out is not None and (Path(config.out) / "state.json").exists():
        raise UserError(
            f"--out {config.out}: is a state; expected the folder of a run, such as {Path(config.out).parent}"
        )
    try:
        out = Path(config.out) if config.out is not None else _next_run(f"{config.preset}-{data_name}-{config.res}")
        out.mkdir(parents=True, exist_ok=True)
        with open(out / LOCK_NAME, "ab"):
            pass
    except OSError as error:
        raise UserError(f"--out {config.out or 'runs'}: cannot write there ({error.strerror}); give another") from error
    newest = newest_state(out)
    if newest is None and (networks := _networks(out)):
        raise UserError(
            f"--out {out}: holds networks of a run whose states are gone, such as {networks[-1].name}, which "
            f"this one would overwrite; give another folder"
        )
    # With auto it is of this folder, and what is newer is damaged.
    if newest is not None and (state is None or (config.resume != "auto" and newest.resolve() != state.path.resolve())):
        raise UserError(
            f"--resume {config.resume}: {out} holds a run already, up to {newest.name}, which this one would "
            f"overwrite; give another --out, or leave --resume out to go on from its end"
        )
    return out


def _networks(out: Path) -> list[Path]:
    """Return the networks in a folder; a run has some only once it has a state."""
    best = out / BEST_NETWORK
    return ([best] if best.exists() else []) + network_files(out)


@contextmanager
def only_run_in(out: Path, state: State | None) -> Iterator[None]:
    """Hold a lock on the run's folder that ends with this process, however it ends.

    Args:
        out: the folder.
        state: what was read before.

    Raises:
        UserError: another process holds it, or has saved a newer state since.
    """
    with locked(out / LOCK_NAME, wait=False) as held:
        if not held:
            raise UserError(f"--out {out}: another process is training there; wait for it or give another")
        known = [] if state is None else [state.path.resolve(), *(path.resolve() for path in state.passed_over)]
        newest = newest_state(out)
        if newest is not None and newest.resolve() not in known:
            raise UserError(f"--out {out}: another process has just saved {newest.name} there; start the command again")
        yield


def _flag(name: str, value: Any) -> str:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {value}"


def _next_run(name: str) -> Path:
    """Make the folder runs/<number>-<name> with the next free number."""
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    while True:
        numbers = [int(match[1]) for path in runs.iterdir() if (match := re.match(r"(\d{5,})-", path.name))]
        out = runs / f"{max(numbers, default=-1) + 1:05d}-{name}"
        try:
            out.mkdir()
            return out
        except FileExistsError:  # another run took it in this moment
            continue
