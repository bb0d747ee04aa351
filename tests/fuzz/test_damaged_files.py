"""Files of every kind that stylepipe reads, damaged: read or refused in one sentence, soon and in little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from run import all_outcomes, table
from targets import TARGETS


def test_a_few_damaged_files_of_every_kind(tmp_path: Path) -> None:
    outcomes = all_outcomes(list(TARGETS), range(12), tmp_path)
    assert sum(outcome.refused + outcome.accepted for outcome in outcomes.values()) == 12 * len(TARGETS), table(
        outcomes
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_thousands_of_damaged_files(target: str, tmp_path: Path) -> None:
    outcomes = all_outcomes([target], range(2000), tmp_path)
    assert outcomes[target].refused + outcomes[target].accepted == 2000, table(outcomes)
