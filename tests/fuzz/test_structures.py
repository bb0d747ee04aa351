"""Whatever well-formed files hold, they are used, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import Reading
from damage import Files
from hypothesis import given, settings
from structures import STRUCTURES
from targets import TARGETS


@pytest.mark.filterwarnings("ignore")  # of libraries, of what they read
@pytest.mark.parametrize("examples", [12, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STRUCTURES)
def test_anything_is_used_or_refused_in_one_sentence(
    name: str, examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEPIPE_KERNELS", "torch")  # compiles nothing
    target, drawn = STRUCTURES[name]
    reading = Reading(TARGETS[target], tmp_path)

    @settings(max_examples=examples)
    @given(drawn(reading.valid))
    def check(files: Files) -> None:
        assert reading.read(files).wrong == ""

    check()
