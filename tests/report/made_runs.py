"""Folders as runs leave them, made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from stylepipe.images import grid_shape
from stylepipe.run_files import kimg_name

SETTINGS = {
    "images": 945,
    "seed": 0,
    "truncation_psi": 1.0,
    "features": None,
    "data": {"name": "faces", "images": 945, "digest": "a" * 64},
    "code": "0.1.0",
}


def score(images_seen: int, value: float | None, best: str = "lowest", metric: str = "swd", **settings: Any) -> str:
    """Return a line of metrics.jsonl."""
    line = {
        "metric": metric,
        "images_seen": images_seen,
        "network": f"network-{kimg_name(images_seen)}.safetensors",
        "results": {metric: value, f"{metric}_64": value},
        "best": best,
        "settings": {**SETTINGS, **settings},
        "seconds": 3.1,
    }
    return json.dumps(line) + "\n"


def stats_line(images_seen: int, **values: Any) -> str:
    """Return a line of stats.jsonl; keys have __ for a slash."""
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return json.dumps({"images_seen": images_seen, **named}) + "\n"


def smooth_grid(res: int, seed: int) -> Image.Image:
    """Return a picture of the size of a grid, like nothing else but as smooth as faces."""
    columns, rows = grid_shape(res)
    pixels = np.random.default_rng(seed).integers(0, 256, (3 * rows, 3 * columns, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((columns * res, rows * res), Image.Resampling.BICUBIC)


def write_run(
    folder: Path,
    moments: Sequence[int] = (0, 1000, 2000, 3000),
    res: int = 16,
    stats: Sequence[str] | None = None,
    scores: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run of 4 kimg with grids at these images seen."""
    (folder / "grids").mkdir(parents=True)
    settings = {
        "res": res,
        "preset": "auto",
        "kimg": 4,
        "batch_size": 8,
        "seed": 0,
        "data": None,
        "loss": {"r1_gamma": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, **(config or {})}, sort_keys=False))
    for number, seen in enumerate(moments):
        smooth_grid(res, number).save(folder / "grids" / f"{kimg_name(seen)}.png")
    smooth_grid(res, 99).save(folder / "grids" / "real.png")
    lines = stats
    if lines is None:
        lines = [
            stats_line(
                seen,
                Loss__G__adversarial=1 + 1 / seen,
                Loss__D__adversarial=0.5 + seen / 1e4,
                Timing__sec_per_kimg=10.0 + seen / 1e3,
                Progress__kimg=seen / 1000,
                world_size=2,
            )
            for seen in range(100, 3001, 100)
        ]
    (folder / "stats.jsonl").write_text("".join(lines))
    if scores:
        (folder / "metrics.jsonl").write_text("".join(scores))
    (folder / "log.txt").write_text("     0.000 | auto at 16 px\n     3.000 | kimg 3.000\n")
    return folder
