"""`stylepipe bench scaling`: it counts what a step really sends, predicts as docs/scaling.md says, and measures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stylepipe.cli.bench_scaling import PhaseSums, Sum, count_sums, predict, seconds_of
from stylepipe.cli.main import main
from stylepipe.config import Config, NetworkConfig
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training import averaging
from stylepipe.training.averaging import Exchange
from stylepipe.training.engine import Engine
from stylepipe.training.timing import random_batch

SMALL = Config(res=16, preset="stylegan2", network=NetworkConfig(channel_base=128, channel_max=8, z_dim=8, w_dim=8))
COMMAND = ["bench", "scaling", "--res", "16", "--network.channel-base", "128", "--network.channel-max", "8"]


def test_a_sum_is_a_ring_over_the_slowest_link_and_all_of_its_hops() -> None:
    assert seconds_of(10**9, 8, "NVLink") == pytest.approx(2 * 7 / 8 * 1e9 / (0.8 * 450e9) + 14 * 2e-6)
    # 400 Gbit/s of each of 8 GPUs; 100 Gbit/s of all 8 together.
    assert seconds_of(10**9, 64, "InfiniBand") == pytest.approx(2 * 63 / 64 / (0.8 * 400) + 14 * 2e-6 + 14 * 5e-6)
    assert seconds_of(10**9, 512, "Ethernet") == pytest.approx(2 * 511 / 512 / (0.8 * 12.5) + 14 * 2e-6 + 126 * 30e-6)


def test_a_prediction_has_sums_wait_for_gradients_and_for_one_another() -> None:
    each = seconds_of(10**9, 64, "Ethernet")
    computing = 5 * each
    phase = PhaseSums("main", 1, 1.0, [Sum(10**9, 0.0), Sum(10**9, 0.1), Sum(10**9, 0.9), Sum(10**9, 1.0)])
    found = predict([phase], 64, "Ethernet", computing)
    assert found.alone == pytest.approx(4 * each)
    assert found.after == pytest.approx(9 * each)
    assert found.during == pytest.approx((0.9 * 5 + 2) * each)


def test_lazy_phases_count_at_their_share_of_sums_and_of_computing() -> None:
    each = seconds_of(10**9, 8, "NVLink")
    phases = [PhaseSums("main", 1, 3.0, [Sum(10**9, 0.0)]), PhaseSums("lazy", 4, 4.0, [Sum(10**9, 0.5)])]
    # Computing is 3/4 and, every fourth step, 1 of a step's: a sum of a lazy phase has half of that to hide in.
    found = predict(phases, 8, "NVLink", each)
    assert found.alone == pytest.approx(each * 5 / 4)
    assert found.during == pytest.approx(each + each / 4 + each / 4 * 0.5)


@pytest.mark.parametrize("sent_as", ["fp32", "bf16"])
def test_what_is_counted_is_what_a_training_sends(monkeypatch: pytest.MonkeyPatch, sent_as: str) -> None:
    monkeypatch.setattr(averaging, "BUCKET_BYTES", 4096)
    config = with_precision(resolve(replace(SMALL, reduce_dtype=sent_as), 8), "fp32")
    sizes: list[int] = []

    class Done:
        def wait(self) -> None: ...

    def start(tensor: Tensor) -> Done:
        sizes.append(tensor.nbytes)
        return Done()

    recipe = GANRecipe(config, torch.device("cpu"), world_size=8)
    exchange = Exchange(config.reduce_dtype, start=start)
    engine = Engine(recipe, optim=config.optim, ema=config.ema, world_size=8, exchange=exchange)
    for phase, counted in zip(recipe.phases, count_sums(config), strict=True):
        sizes.clear()
        engine.run_phase(phase, recipe.schedule.final(), *random_batch(engine, recipe.schedule.final(), 0))
        assert (counted.name, counted.interval) == (phase.name, phase.interval)
        assert sorted(each.size for each in counted.sums) == sorted(sizes)
        assert len(sizes) > 3
        done = [each.done for each in counted.sums]
        assert done == sorted(done)
        assert 0 < done[0] <= done[-1] <= 1


@pytest.mark.slow
def test_predictions_are_printed_and_kept(tmp_path, capsys) -> None:
    path = tmp_path / "scaling.json"
    assert main([*COMMAND, "--batch-gpu", "2", "--sec-per-step", "0.001", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "auto at 16 px, 2 images a GPU, computing 0.001 s a step (as given)"
    figures = json.loads(path.read_text())
    assert figures["images_per_gpu"] == 2
    sizes = {name: [sum(s["size"] for s in p["sums"]) for p in each] for name, each in figures["phases"].items()}
    for exact, half in zip(sizes["fp32"], sizes["bf16"], strict=True):
        assert exact / 2 <= half < exact * 0.51  # recorded averages stay float32
    rows = figures["predicted"]
    clusters = [(8, "NVLink"), (64, "InfiniBand"), (512, "InfiniBand"), (64, "Ethernet"), (512, "Ethernet")]
    assert [(row["gpus"], row["slowest_link"]) for row in rows[::2]] == clusters
    for line, row in zip(lines[-len(rows) :], rows, strict=True):
        seconds = row["s_per_step"]
        assert seconds["after"] == pytest.approx(0.001 + seconds["alone"])
        assert 0.001 < seconds["during"] < seconds["after"] * (1 + 1e-9)
        assert row["s_per_kimg"] == pytest.approx(seconds["during"] / (2 * row["gpus"]) * 1000)
        assert line.split()[-1] == f"{0.001 / seconds['during']:.1%}"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], "--sec-per-step: nothing is published of this training"),
        (["--sec-per-step", "0"], "--sec-per-step 0: expected seconds, above 0"),
        (["--batch-gpu", "auto"], "--batch-gpu auto: expected a number"),
        (["--measure", "--batch-size", "6"], "--batch-size 6: expected a multiple of the 4 processes"),
    ],
)
def test_mistakes_are_named(more, named, capsys) -> None:
    assert main([*COMMAND, *more]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_processes_here_are_measured(tmp_path, capsys) -> None:
    path = tmp_path / "scaling.json"
    assert main([*COMMAND, "--measure", "--batch-size", "4", "--repeats", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["measured"]
    assert [row["processes"] for row in rows] == [1, 2, 4]
    assert rows[0]["sums_s"] == 0
    assert all(row["sums_s"] > 0 for row in rows[1:])
    lines = capsys.readouterr().out.splitlines()[-3:]
    for line, row in zip(lines, rows, strict=True):
        assert line.split()[:2] == [str(row["processes"]), str(4 // row["processes"])]
        assert float(line.split()[3]) == pytest.approx(row["s_per_step"] / 4 * 1000, abs=0.01)
