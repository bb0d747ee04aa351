"""Showing how far a long job is."""

from __future__ import annotations

import sys

import pytest

from stylepipe.datasets import progress
from stylepipe.datasets.progress import with_progress


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 10))  # ten seconds an item
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(with_progress(range(8), 2000, "preparing x")) == list(range(8))
    assert capsys.readouterr().err == (
        "preparing x: 3 of 2,000 images, 0.1 img/s, 5:32:50 left\n"
        "preparing x: 6 of 2,000 images, 0.1 img/s, 5:32:20 left\n"
    )


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(with_progress(range(8), 8, "preparing x")) == list(range(8))
    assert "preparing x: 100%" in capsys.readouterr().err


def test_nothing_when_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(with_progress(range(8), 8, "preparing x", show=False)) == list(range(8))
    assert capsys.readouterr().err == ""
