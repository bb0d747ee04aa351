"""The report as a page: one HTML file with all that it shows, which asks nothing of any network."""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stylepipe.report.curves import (
    MAX_POINTS,
    MEMORY_KEY,
    MIN_POINTS,
    TIME_KEY,
    WORLD_SIZE_KEY,
    grouped,
    latest,
    thinned,
    trained_seconds,
)
from stylepipe.report.pictures import Album, Cache, Picture, make_albums
from stylepipe.report.run import Run, flat, read_runs
from stylepipe.report.scores import Series, all_series, shown

CURVE_SHARE = 0.25  # of the page's room
POINT_BYTES = 22  # that a point takes, its share of the means included
_NOTES_BYTES = 4096  # what is said of pictures
MEGABYTE = 1_000_000
_DIGEST_LENGTH = 12
_STYLES, _SCRIPTS = ("page.css",), ("chart.js", "images.js", "page.js")


@dataclass(frozen=True)
class Report:
    """What a page shows."""

    title: str
    data: dict[str, Any]
    """What the page's scripts draw; pictures by their keys."""
    pictures: dict[str, Picture]


def make_report(folders: Sequence[Path], max_bytes: int, cache: Cache | None = None) -> Report:
    """Read runs and choose what of them goes on a page of about max_bytes at most.

    Args:
        folders: of the runs.
        max_bytes: of the page. Curves take a quarter of it at most, what is left is for pictures.
        cache: of pictures, kept between the calls for the same runs.

    Raises:
        UserError: a folder is gone.
    """
    runs = read_runs(folders)
    series = all_series(runs)
    curves = sum(len(run.curves) for run in runs)
    points = int(min(max(max_bytes * CURVE_SHARE / POINT_BYTES / max(curves, 1), MIN_POINTS), MAX_POINTS))
    data: dict[str, Any] = {
        "made": round(time.time(), 3),
        "version": version("stylepipe"),
        "runs": [_run(run, points) for run in runs],
        "groups": [vars(group) for group in grouped(dict.fromkeys(key for run in runs for key in run.curves))],
        "metrics": [_metric(one, points) for one in series],
        "differences": _differences(runs),
    }
    title = ", ".join(run.name for run in runs)
    room = max_bytes - len(render(Report(title, data, {}))) - _NOTES_BYTES
    albums = make_albums(runs, [_best_moments(run, i, series) for i, run in enumerate(runs)], room, cache or Cache())
    pictures: dict[str, Picture] = {}
    for number, (run, album) in enumerate(zip(runs, albums, strict=True)):
        pictures |= {picture.key: picture for picture in album.pictures()}
        data["runs"][number] |= _images(run, album, _names_of_best(run, number, series))
    return Report(title, data, pictures)


def render(report: Report, live: bool = False) -> str:
    """Return the page, ASCII only; a live one takes its pictures and what is new from the server that it came from."""
    uris = {
        key: f"picture/{key}"
        if live
        else f"data:{picture.mime};base64,{base64.b64encode(picture.content).decode('ascii')}"
        for key, picture in report.pictures.items()
    }
    own = " 'self'" if live else ""
    parts = {
        # The browser itself sees to it that nothing is asked of anyone else.
        "policy": f"default-src 'none'; img-src data:{own}; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        + (f"; connect-src{own}" if live else ""),
        "title": html.escape(report.title),
        "style": "".join(map(_template, _STYLES)),
        "data": _json({**report.data, "pictures": uris, "live": live}),
        "script": "".join(map(_template, _SCRIPTS)),
    }
    pieces = _template("page.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:  # each part once: what stands in it is not looked through again
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled).encode("ascii", "xmlcharrefreplace").decode("ascii")


def live_data(report: Report) -> str:
    """Return what a live page draws, as JSON."""
    return _json({**report.data, "pictures": {key: f"picture/{key}" for key in report.pictures}, "live": True})


def _template(name: str) -> str:
    return resources.files("stylepipe.report").joinpath(name).read_text(encoding="ascii")


def _json(data: Any) -> str:
    """Write JSON that neither ends a script element nor begins a comment in one, ASCII only."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _run(run: Run, points: int) -> dict[str, Any]:
    return {
        "name": run.name,
        "path": str(run.path.resolve()).encode(errors="replace").decode(),
        "written": run.written,
        "facts": _facts(run),
        "seen": _images_seen(run),
        "total": _total(run),
        "speed": latest(run.curves.get(TIME_KEY)),
        "config": run.config_text,
        "log": run.log,
        "events": [{"x": event.images_seen, "name": event.name, "text": event.text} for event in run.events],
        "problems": run.problems,
        "curves": {key: thinned(curve, points) for key, curve in run.curves.items()},
        "moments": [],
        "real": None,
        "clip": None,
        "notes": [],
    }


def _images(run: Run, album: Album, best: dict[int, list[str]]) -> dict[str, Any]:
    """Return what a page has of a run's pictures; a grid of a best moment says of what."""
    times = list(album.grids)
    labels: dict[int, list[str]] = {}
    for seen, names in best.items():
        if times:
            labels.setdefault(min(times, key=lambda time: abs(time - seen)), []).extend(names)
    return {
        "moments": [
            {"x": seen, "picture": picture.key, "best": ", ".join(dict.fromkeys(labels.get(seen, [])))}
            for seen, picture in album.grids.items()
        ],
        "real": album.real.key if album.real else None,
        "clip": {"x": album.clip[0], "picture": album.clip[1].key} if album.clip else None,
        "notes": album.notes,
        "problems": run.problems + album.problems,
    }


def _names_of_best(run: Run, number: int, series: Sequence[Series]) -> dict[int, list[str]]:
    """Return of which metrics a moment is the best, by images seen."""
    names: dict[int, list[str]] = {}
    if run.best is not None:
        names[run.best] = ["chosen as best"]
    for one in series:
        if (score := one.best_of(number)) is not None:
            names.setdefault(score.images_seen, []).append(f"best {one.metric}")
    return names


def _best_moments(run: Run, number: int, series: Sequence[Series]) -> set[int]:
    return set(_names_of_best(run, number, series))


def _images_seen(run: Run) -> int:
    last = [int(curve.x[-1]) for curve in run.curves.values() if len(curve.x)]
    return max([*last, *run.grids, *(event.images_seen for event in run.events)], default=0)


def _total(run: Run) -> float | None:
    kimg = run.config.get("kimg")
    return kimg * 1000 if isinstance(kimg, (int, float)) and not isinstance(kimg, bool) and 0 < kimg < 1e12 else None


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return what a person asks first, as label and text; what is not known is left out."""
    config, curves = run.config, run.curves
    network = config.get("network")
    data = [str(run.data["name"])] if "name" in run.data else []
    if isinstance(images := run.data.get("images"), int):
        data.append(f"{images:,} images")
    if isinstance(digest := run.data.get("digest"), str):
        data.append(f"digest {digest[:_DIGEST_LENGTH]}")
    speed, seconds = latest(curves.get(TIME_KEY)), trained_seconds(curves.get(TIME_KEY))
    memory, processes = latest(curves.get(MEMORY_KEY)), latest(curves.get(WORLD_SIZE_KEY))
    facts: list[tuple[str, str | None]] = [
        ("Resolution", f"{shown(config['res'])} px" if config.get("res") is not None else None),
        ("Preset", shown(config["preset"]) if "preset" in config else None),
        ("Networks", shown(network["kind"]) if isinstance(network, dict) and "kind" in network else None),
        ("Data", ", ".join(data) or None),
        ("Batch", shown(config["batch_size"]) if config.get("batch_size") is not None else None),
        ("Processes", f"{processes:.0f}" if processes is not None else None),
        ("Seed", shown(config["seed"]) if "seed" in config else None),
        ("Speed", f"{speed:.4g} s/kimg" if speed is not None else None),
        ("Time of training", duration(seconds) if seconds else None),
        ("Peak memory", f"{memory:.3g} GiB" if memory is not None else None),
        ("Best network", f"of {run.best / 1000:,.10g} kimg" if run.best is not None else None),
    ]
    return [(label, text) for label, text in facts if text is not None]


def duration(seconds: float) -> str:
    """Return a time for people, in its two largest units."""
    for unit, size, below, below_size in (("days", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            whole, rest = divmod(round(seconds / below_size), size // below_size)
            return f"{whole} {'day' if unit == 'days' and whole == 1 else unit} {rest} {below}"
    return f"{seconds:.3g} s"


def _metric(series: Series, points: int) -> dict[str, Any]:
    def told(score: Any) -> dict[str, Any] | None:
        if score is None:
            return None
        value = series.value(score)
        return {"x": score.images_seen, "y": value if value == value else None, "network": score.network}

    results = series.results()
    return {
        "metric": series.metric,
        "best": series.best,
        "differs": series.differs,
        "settings": [(name, shown(value)) for name, value in flat(series.settings).items()],
        "results": results,
        "runs": [
            {
                "curves": {name: thinned(series.curve(number, name), points) for name in results},
                "latest": told(series.latest_of(number)),
                "best": told(series.best_of(number)),
            }
            if scores
            else None
            for number, scores in enumerate(series.runs)
        ],
    }


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the options in which runs whose settings are known differ; None for an option that one has not."""
    settings = [flat(run.config) if run.config else None for run in runs]
    names = dict.fromkeys(name for one in settings if one for name in one)
    rows = []
    for name in names:
        values = [None if one is None or name not in one else shown(one[name]) for one in settings]
        known = {value for value, one in zip(values, settings, strict=True) if one is not None}
        if len(known) > 1:
            rows.append({"option": name, "values": values})
    return rows
