"""Scores: what is comparable is joined and ranked, nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from made_runs import SETTINGS, score, write_run

from stylepipe.report.run import read_runs
from stylepipe.report.scores import Series, all_series


def series_of(tmp_path: Path, *scores: list[str]) -> list[Series]:
    folders = [write_run(tmp_path / f"r{i}", moments=(), scores=lines) for i, lines in enumerate(scores)]
    return all_series(read_runs(folders))


def test_other_settings_are_another_series(tmp_path: Path) -> None:
    lines = [score(1000, 5.0), score(1000, 4.0, truncation_psi=0.7), score(2000, 3.0), score(2000, 1.0, images=100)]
    full, truncated, few = series_of(tmp_path, lines)
    assert [full.differs, truncated.differs, few.differs] == [
        "images 945, truncation_psi 1.0",
        "images 945, truncation_psi 0.7",
        "images 100, truncation_psi 1.0",
    ]
    assert full.curve(0, "swd").y.tolist() == [5, 3]
    assert truncated.curve(0, "swd").y.tolist() == [4]
    best = full.best_of(0)
    assert best is not None
    assert (best.images_seen, best.network) == (2000, "network-000002.000.safetensors")


def test_data_differ_by_their_digest(tmp_path: Path) -> None:
    other = {"name": "faces", "images": 945, "digest": "b" * 64}
    first, second = series_of(tmp_path, [score(1000, 5.0)], [score(1000, 4.0, data=other)])
    assert (first.differs, second.differs) == ("data.digest aaaaaaaaaaaa", "data.digest bbbbbbbbbbbb")
    assert first.best_of(1) is second.best_of(0) is None


def test_the_latest_line_of_a_moment_counts(tmp_path: Path) -> None:
    (series,) = series_of(tmp_path, [score(2000, 9.0), score(1000, 5.0), score(2000, 4.0)])
    assert series.differs == ""
    assert series.curve(0, "swd").x.tolist() == [1000, 2000]
    assert series.curve(0, "swd").y.tolist() == [5, 4]
    assert series.runs[0][2000].results["swd"] == 4


def test_the_order_of_settings_does_not_matter(tmp_path: Path) -> None:
    turned = json.loads(score(2000, 1.0))
    turned["settings"] = dict(reversed(SETTINGS.items()))
    assert len(series_of(tmp_path, [score(1000, 2.0), json.dumps(turned) + "\n"])) == 1


def test_best_is_lowest_or_highest_and_never_null(tmp_path: Path) -> None:
    lowest, highest = series_of(
        tmp_path,
        [score(s, v) for s, v in ((1, 2.0), (2, None), (3, 1.0), (4, 1.0))]
        + [score(s, v, best="highest", metric="recall") for s, v in ((1, 0.1), (2, None), (3, 0.3), (4, 0.2))],
    )
    for series, value in ((lowest, 1.0), (highest, 0.3)):
        best = series.best_of(0)
        assert best is not None
        assert (best.images_seen, series.value(best)) == (3, value)
        assert np.isnan(series.curve(0, series.headline).y[1])


def test_runs_share_a_series_and_metrics_stay_together(tmp_path: Path) -> None:
    both = [score(1000, 5.0), score(1000, 0.5, metric="kid"), score(1000, 4.0, truncation_psi=0.5)]
    found = series_of(tmp_path, both, [score(1000, 6.0)])
    assert [series.metric for series in found] == ["swd", "swd", "kid"]
    assert [bool(run) for run in found[0].runs] == [True, True]
    assert [bool(run) for run in found[1].runs] == [True, False]
