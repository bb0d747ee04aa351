"""torchrun --max_restarts starts all processes again when one has died, and the run goes on as if none had."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from harness import (
    Training,
    broken_files,
    differences,
    newest_whole_state,
    read_state,
    stats_of,
    torchrun,
    wait_until,
)


def elastic(work: Path, *options: object) -> Training:
    """Start a training whose two processes torchrun starts again up to three times; its run is in work/run.

    Without the variable, torchrun keeps the store by which processes find one another, and those that it has started
    again may find the addresses of the dead there.
    """
    out = work / "run"
    python, module, name, *rest = torchrun(*options, "--out", out)
    command = [python, module, name, "--max_restarts", "3", *rest]
    return Training(command, work, out, environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_costs_no_more_than_time(
    rank: int, options: list[object], straight: Path, tmp_path: Path
) -> None:
    with elastic(tmp_path, *options) as training:
        wait_until(lambda: newest_whole_state(tmp_path / "run") >= 256, "a state of 256 images", 300)
        before = training.ranks()
        assert training.signal_rank(rank, signal.SIGKILL)
        training.wait_for_line(r"going on from [\d.]+ to 0.8 kimg")
        assert not {process.pid for process in training.ranks().values()} & {p.pid for p in before.values()}
        assert training.wait(300) == 0, training.output
        assert training.wait_for_all(10) == []
    out = tmp_path / "run"
    (gone_on_from,) = re.findall(r"going on from ([\d.]+) to", training.output)
    assert float(gone_on_from) >= 0.256
    assert differences(read_state(out / straight.name), read_state(straight)) == []
    assert broken_files(out) == []
    seen = [line["images_seen"] for line in stats_of(out)]
    assert seen == sorted(set(seen)), "each line once"


@pytest.mark.slow
def test_what_is_asked_to_stop_is_not_started_again(options: list[object], tmp_path: Path) -> None:
    """One process is asked, and all stop in good order; torchrun takes that for the end."""
    with elastic(tmp_path, *options) as training:
        training.wait_for_images(64)
        assert training.signal_rank(1, signal.SIGTERM)
        assert training.wait(120) == 0, training.output
    assert "stopped at" in training.output
    assert "going on from" not in training.output
