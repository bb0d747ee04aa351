"""States: folders `state-<kimg>/` with all that exact resuming needs.

A state is two files: `state.safetensors`, the engine's tensors, and `state.json`, what they belong to, with the digests
of both. The folder appears in one rename, so one that has its name is whole unless the disk lost something since.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stylepipe.datasets.shards import file_sha256
from stylepipe.errors import UserError
from stylepipe.files import atomic_path, flush_entry
from stylepipe.parsing import one_line, parse_json
from stylepipe.run_files import kimg_name, network_files
from stylepipe.training.power_ema import averages_files

FORMAT_VERSION = 2  # of version 1, state.json had no digest of its own
DIVERGED = "diverged"
"""Kind of the states that are kept of a divergence, to be looked at."""
DAMAGED = "damaged"
"""Kind of those that are no longer as they were written."""

_NAME = re.compile(r"state-\d{6,}\.\d{3}")
_REMAINS = re.compile(rf"\.+(state|{DIVERGED}|{DAMAGED})-")

# Of what a state says beside its tensors, where it says that.
_KINDS: Mapping[str, type | UnionType] = {
    "config": dict,
    "origin": dict,
    "alarms": dict | None,
    "data": dict | None,
    "healthy": bool,
    "interim": bool,
    "rollbacks": int,
    "rollbacks_in_a_row": int,
    "tracker_run_id": str | None,
}


class DamagedStateError(UserError):
    """A state that is not as it was written."""


@dataclass(frozen=True)
class State:
    """What a state folder holds.

    Attributes:
        path: the folder.
        images_seen: where on the training's clock it was saved.
        tensors: the engine's tensors by name, on the CPU; only the main process has them.
        layout: shape of every parameter, by network and name.
        info: everything else, such as the tracker's run id.
        passed_over: states of the same run that are newer, and damaged.
    """

    path: Path
    images_seen: int
    tensors: Mapping[str, Tensor]
    layout: Mapping[str, Mapping[str, list[int]]]
    info: Mapping[str, Any]
    passed_over: tuple[Path, ...] = ()


def save_state(
    out: Path,
    images_seen: int,
    tensors: Mapping[str, Tensor],
    layout: Mapping[str, Mapping[str, list[int]]],
    info: Mapping[str, Any],
    kind: str = "state",
) -> Path:
    """Write `out/<kind>-<kimg>/` and return it; one of that name that is there already is replaced when it is whole.

    `info["healthy"]` says whether it is one to roll back to, `info["interim"]` whether it is to be kept only until
    there is a newer one. Of a divergence none is replaced: they are numbered.
    """
    path = out / state_folder(images_seen, kind)
    if kind == DIVERGED:
        path = _free(path)
    whole = path.with_name(f".{path.name}.whole.tmp")
    if whole.exists():
        shutil.rmtree(whole)
    with atomic_path(whole) as folder:
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "state.safetensors")
        description = {
            "format_version": FORMAT_VERSION,
            "images_seen": images_seen,
            "sha256": file_sha256(folder / "state.safetensors"),
            "layout": layout,
            "info": info,
        }
        (folder / "state.json").write_text(_signed(description))
    before = path.with_name(f".{path.name}.deleted.tmp")
    if path.exists():
        path.rename(before)
    whole.rename(path)
    flush_entry(out)
    shutil.rmtree(before, ignore_errors=True)
    return path


def state_folder(images_seen: int, kind: str = "state") -> str:
    """Return the name of the state folder of a moment."""
    return f"{kind}-{kimg_name(images_seen)}"


def amend_state(path: Path, info: Mapping[str, Any]) -> None:
    """Change some of what a state says beside its tensors."""
    file = path / "state.json"
    description = json.loads(file.read_text())
    description["info"].update(info)
    with atomic_path(file) as temporary:
        temporary.write_text(_signed(description))


def load_state(path: Path) -> State:
    """Read a state folder.

    Raises:
        DamagedStateError: content that is missing or is not as it was written; says what, and no remedy.
        UserError: no such folder, not a state, or a newer format.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        raise UserError(f"--resume {path}: {found}; expected a folder named state-<kimg>")
    if (newest := newest_state(path)) is not None:
        raise UserError(f"--resume {path}: the folder of a run; expected one of its states, such as {newest}")
    if not _NAME.fullmatch(path.resolve().name) and not (path / "state.json").exists():
        raise UserError(f"--resume {path}: no state; expected a folder named state-<kimg>")
    try:
        description = parse_json((path / "state.json").read_bytes())
        version = description["format_version"]
        if description.get("digest", "") != digest_of(description) and ("digest" in description or version != 1):
            raise DamagedStateError(f"{path / 'state.json'}: damaged since it was written")
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path}: state of format {one_line(version)}, but this stylepipe reads up to {FORMAT_VERSION}; "
                f"upgrade it"
            )
        if version < 1:
            raise UserError(f"{path}: state of format {one_line(version)}, which no stylepipe has written")
        tensor_file = path / "state.safetensors"
        if file_sha256(tensor_file) != description["sha256"]:
            raise DamagedStateError(f"{tensor_file}: truncated or damaged since it was written")
        images_seen, layout, info = (description[key] for key in ("images_seen", "layout", "info"))
        shapes = [shape for network in layout.values() for shape in network.values()]
        if type(images_seen) is not int or images_seen < 0 or not isinstance(info, dict):
            raise ValueError("it has no number of images, or says nothing else")
        if not all(isinstance(shape, list) for shape in shapes):
            raise ValueError("its layout is none")
        if _NAME.fullmatch(path.resolve().name) and path.resolve().name != state_folder(images_seen):
            raise DamagedStateError(f"{path}: is the state of {kimg_name(images_seen)} kimg, and has been renamed")
        _check_info(info)
        return State(path, images_seen, load_file(tensor_file), layout, info)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise DamagedStateError(f"{path}: not a whole state, {missing} is missing") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see to its permissions and to the disk") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedStateError(f"{path}: not a readable state ({one_line(error)})") from error


def digest_of(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all that a state.json says but for its digest, however it is laid out."""
    said = json.loads(json.dumps({key: value for key, value in description.items() if key != "digest"}))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _signed(description: Mapping[str, Any]) -> str:
    return json.dumps({**description, "digest": digest_of(description)}, indent=1) + "\n"


def _check_info(info: Mapping[str, Any]) -> None:
    """Raise ValueError where a part of what a state says is of a kind that it never is."""
    for name, kind in _KINDS.items():
        if name in info and not isinstance(info[name], kind):
            raise ValueError(f"its {name} is {one_line(repr(info[name]))}")
    config = info.get("config", {})
    for name in ("network", "loss", "growth", "optim", "ema", "aug"):
        if not isinstance(config.get(name, {}), dict):
            raise ValueError(f"its settings have {name} {one_line(repr(config[name]))}")


def check_fits(state: State, layout: Mapping[str, Mapping[str, list[int]]]) -> None:
    """Check that a state belongs to networks of this layout.

    Raises:
        UserError: names the first parameter that differs and both shapes.
    """
    for network, shapes in layout.items():
        found = state.layout.get(network, {})
        for name in [*shapes, *found]:
            ours, theirs = shapes.get(name, "absent"), found.get(name, "absent")
            if ours != theirs:
                raise UserError(
                    f"{state.path}: checkpoint of other networks: {network}.{one_line(name)} is "
                    f"{one_line(theirs)} there and {ours} with these settings; use the settings of that run "
                    f"(its config.yaml, with --config), or another --out"
                )


def newest_state(out: Path) -> Path | None:
    """Return the state folder in `out` with the most images seen, if there is any."""
    return max(_states(out), default=None)


def newest_whole_state(out: Path) -> tuple[State | None, list[DamagedStateError]]:
    """Read the state in `out` with the most images seen of those that are as they were written.

    Returns:
        the state, with the newer ones that were passed over, None if there is none; and what is wrong with those.

    Raises:
        DamagedStateError: none is whole.
        UserError: as for `load_state`.
    """
    wrong: list[DamagedStateError] = []
    states = sorted(_states(out), reverse=True)
    for path in states:
        try:
            return replace(load_state(path), passed_over=tuple(states[: len(wrong)])), wrong
        except DamagedStateError as error:
            wrong.append(error)
    if wrong:
        raise DamagedStateError(f"{out}: none of its states is whole ({wrong[0]}); start anew in another --out")
    return None, wrong


def healthy_states(out: Path) -> list[Path]:
    """Return the state folders in `out` that say that gradients were finite when they were saved, the newest first."""
    return [path for path in sorted(_states(out), reverse=True) if _info(path).get("healthy", True)]


def newest_healthy_state(out: Path) -> Path | None:
    """Return the newest state folder in `out` that says that gradients were finite when it was saved, if any does."""
    return next(iter(healthy_states(out)), None)


def prune_states(out: Path, keep: int) -> None:
    """Delete all but the newest `keep` states of `out`, besides them the newest and the newest healthy; 0 keeps all.

    Those that are only to be kept until there is a newer one are not counted.
    """
    if keep == 0:
        return
    states = sorted(_states(out), reverse=True)
    counted = [path for path in states if not _info(path).get("interim", False)]
    kept = {*states[:1], *counted[:keep], newest_healthy_state(out)}
    for path in states:
        if path not in kept:
            _delete(path)


def set_aside_damaged(paths: Sequence[Path]) -> None:
    """Rename states that were found damaged."""
    for path in paths:
        path.rename(_free(path.with_name(path.name.replace("state", DAMAGED, 1))))


def set_aside_later(out: Path, path: Path | None) -> None:
    """Rename what `out` has later than the state `path`, or all: nothing goes on from these.

    They are states, networks and power-function averages.
    """
    for later in sorted([*_states(out), *network_files(out)]):
        kind, _, kimg = later.name.partition("-")
        if path is None or kimg.removesuffix(".safetensors") > path.name.partition("-")[2]:
            later.rename(_free(out / (f"{DIVERGED}-{kimg}" if kind == "state" else f"{DIVERGED}-{later.name}")))
    for later in averages_files(out):
        if path is None or later.stem > path.name.partition("-")[2]:
            later.rename(_free(later.with_name(f"{DIVERGED}-{later.name}")))


def _free(path: Path) -> Path:
    """Return a path itself, or with the first number that is free behind its name."""
    end = ".safetensors" if path.suffix == ".safetensors" else ""  # what follows the last dot of a state is kimg
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name.removesuffix(end)}-{number}{end}")
    return free


def clear_remains(out: Path) -> None:
    """Delete what processes that were killed while saving or deleting have left of states in `out`.

    A whole one that was about to take the place of another is given its name.
    """
    for path in out.glob(".*.tmp"):
        if not _REMAINS.match(path.name):
            continue
        target = path.with_name(path.name.lstrip(".").removesuffix(".whole.tmp"))
        if _NAME.fullmatch(target.name) and path.name.startswith(".state") and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _states(out: Path) -> list[Path]:
    if not out.is_dir():
        return []
    return [path for path in out.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]


def _info(path: Path) -> Mapping[str, Any]:
    """Return what a state says beside its tensors; of a damaged one, that it is not healthy."""
    try:
        return dict(parse_json((path / "state.json").read_bytes())["info"])
    except (OSError, ValueError, KeyError, TypeError):
        return {"healthy": False}


def _delete(path: Path) -> None:
    """Delete a state such that it never looks whole with a part missing."""
    remains = path.with_name(f".{path.name}.deleted.tmp")
    path.rename(remains)
    shutil.rmtree(remains)
