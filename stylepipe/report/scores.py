"""Scores of metrics as series: only what was measured the same way is joined and ranked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stylepipe.report.run import Curve, Run, Score, flat
from stylepipe.run_files import network_file

_DIGEST_LENGTH = 12  # characters: enough to tell data apart


@dataclass
class Series:
    """Scores of one metric that are comparable."""

    metric: str
    best: str
    """`lowest` or `highest`, or empty where neither is."""
    settings: dict[str, Any]
    differs: str
    """The settings in which it differs from the other series of its metric; empty if it is the only one."""
    runs: list[dict[int, Score]]
    """Each run's, by images seen, ascending."""

    @property
    def headline(self) -> str:
        """The result that counts."""
        return next(next(iter(score.results)) for scores in self.runs for score in scores.values())

    def best_of(self, run: int) -> Score | None:
        """Return a run's best score, of equal ones the first; None where it has none that is finite."""
        scores = [score for score in self.runs[run].values() if self.best and not math.isnan(self.value(score))]
        sign = -1 if self.best == "highest" else 1
        return min(scores, key=lambda score: sign * self.value(score), default=None)

    def latest_of(self, run: int) -> Score | None:
        """Return a run's score at the last moment, if it has any."""
        return next(reversed(self.runs[run].values()), None)

    def value(self, score: Score) -> float:
        """Return the headline of a score; NaN if it was not finite."""
        return score.results.get(self.headline, math.nan)

    def curve(self, run: int, result: str) -> Curve:
        """Return one result of a run over time."""
        scores = self.runs[run]
        values = [score.results.get(result, math.nan) for score in scores.values()]
        return Curve(np.array(list(scores), dtype=np.int64), np.array(values, dtype=np.float64))

    def results(self) -> list[str]:
        """Return the names of all results, the headline first."""
        return list(dict.fromkeys(name for scores in self.runs for score in scores.values() for name in score.results))


def all_series(runs: Sequence[Run]) -> list[Series]:
    """Sort the scores of runs into series, in the order in which they were first measured.

    Of several scores of one moment the latest counts. Those of other networks than a run has saved at its moments, such
    as averages that were made afterwards, are no part of its curves.
    """
    found: dict[tuple[str, str, str], Series] = {}
    for number, run in enumerate(runs):
        for score in run.scores:
            if score.network != network_file(score.images_seen):
                continue
            key = (score.metric, score.best, json.dumps(score.settings, sort_keys=True))
            new = Series(score.metric, score.best, score.settings, "", [{} for _ in runs])
            found.setdefault(key, new).runs[number][score.images_seen] = score
    ordered = sorted(found.values(), key=lambda series: [other.metric for other in found.values()].index(series.metric))
    for series in ordered:
        series.runs = [dict(sorted(scores.items())) for scores in series.runs]
        series.differs = _difference(series, [other for other in ordered if other.metric == series.metric])
    return ordered


def shown(value: Any) -> str:
    """Return a setting as it is written in a config file."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _difference(series: Series, family: Sequence[Series]) -> str:
    """Name the settings in which a series differs from others of its metric."""
    each = [flat({**other.settings, "best": other.best}) for other in family]
    own = flat({**series.settings, "best": series.best})
    names = dict.fromkeys(name for settings in each for name in settings)
    parts = []
    for name in names:
        if len({shown(settings.get(name, "?")) for settings in each}) > 1:
            value = shown(own.get(name, "not said"))
            parts.append(f"{name} {value[:_DIGEST_LENGTH] if name.endswith('digest') else value}")
    return ", ".join(parts)
