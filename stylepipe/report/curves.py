"""Curves small enough for a page, in groups that are looked at together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stylepipe.report.run import Curve

MAX_POINTS, MIN_POINTS = 600, 60  # of one curve on the page

TIME_KEY = "Timing/sec_per_kimg"
MEMORY_KEY = "Resources/peak_memory_gib"
WORLD_SIZE_KEY = "world_size"
_CLOCK = {"Progress/kimg", "Progress/step", WORLD_SIZE_KEY}  # facts rather than curves

# From the top of the page down: what keys, title, unit. The first that fits has the key.
_GROUPS = (
    (r"Loss/.*", "Losses", ""),
    (r"Logits/.*sign.*", "Signs of logits", "mean, -1 to 1"),
    (r"Logits/.*", "Logits", ""),
    (r"Divergence/.*", "Divergence", ""),
    (r"Diversity/.*", "Diversity", "share of the data's"),
    (r"Progress/augment_p", "Augmentation", "probability p"),
    (r"Gradient/.*/norm", "Gradient norms", ""),
    (r"Gradient/.*", "Updates not made", "share, or in a row"),
    (r"Progress/.*", "Progress", ""),
    (r"Timing/.*", "Time", "s/kimg"),
    (r"Resources/.*", "Memory", "GiB"),
)


@dataclass(frozen=True)
class Group:
    """Keys of stats.jsonl that are looked at together."""

    title: str
    unit: str
    keys: list[str]


def grouped(keys: Iterable[str]) -> list[Group]:
    """Put keys into groups; unknown ones are grouped by their first part, at the end."""
    groups = {title: Group(title, unit, []) for _, title, unit in _GROUPS}
    for key in keys:
        if key in _CLOCK:
            continue
        title = next((title for pattern, title, _ in _GROUPS if re.fullmatch(pattern, key)), None)
        if title is None:
            title = key.partition("/")[0] if "/" in key else "Other"
        groups.setdefault(title, Group(title, "", [])).keys.append(key)
    return [group for group in groups.values() if group.keys]


def thinned(curve: Curve, points: int = MAX_POINTS) -> dict[str, Any]:
    """Return a curve of at most about `points` points as the page has it.

    Of each bucket of neighbours the lowest and the highest value stay, and one gap if it has any, so that neither a
    spike nor a collapse gets lost.

    Returns:
        x: images seen; y: values of five digits, None for a gap; and where points were left out mx and my, the
        buckets' middles and means, which smoothing is of.
    """
    if len(curve.x) <= points:
        return {"x": curve.x.tolist(), "y": _rounded(curve.y)}
    gaps = bool(np.isnan(curve.y).any())
    count = max((points - 2) // (3 if gaps else 2), 1)
    kept = {0, len(curve.x) - 1}
    middles, means = [], []
    for bucket in np.array_split(np.arange(len(curve.x)), count):
        values = curve.y[bucket]
        finite = bucket[~np.isnan(values)]
        if len(finite) < len(bucket):
            kept.add(int(bucket[np.isnan(values).argmax()]))
        if len(finite):
            kept |= {int(finite[curve.y[finite].argmin()]), int(finite[curve.y[finite].argmax()])}
        middles.append(int(curve.x[bucket[len(bucket) // 2]]))
        with np.errstate(over="ignore"):
            means.append(float(curve.y[finite].mean()) if len(finite) else np.nan)
    chosen = sorted(kept)
    return {
        "x": curve.x[chosen].tolist(),
        "y": _rounded(curve.y[chosen]),
        "mx": middles,
        "my": _rounded(np.array(means)),
    }


def latest(curve: Curve | None) -> float | None:
    """Return the last value that is finite."""
    if curve is None:
        return None
    finite = curve.y[~np.isnan(curve.y)]
    return float(finite[-1]) if len(finite) else None


def trained_seconds(curve: Curve | None) -> float | None:
    """Return the seconds that all steps took, of the seconds per kimg at each log line.

    A run that goes on from another's state begins where that ended: its first interval is taken to be as the next.
    """
    if curve is None or not len(curve.x):
        return None
    first = curve.x[0] if len(curve.x) == 1 else min(curve.x[0], curve.x[1] - curve.x[0])
    images = np.diff(curve.x, prepend=curve.x[0] - first)
    with np.errstate(over="ignore"):
        seconds = float(np.nansum(curve.y * images / 1000))
    return seconds if math.isfinite(seconds) else None


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    rounded = [float(f"{value:.5g}") for value in values]
    return [value if math.isfinite(value) else None for value in rounded]
