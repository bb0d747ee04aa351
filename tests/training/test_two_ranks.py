"""Two real gloo processes that share a batch are one process that takes it whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("two_ranks.py")
PHASES = ["G/main", "G/path_length", "D/main", "D/r1"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train(out: Path, world_size: int, losses: str = "both", exchange: str = "") -> list[dict[str, torch.Tensor]]:
    """Run two_ranks.py with plain torch.distributed environment variables; return what each rank wrote.

    `exchange` cuts gradients into several buckets and says when and as what they are sent, such as "early bf16".
    """
    out.mkdir()
    common = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if world_size > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    processes = []
    for rank in range(world_size):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        command = [sys.executable, str(SCRIPT), str(out), losses, exchange]
        processes.append(subprocess.Popen(command, env=common | ranks, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    return [load_file(out / f"rank{rank}.safetensors") for rank in range(world_size)]


@pytest.fixture(scope="module", params=["both", "labels", "frozen", "growing"])
def runs(tmp_path_factory, request):
    """Runs without labels; with all of labels; with a level frozen; from 8 px through a fade to 16 px."""
    folder = tmp_path_factory.mktemp("ranks")
    (one,) = train(folder / "one", 1, request.param)
    two = train(folder / "two", 2, request.param)
    assert ("state/G.buffer.mapping.class_w_offset" in one) == (request.param == "labels")
    return one, two


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def test_there_really_were_two(runs):
    one, two = runs
    assert int(one["world_size"]) == 1
    assert [int(rank["world_size"]) for rank in two] == [2, 2]


@pytest.mark.parametrize("phase", PHASES)
def test_gradients_are_those_of_one_process(runs, phase):
    """To float32 rounding: sums of the same terms in another order. Adam with beta1 = 0 can turn the rounding of a
    gradient near 0 into a full step, hence the room above the 3e-7 that was found."""
    one, two = runs
    steps = [step for step in range(4) if f"grad/{step}/{phase}" in one]
    assert len(steps) >= 2
    for step in steps:
        assert relative_difference(two[0][f"grad/{step}/{phase}"], one[f"grad/{step}/{phase}"]) < 1e-5, step


def test_weights_and_averages_are_those_of_one_process(runs):
    one, two = runs
    for name in one:
        if name.startswith("state/") and "exp_avg" not in name:
            assert relative_difference(two[0][name], one[name]) < 1e-6, name


def test_the_probability_of_augmentations_moved_and_is_that_of_one_process(runs):
    one, two = runs
    p = one["state/recipe.augment.p"]
    assert p != 0.5
    assert all(torch.equal(rank["state/recipe.augment.p"], p) for rank in two)


def test_all_ranks_hold_the_same_weights(runs):
    _, two = runs
    for name in two[0]:
        if name.startswith("state/"):
            assert torch.equal(two[0][name], two[1][name]), name


@pytest.mark.parametrize("runs", ["both"], indirect=True)
@pytest.mark.parametrize(("losses", "phase"), [("r1", "G/path_length"), ("path length", "D/r1")])
def test_each_regularizer_does_change_the_training(runs, tmp_path, losses, phase):
    """Without the one, its network comes out otherwise; the first step of the other network is not touched."""
    one, _ = runs
    (without,) = train(tmp_path / "without", 1, losses)
    assert f"grad/0/{phase}" not in without
    assert one[f"grad/0/{phase}"].norm() > 0
    network, other = ("G", "D") if phase[0] == "G" else ("D", "G")
    assert relative_difference(without[f"state/{network}.params"], one[f"state/{network}.params"]) > 1e-4
    assert torch.equal(without[f"grad/0/{other}/main"], one[f"grad/0/{other}/main"]) == (other == "G")


def assert_equal(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> None:
    for of_a, of_b in zip(a, b, strict=True):
        assert of_a.keys() == of_b.keys()
        for name in of_a:
            if not name.startswith("early/"):
                torch.testing.assert_close(of_a[name], of_b[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("losses", ["both", "frozen", "growing"])
def test_early_or_late_is_the_same_to_the_bit(tmp_path, losses):
    """Of a phase's runs only the first after a change of structure sends nothing while a backward pass runs."""
    late = train(tmp_path / "late", 2, losses, "late fp32")
    early = train(tmp_path / "early", 2, losses, "early fp32")
    assert_equal(late, early)
    structures = (0, 1, 1, 2) if losses == "growing" else (0, 0, 0, 0)
    for name in (name for name in late[0] if name.startswith("early/")):
        _, step, phase = name.split("/", 2)
        before = [f"early/{n}/{phase}" for n in range(int(step)) if structures[n] == structures[int(step)]]
        for rank in range(2):
            assert late[rank][name] == 0
            assert (early[rank][name] > 0) == any(earlier in early[rank] for earlier in before), name


@pytest.mark.slow
def test_bf16_is_within_its_rounding_the_same_on_all_ranks_and_every_time(tmp_path):
    exact = train(tmp_path / "exact", 2, "both", "early fp32")
    halves = train(tmp_path / "halves", 2, "both", "early bf16")
    # Each rank rounds its half, and so does their sum: three times 2^-9 of what may be larger than the sum.
    difference = relative_difference(halves[0]["grad/0/G/main"], exact[0]["grad/0/G/main"])
    assert 1e-4 < difference < 3 * 2**-8
    assert_equal(halves[:1], halves[1:])
    assert_equal(halves, train(tmp_path / "again", 2, "both", "early bf16"))


@pytest.mark.slow
def test_nan_on_one_rank_has_all_ranks_skip_the_update(tmp_path):
    ranks = train(tmp_path / "ranks", 2, "poisoned", "early fp32")
    assert_equal(ranks[:1], ranks[1:])
    assert ranks[0]["state/skipped.D/main"].tolist() == [1, 0]
    assert ranks[0]["early/1/D/main"] > 0
    for name, tensor in ranks[0].items():
        if name.startswith("state/"):
            assert tensor.isfinite().all(), name
