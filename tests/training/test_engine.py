"""The step: what it trains, that it waits for nothing, and that it can be taken up again to the bit."""

import pytest
import torch
from no_host_sync import NoHostSync

from stylepipe.config import LossConfig, NetworkConfig, OptimConfig
from stylepipe.training.engine import is_healthy
from stylepipe.training.phase import Record

PHASES = ["G/main", "G/path_length", "D/main", "D/r1"]


def run(engine, batch, phase_name):
    phase = next(p for p in engine.recipe.phases if p.name == phase_name)
    engine.run_phase(phase, engine.recipe.schedule.at(engine.images_seen), batch.images, batch.labels)


def test_the_watchdog_barks():
    with NoHostSync(), pytest.raises(AssertionError, match="reads a number back"):
        torch.ones(()).item()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("c_dim", [0, 3])
def test_no_phase_waits_for_the_device(make_engine, batch_at, phase, c_dim):
    engine, batch = make_engine(c_dim=c_dim), batch_at(0, c_dim=c_dim)
    with NoHostSync():
        run(engine, batch, phase)


@pytest.mark.parametrize("phase", PHASES)
def test_no_phase_with_a_classifier_and_means_of_classes_waits_for_the_device(make_engine, batch_at, phase):
    network = NetworkConfig(
        z_dim=16,
        w_dim=16,
        channel_base=128,
        channel_max=16,
        mapping_layers=2,
        d_conditioning="both",
        class_w_avg=True,
    )
    loss = LossConfig(r1_gamma=5.0, acgan_weight=1.0)
    engine, batch = make_engine(c_dim=3, cond=True, network=network, loss=loss), batch_at(0, c_dim=3)
    with NoHostSync():
        run(engine, batch, phase)


def test_a_whole_step_waits_for_nothing(make_engine, batch_at):
    engine, batches = make_engine(), [batch_at(0), batch_at(8)]
    with NoHostSync():
        for batch in batches:
            engine.step(batch)
    assert engine.images_seen == 16


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_changes_its_network_and_no_other(make_engine, batch_at, phase):
    engine = make_engine()
    before = {name: arena.params.detach().clone() for name, arena in engine.arenas.items()}
    run(engine, batch_at(0), phase)
    for name, arena in engine.arenas.items():
        assert torch.equal(before[name], arena.params) == (name != phase[0]), name


@pytest.mark.parametrize("phase", ["G/path_length", "D/r1"])
def test_gradients_of_gradients_reach_every_convolution(make_engine, batch_at, phase):
    """In some torch versions they silently vanish; then the regularizers would train nothing."""
    engine = make_engine()
    run(engine, batch_at(0), phase)
    network = engine.recipe.networks[phase[0]]
    for name, p in network.named_parameters():
        if "conv" in name and name.endswith("weight") and "affine" not in name:
            assert p.grad.abs().sum() > 0, name


def test_the_phases_take_their_turns(make_engine, batch_at, monkeypatch):
    engine = make_engine(loss=LossConfig(r1_gamma=1.0, r1_interval=3, pl_interval=2))
    ran = []
    monkeypatch.setattr(engine, "run_phase", lambda phase, *rest: ran.append((engine.images_seen // 8, phase.name)))
    for step in range(4):
        engine.step(batch_at(8 * step))
    assert [s for s, name in ran if name == "D/r1"] == [0, 3]
    assert [s for s, name in ran if name == "G/path_length"] == [0, 2]
    assert [name for s, name in ran if s == 0] == PHASES


def test_adam_is_corrected_for_lazy_phases(make_engine):
    """c = k / (k + 1): lr * c, beta^c (arXiv:1912.04958, appendix B)."""
    engine = make_engine(optim=OptimConfig(g_lr=0.01, d_lr=0.02, beta1=0.5), loss=LossConfig(r1_gamma=1))
    for name, lr, interval in (("G", 0.01, 4), ("D", 0.02, 16)):
        optimizer = engine.optimizers[name]
        c = interval / (interval + 1)
        assert optimizer.learning_rate == pytest.approx(lr * c)
        assert optimizer.betas == pytest.approx((0.5**c, 0.99**c))


def test_without_regularizers_adam_is_as_given(make_engine):
    engine = make_engine(loss=LossConfig(r1_gamma=0, pl_weight=0))
    assert [p.name for p in engine.recipe.phases] == ["G/main", "D/main"]
    assert engine.optimizers["D"].betas == (0.0, 0.99)


@pytest.mark.parametrize(
    ("phase", "parameter"),
    [("D/main", "b4.out.bias"), ("G/main", "synthesis.b4.conv1.bias"), ("G/path_length", "synthesis.b4.conv1.weight")],
)
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(make_engine, batch_at, phase, parameter):
    engine = make_engine()
    engine.step(batch_at(0))
    engine.record.take_sums()
    broken = engine.recipe.networks[phase[0]].get_parameter(parameter)
    before = {name: tensor.clone() for name, tensor in engine.state().items()}
    with torch.no_grad():
        keep = broken.clone()
        broken.fill_(float("nan"))
    run(engine, batch_at(8), phase)
    with torch.no_grad():
        broken.copy_(keep)
    for name, tensor in engine.state().items():
        if name == f"skipped.{phase}":
            assert tensor.tolist() == [1, 1]
        elif name != "G.buffer.mapping.w_avg":  # G/main's latents were healthy, so it may have followed
            assert torch.equal(tensor, before[name]), name
        assert tensor.isfinite().all(), name
    assert not is_healthy(engine.state())
    engine.note_skipped()
    sums = engine.record.take_sums()
    for statistic in ("not_finite", "skipped", "skipped_in_a_row"):
        assert sums[f"Gradient/{phase}/{statistic}"].tolist() == [1.0, 1.0]
    assert sum(name.endswith("/skipped_in_a_row") for name in sums) == len(engine.recipe.phases)

    run(engine, batch_at(8), phase)
    engine.note_skipped()
    sums = engine.record.take_sums()
    assert sums[f"Gradient/{phase}/skipped"].tolist() == [1.0, 1.0]
    assert sums[f"Gradient/{phase}/skipped_in_a_row"].tolist() == [0.0, 1.0]
    assert is_healthy(engine.state())


def test_means_leave_out_what_is_not_finite():
    record = Record(torch.device("cpu"))
    record.stat("a", torch.tensor([1.0, float("nan"), 3.0, float("inf"), -float("inf")]))
    record.stat("b", torch.tensor([float("nan")]))
    record.stat("a", torch.tensor([5.0]))
    assert {name: sums.tolist() for name, sums in record.take_sums().items()} == {"a": [9.0, 3.0], "b": [0.0, 0.0]}


def test_a_state_continues_to_the_bit(make_engine, batch_at):
    straight, first = make_engine(), make_engine()
    for step in range(5):
        straight.step(batch_at(8 * step))
        if step < 2:
            first.step(batch_at(8 * step))
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    second = make_engine()
    second.load_state(saved, images_seen=16)
    for step in range(2, 5):
        second.step(batch_at(8 * step))
    assert second.images_seen == straight.images_seen
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_w_avg_and_path_length_follow(make_engine, batch_at):
    engine = make_engine()
    engine.step(batch_at(0))
    recipe = engine.recipe
    assert recipe.G.mapping.w_avg.abs().sum() > 0
    assert recipe.pl_mean > 0
    assert torch.equal(recipe.G_ema.mapping.w_avg, recipe.G.mapping.w_avg)
