"""What a run's folder holds, as far as it can be read; what cannot is named."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stylepipe.errors import UserError
from stylepipe.interop.network_file import read_header
from stylepipe.parsing import one_line, parse_json, parse_yaml
from stylepipe.run_files import (
    BEST_NETWORK,
    CLIPS_FOLDER,
    CONFIG_FILE,
    GRIDS_FOLDER,
    LOG_FILE,
    METRICS_FILE,
    REAL_GRID,
    STATS_FILE,
    images_seen_of,
)

LOG_LINES, LOG_LINE_LENGTH = 60, 1000
MAX_TEXT_BYTES = 256 * 1024  # of config.yaml, and from the end of log.txt
MAX_EVENTS = 200
_NAMED = 5  # runs in a message
_SIGNS = (STATS_FILE, LOG_FILE, METRICS_FILE, CONFIG_FILE, GRIDS_FOLDER)  # of a run

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """One number over time."""

    x: NDArray[np.int64]
    """[n] images seen, ascending."""
    y: NDArray[np.float64]
    """[n]; NaN where the run wrote null, which stands for what was not finite."""


@dataclass(frozen=True)
class Event:
    """A text at a moment, such as an alarm."""

    images_seen: int
    name: str
    """Its key in stats.jsonl, such as `Alarm/mode_collapse`."""
    text: str


@dataclass(frozen=True)
class Score:
    """What a metric measured at a moment: a line of metrics.jsonl."""

    metric: str
    images_seen: int
    network: str
    results: dict[str, float]
    """The headline first; NaN for null."""
    best: str
    """`lowest` or `highest`."""
    settings: dict[str, Any]
    """What scores must share to be comparable."""


@dataclass
class Run:
    """A run as its folder shows it."""

    path: Path
    name: str = ""
    """Its folder's name, or more of the path where runs of one report share that."""
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    """name, images and digest, as far as known."""
    curves: dict[str, Curve] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    grids: dict[int, Path] = field(default_factory=dict)
    """By images seen, ascending."""
    real: Path | None = None
    clips: dict[int, Path] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    """The last lines."""
    best: int | None = None
    """Images seen of network-best.safetensors."""
    written: float = 0
    """When it last wrote something, in seconds of the epoch; 0 if never."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, and why."""


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds something that a run leaves."""
    return any((folder / name).exists() for name in _SIGNS)


def check_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the folders, each once.

    Raises:
        UserError: there are none, or one is no run; names the nearest ones.
    """
    if not folders:
        raise UserError("no RUN given: name the folder of a run, such as runs/00000-auto-faces256-256")
    for folder in folders:
        if folder.is_dir() and is_run(folder):
            continue
        found = "is no folder" if folder.exists() else "there is no such folder"
        if folder.is_dir():
            found = f"is no run: it has no {', '.join(_SIGNS[:-1])} or {_SIGNS[-1]}"
        near = _runs_near(folder)
        remedy = f"try {' or '.join(map(str, near))}" if near else "give the --out of a training"
        raise UserError(f"{folder}: {found}; {remedy}")
    first: dict[Path, Path] = {}
    for folder in folders:
        first.setdefault(folder.resolve(), folder)
    return list(first.values())


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, and tell those apart whose folders have the same name."""
    runs = [read_run(folder) for folder in folders]
    parts = [run.path.resolve().parts for run in runs]
    for run, own in zip(runs, parts, strict=True):
        length = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        run.name = _text(os.path.join(*own[-length:]))
    return runs


def read_run(folder: Path) -> Run:
    """Read a run's folder; nothing in it stops that, what cannot be read is named in `problems`.

    Raises:
        UserError: the folder is gone.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder any more")
    run = Run(folder, _text(folder.resolve().name))
    _read_config(run)
    _read_stats(run)
    _read_scores(run)
    _read_log(run)
    _read_best(run)
    run.grids = _by_images_seen(run, GRIDS_FOLDER, ".png")
    run.clips = _by_images_seen(run, CLIPS_FOLDER, ".gif")
    real = folder / GRIDS_FOLDER / REAL_GRID
    run.real = real if real.is_file() else None
    run.data = _data(run)
    written = (STATS_FILE, LOG_FILE, METRICS_FILE, CONFIG_FILE)
    run.written = max((path.stat().st_mtime for name in written if (path := folder / name).is_file()), default=0)
    return run


def fingerprint(folder: Path) -> tuple[object, ...]:
    """Return what differs once something in a run's folder has changed: names, times and sizes of its files."""
    found: list[object] = []
    for inner in (folder, folder / GRIDS_FOLDER, folder / CLIPS_FOLDER):
        try:
            for path in sorted(inner.iterdir()):
                stat = path.stat()
                found.append((str(path), stat.st_mtime_ns, stat.st_size))
        except OSError as error:
            found.append((str(inner), error.errno))
    return tuple(found)


def flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping's values by dotted names, such as loss.r1_gamma."""
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        values |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return values


def _runs_near(folder: Path) -> list[Path]:
    """Return runs in a folder, the newest first; of a folder that is not there, those of similar names beside it."""
    try:
        if folder.is_dir():
            within = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_dir()]
            runs = [path for path in within if path.name != GRIDS_FOLDER and is_run(path)]
            return sorted(runs, key=lambda path: -path.stat().st_mtime)[:_NAMED]
        beside = {path.name: path for path in folder.parent.iterdir() if path.is_dir() and is_run(path)}
    except OSError:
        return []
    return [beside[name] for name in difflib.get_close_matches(folder.name, beside, n=3, cutoff=0.5)]


def _read_config(run: Run) -> None:
    text = _attempt(run, CONFIG_FILE, lambda path: path.read_bytes()[:MAX_TEXT_BYTES].decode(errors="replace"))
    if text is None:
        if not (run.path / CONFIG_FILE).exists():
            run.problems.append(f"{CONFIG_FILE}: not there, so the settings are not known")
        return
    run.config_text = _text(text)
    try:
        config = parse_yaml(text)
    except ValueError as error:
        run.problems.append(f"{CONFIG_FILE}: no YAML ({_first_line(error)})")
        return
    if isinstance(config, dict):
        run.config = config
    else:
        run.problems.append(f"{CONFIG_FILE}: holds no settings")


def _read_stats(run: Run) -> None:
    columns: dict[str, tuple[list[int], list[float]]] = {}
    events: list[Event] = []
    strange: set[str] = set()
    for line in _json_lines(run, STATS_FILE):
        seen = line.pop("images_seen")
        for key, value in line.items():
            if value is None or isinstance(value, (int, float)):
                xs, ys = columns.setdefault(_text(key), ([], []))
                xs.append(seen)
                ys.append(_number(value))
            elif isinstance(value, str):
                events.append(Event(seen, _text(key), _text(value)))
            else:
                strange.add(_text(key))
    if strange:
        run.problems.append(f"{STATS_FILE}: neither numbers nor texts, left out: {', '.join(sorted(strange))}")
    run.events = events[-MAX_EVENTS:]
    if len(events) > MAX_EVENTS:
        run.problems.append(f"{STATS_FILE}: of {len(events):,} alarms only the last {MAX_EVENTS} are shown")
    for key, (xs, ys) in columns.items():
        x, y = np.array(xs, dtype=np.int64), np.array(ys, dtype=np.float64)
        order = np.argsort(x, kind="stable")
        run.curves[key] = Curve(x[order], y[order])


def _read_scores(run: Run) -> None:
    wrong = 0
    for line in _json_lines(run, METRICS_FILE):
        try:
            results = {
                _text(key): _number(value)
                for key, value in line["results"].items()
                if value is None or isinstance(value, (int, float))
            }
            settings, network = line.get("settings"), line.get("network")
            score = Score(
                metric=_text(str(line["metric"])),
                images_seen=line["images_seen"],
                network=_text(network) if isinstance(network, str) else "",
                results=results,
                best=line.get("best") or "",
                settings=settings if isinstance(settings, dict) else {},
            )
        except (KeyError, AttributeError):
            wrong += 1
            continue
        if results and score.best in ("lowest", "highest", ""):
            run.scores.append(score)
        else:
            wrong += 1
    if wrong:
        run.problems.append(f"{METRICS_FILE}: {_counted(wrong)} no scores")


def _read_log(run: Run) -> None:
    def tail(path: Path) -> str:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - MAX_TEXT_BYTES, 0))
            return file.read().decode(errors="replace")

    text = _attempt(run, LOG_FILE, tail) or ""
    run.log = [_text(line)[:LOG_LINE_LENGTH] for line in text.splitlines()[-LOG_LINES:]]


def _read_best(run: Run) -> None:
    if not (run.path / BEST_NETWORK).exists():
        return
    try:
        run.best = _images_seen(int(read_header(run.path / BEST_NETWORK).metadata["images_seen"]))
    except (UserError, OSError, KeyError, ValueError) as error:
        run.problems.append(f"{BEST_NETWORK}: does not say its images_seen ({_first_line(error)})")


def _by_images_seen(run: Run, folder: str, suffix: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted((run.path / folder).glob(f"[0-9]*{suffix}")):
        try:
            found[_images_seen(images_seen_of(path))] = path
        except (ValueError, OverflowError):
            run.problems.append(f"{folder}/{_text(path.name)}: its name is no kimg")
    return dict(sorted(found.items()))


def _data(run: Run) -> dict[str, Any]:
    """Find out what a run is trained on: its newest state says, or else the newest score, or the settings."""
    said: list[Any] = []
    for path in sorted(run.path.glob("state-*/state.json"))[-1:]:
        said.append(_attempt(run, str(path.relative_to(run.path)), lambda path: parse_json(path.read_bytes())))
        said = [one["info"].get("data") for one in said if isinstance(one, dict) and isinstance(one.get("info"), dict)]
    said += [score.settings.get("data") for score in run.scores[-1:]]
    data: dict[str, Any] = next((one for one in said if isinstance(one, dict) and one.get("name")), {})
    if not data and "data" in run.config:
        return {"name": "drawn faces" if run.config["data"] is None else str(run.config["data"])}
    return data


def _json_lines(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Give the objects of a file's lines that say their images_seen; name the lines that cannot be read."""
    content = _attempt(run, name, Path.read_bytes) or b""
    wrong: list[int] = []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
            seen = values["images_seen"]
            if seen is None:  # of a network from elsewhere, which does not say
                continue
            values["images_seen"] = _images_seen(seen)
        except (ValueError, KeyError, TypeError):
            wrong.append(number)
        else:
            yield values
    if wrong and wrong[-1] == len(lines):  # no newline behind it
        wrong.pop()
        run.problems.append(f"{name}: the last line is half-written")
    if wrong:
        run.problems.append(f"{name}: {_counted(len(wrong))} damaged, first line {wrong[0]}")


def _attempt(run: Run, name: str, read: Callable[[Path], T]) -> T | None:
    """Return what reading a file of the run gives; None if it is not there, or cannot be read, which is named."""
    path = run.path / name
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may have no end
            raise ValueError("is no file")
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        run.problems.append(f"{name}: cannot be read ({_first_line(error)})")
        return None


def _images_seen(value: Any) -> int:
    """Return an image counter; raise ValueError or TypeError where it is none, or none that a page can show."""
    if isinstance(value, bool) or not 0 <= value < 2**53:  # the page's numbers are doubles
        raise ValueError("no number of images")
    return int(value)


def _number(value: float | None) -> float:
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:  # an integer beyond all floats
        return math.nan
    return number if math.isfinite(number) else math.nan


def _text(text: str) -> str:
    """Replace what UTF-8 cannot say, such as the bytes of a foreign file name."""
    return text.encode(errors="replace").decode()


def _counted(lines: int) -> str:
    return "1 line is" if lines == 1 else f"{lines:,} lines are"


def _first_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(text) or type(error).__name__
