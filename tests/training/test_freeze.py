"""Freeze-D: the first levels of the discriminator stay as they are, to the bit, and cost no gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stylepipe.config import Config, NetworkConfig, OptimConfig
from stylepipe.presets import resolve
from stylepipe.recipes.gan import trial
from stylepipe.training.engine import Engine
from stylepipe.training.estimate import estimate
from stylepipe.training.traffic import count_traffic


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine.recipe.networks["D"].named_parameters()}


def changed(engine: Engine, before: dict[str, Tensor]) -> set[str]:
    """Name the blocks of D whose weights have changed, and see that those have changed in every layer."""
    blocks = {}
    for name, p in engine.recipe.networks["D"].named_parameters():
        blocks.setdefault(name.split(".")[0], []).append(not torch.equal(p, before[name]))
    assert all(len(set(found)) == 1 for found in blocks.values()), blocks
    return {name for name, found in blocks.items() if found[0]}


@pytest.mark.parametrize(("freeze_d", "trained"), [(0, {"b16", "b8", "b4"}), (1, {"b8", "b4"}), (2, {"b4"})])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_frozen_levels_stay_and_all_others_are_trained(make_engine, batch_at, freeze_d, trained, beta1) -> None:
    engine = make_engine(freeze_d=freeze_d, optim=OptimConfig(beta1=beta1))
    before = weights(engine)
    for step in range(3):
        engine.step(batch_at(8 * step))
    assert changed(engine, before) == trained


def test_a_frozen_level_lets_gradients_through_and_gets_none(make_engine, batch_at) -> None:
    engine = make_engine(freeze_d=2)
    before = engine.arenas["G"].params.detach().clone()
    engine.step(batch_at(0))
    assert not torch.equal(engine.arenas["G"].params, before), "G learns through the frozen levels"
    sums = engine.record.take_sums()
    assert sums["Loss/D/r1"][0] > 0, "R1 differentiates through them as well"
    for name, p in engine.recipe.networks["D"].named_parameters():
        if name.endswith(".weight"):  # the last phase is R1, which biases hardly change
            assert (p.grad.abs().sum() > 0) == name.startswith("b4."), name
        assert not p.requires_grad


def test_a_frozen_training_goes_on_to_the_bit(make_engine, batch_at) -> None:
    straight = make_engine(freeze_d=1)
    for step in range(4):
        straight.step(batch_at(8 * step))
        if step == 1:
            state = {name: tensor.clone() for name, tensor in straight.state().items()}
    resumed = make_engine(freeze_d=1, seed=0)
    resumed.load_state(state, 16)
    for step in (2, 3):
        resumed.step(batch_at(8 * step))
    for name, tensor in straight.state().items():
        assert torch.equal(resumed.state()[name], tensor), name


def test_freezing_within_a_training_stops_what_momentum_would_go_on_with(make_engine, batch_at) -> None:
    free = make_engine(optim=OptimConfig(beta1=0.9))
    free.step(batch_at(0))
    frozen = make_engine(freeze_d=1, optim=OptimConfig(beta1=0.9))
    frozen.load_state({name: tensor.clone() for name, tensor in free.state().items()}, 8)
    before = weights(frozen)
    frozen.step(batch_at(8))
    assert changed(frozen, before) == {"b8", "b4"}


def a_config(freeze_d: int) -> Config:
    network = NetworkConfig(z_dim=16, w_dim=16, channel_base=256, mapping_layers=2)
    return resolve(Config(res=16, batch_size=8, freeze_d=freeze_d, network=network), 1)


def test_frozen_levels_save_work() -> None:
    def work(freeze_d: int) -> dict[str, float]:
        recipe = trial(a_config(freeze_d), 0, torch.device("meta"), 8)
        flops = estimate(recipe, 0, 8).flops
        assert [name for name, p in recipe.D.named_parameters() if not p.requires_grad and "b16." not in name] == []
        return flops

    free, frozen = work(0), work(1)
    assert frozen["D/main"] < 0.75 * free["D/main"], "no backward pass through the largest level"
    assert frozen["D/r1"] < free["D/r1"]
    assert frozen["G/main"] == free["G/main"]


def test_frozen_levels_save_traffic() -> None:
    def moved(freeze_d: int) -> dict[str, float]:
        counts = count_traffic(lambda size: trial(a_config(freeze_d), 0, torch.device("meta"), size), 16, compiled=True)
        return {phase.name: phase.gradient.convolutions for phase in counts}

    free, frozen = moved(0), moved(1)
    assert frozen["D/main"] < free["D/main"]
    assert frozen["G/main"] == free["G/main"]
