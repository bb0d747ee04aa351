"""A training that is killed at random goes on to the same bits; see kill_loop.py for two hundred of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from harness import Saved, differences, images_seen, largest_relative_difference, newest_whole_state
from kill_loop import HITS, Kill, Loop, Result, table

from stylepipe.training.checkpoint import save_state


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("processes", "kills"), [(1, 5), (2, 3)])
def test_a_run_killed_at_random_goes_on_to_the_bit(processes: int, kills: int, tmp_path: Path) -> None:
    loop = Loop(tmp_path, 0.3, processes, seed=processes)
    loop.train_reference()
    result = loop.run(kills)
    assert result.problems == []
    assert len(result.kills) == kills
    assert all(kill.recovered and kill.lost == 0 for kill in result.kills)
    assert sum(kill.compared for kill in result.kills) > 0


def saved(**tensors: torch.Tensor) -> Saved:
    info = {"healthy": True, "config": {"out": str(len(tensors)), "seed": 3}}
    return Saved(tensors, {"images_seen": 8, "layout": {}, "info": info})


def test_states_are_compared_to_the_bit() -> None:
    zero, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert differences(saved(a=zero, b=nan), saved(a=zero.clone(), b=nan.clone())) == []
    assert differences(saved(a=zero), saved(a=-zero)) == ["a"], "equal, but other bits"
    assert differences(saved(a=zero), saved(a=zero.double())) == ["a"]
    assert differences(saved(a=zero), saved(a=zero, b=nan)) == ["b"], "the folder of the run does not count"
    other = saved(a=zero)
    other.description["info"]["config"]["seed"] = 4
    assert differences(saved(a=zero), other) == ["state.json: config"]


def test_the_largest_relative_difference_is_of_whole_tensors() -> None:
    ours, theirs = (saved(a=torch.tensor([3.0, 4.0 + e]), b=torch.ones(2)) for e in (0.5, 0.0))
    assert largest_relative_difference(ours, theirs) == (pytest.approx(0.1), "a")


def test_what_is_not_whole_counts_as_not_there(tmp_path: Path) -> None:
    for images in (8, 16):
        save_state(tmp_path, images, {"a": torch.ones(3)}, {}, {"config": {}})
    assert newest_whole_state(tmp_path) == 16
    (tmp_path / "state-000000.016" / "state.safetensors").write_bytes(b"half")
    assert newest_whole_state(tmp_path) == 8
    assert images_seen(tmp_path) == 0
    (tmp_path / "stats.jsonl").write_text('{"images_seen": 12, "a": 1}\n{"images_seen": 16, "a"')
    assert images_seen(tmp_path) == 12


def test_the_table_counts_what_was_hit() -> None:
    kills = [
        Kill("all processes", "training", 4, compared=3, recovered=True, first_step_s=4.0),
        Kill("all processes", "writing", 12, compared=3, differing=1, first_step_s=5.0),
        Kill("rank 1", "starting", 0, recovered=True),
    ]
    header, all_processes, rank = (re.split(" {2,}", line) for line in table(Result(kills)).splitlines())
    assert header[2:6] == [f"while {hit}" for hit in HITS]
    assert all_processes == ["all processes", "2", "0", "1", "1", "0", "1", "6", "1", "8, 12", "0", "4.5 s"]
    assert rank == ["rank 1", "1", "1", "0", "0", "0", "1", "0", "0", "0, 0", "0", "-"]
