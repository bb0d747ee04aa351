"""Any network with any loss, regularizer and remedy: each trains and reports, and contradictions are refused."""

from __future__ import annotations

import pytest
import torch
from no_host_sync import NoHostSync

from stylepipe.config import AnnealConfig, Config, EMAConfig, GrowthConfig, LossConfig, NetworkConfig, OptimConfig
from stylepipe.datasets.reader import Batch
from stylepipe.errors import UserError
from stylepipe.losses.adversarial import OBJECTIVES
from stylepipe.networks.spectral import spectral_norms
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training.engine import Engine

KINDS = ("stylegan2", "stylegan", "progan", "r3gan", "dcgan")
CPU = torch.device("cpu")


def resolved(kind: str, world_size: int = 1, **changes: object) -> Config:
    network = {"kind": kind, "channel_base": 128, "channel_max": 16, "z_dim": 16} | changes.pop("network", {})
    loss = LossConfig(**changes.pop("loss", {}))
    values = {"res": 16, "batch_size": 8, "batch_gpu": 4, "augment": "none", "ema": EMAConfig(kimg=0.1)} | changes
    config = Config(preset=values.pop("preset", "auto"), network=NetworkConfig(**network), loss=loss, **values)
    return with_precision(resolve(config, world_size), "fp32")


def make_engine(config: Config, c_dim: int = 0) -> Engine:
    recipe = GANRecipe(config, CPU, c_dim, lambda rows: torch.eye(max(c_dim, 1))[rows], c_dim or 1)
    return Engine(recipe, optim=config.optim, ema=config.ema)


def batch_at(position: int, c_dim: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(position)
    images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=generator)
    positions = torch.arange(position, position + 8)
    return Batch(images, torch.eye(max(c_dim, 1))[positions % max(c_dim, 1), :c_dim], positions)


def statistics(engine: Engine) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in engine.record.take_sums().items()}


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: arena.params.detach().clone() for name, arena in engine.arenas.items()}


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_network_trains_with_any_loss(kind: str, loss: str) -> None:
    engine = make_engine(resolved(kind, loss={"kind": loss, "n_critic": 1}, augment="ada"))
    before = weights(engine)
    engine.step(batch_at(0))
    with NoHostSync():
        engine.step(batch_at(8))
    for name, params in weights(engine).items():
        assert params.isfinite().all()
        assert not torch.equal(params, before[name]), name
    stats = statistics(engine)
    assert all(share == 0 for name, share in stats.items() if name.endswith("not_finite"))
    assert {"Loss/G/adversarial", "Loss/D/adversarial", "Progress/augment_p", "Logits/real_sign"} <= stats.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("network", "loss", "statistic"),
    [
        ({"mbstd_channels": 1}, {}, "Loss/D/r1"),
        ({"mbdisc_kernels": 5}, {}, "Loss/D/r1"),
        ({"d_last_layer": "normalized"}, {"kind": "hinge"}, "Loss/D/r1"),
        ({"d_last_layer": "normalized"}, {"kind": "relativistic"}, "Loss/D/r2"),
        ({}, {"feature_matching": 1.0}, "Loss/G/feature_matching"),
        ({}, {"historical_weight": 0.1}, "Loss/D/r1"),
        ({}, {"real_label": 0.9}, "Loss/D/r1"),
        ({}, {"r1_gamma": 1.0, "r2_gamma": 1.0, "r1_interval": 1}, "Loss/D/r2"),
        ({}, {"gp_weight": 1.0, "gp_one_sided": True}, "Loss/D/gp"),
        ({}, {"kind": "wgan-gp", "gp_target": 5.0}, "Loss/D/gp"),
        ({}, {"drift": 0.1}, "Loss/D/r1"),
    ],
)
def test_remedies_and_regularizers_go_with_any_network(
    kind: str, network: dict[str, object], loss: dict[str, object], statistic: str
) -> None:
    loss = {"r1_gamma": 1.0} | loss if "kind" not in loss else loss
    engine = make_engine(resolved(kind, network=network, loss={"n_critic": 1} | loss))
    before = weights(engine)
    engine.step(batch_at(0))
    engine.step(batch_at(8))
    stats = statistics(engine)
    assert statistic in stats
    assert all(share == 0 for name, share in stats.items() if name.endswith("not_finite"))
    for name, params in weights(engine).items():
        assert not torch.equal(params, before[name])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "r3gan"])
def test_spectral_normalization_follows_the_steps(kind: str) -> None:
    optim = OptimConfig(d_lr=2e-4)  # one iteration per step follows small steps
    engine = make_engine(resolved(kind, network={"spectral_norm": True}, loss={"kind": "hinge"}, optim=optim))
    norms = spectral_norms(engine.recipe.D)
    before = [norm.u.clone() for norm in norms]
    for step in range(3):
        engine.step(batch_at(8 * step))
    assert any(not torch.equal(norm.u, u) for norm, u in zip(norms, before, strict=True))
    for module in engine.recipe.D.modules():
        if hasattr(module, "parametrizations"):
            gain = getattr(module, "_weight_gain", 1.0)
            norm = torch.linalg.matrix_norm(module.weight.detach().flatten(1) * gain, ord=2)
            assert 0.9 < norm < 1.2


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_clipped_where_they_act(kind: str) -> None:
    engine = make_engine(resolved(kind, loss={"kind": "wgan", "weight_clip": 0.01}))
    engine.step(batch_at(0))
    used = engine.recipe.used_at(engine.recipe.schedule.final())["D"]
    for module in (module for part in used for module in part.modules()):
        weight_gain, bias_gain = module.gains() if hasattr(module, "gains") else (1.0, 1.0)
        for name, p in module.named_parameters(recurse=False):
            assert (p * (bias_gain if name == "bias" else weight_gain)).abs().max() <= 0.01 * 1.0001


@pytest.mark.parametrize("bounds", [{"loss": {"kind": "wgan"}}, {"network": {"spectral_norm": True}}])
def test_levels_that_a_stage_does_not_use_are_not_bounded(bounds: dict[str, dict[str, object]]) -> None:
    growth = GrowthConfig(start_res=8, stable_kimg=1.0, fade_kimg=1.0)
    engine = make_engine(resolved("progan", growth=growth, **bounds))
    before = {name: tensor.clone() for name, tensor in engine.recipe.D.state_dict().items()}
    batch = batch_at(0)
    engine.step(Batch(batch.images[:, ::2, ::2], batch.labels, batch.positions))
    changed = {name for name, tensor in engine.recipe.D.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not [name for name in changed if name.startswith("b16")]
    assert [name for name in changed if name.startswith("b8")]


def test_the_generator_waits_for_its_critic() -> None:
    engine = make_engine(resolved("progan", loss={"kind": "wgan", "n_critic": 3}))
    moved = []
    for step in range(7):
        before = engine.arenas["G"].params.detach().clone()
        engine.step(batch_at(8 * step))
        moved.append(not torch.equal(engine.arenas["G"].params, before))
    assert moved == [True, False, False, True, False, False, True]
    assert engine.optimizers["G"].learning_rate == engine.recipe.config.optim.g_lr  # n_critic is no lazy phase


def test_penalties_in_every_step_are_those_of_a_phase_of_their_own() -> None:
    """The gradient of D/main with R1 and R2 in it is the sum of that without and of theirs."""

    def gradients(interval: int | None, gamma: float) -> dict[str, torch.Tensor]:
        loss = {"kind": "relativistic", "r1_gamma": gamma, "r2_gamma": gamma, "r1_interval": interval}
        engine = make_engine(resolved("r3gan", loss=loss))
        found = {}
        batch = batch_at(0)
        for phase in engine.recipe.phases:
            if phase.trains == "D":
                engine.optimizers["D"].step = lambda *_: None  # type: ignore[method-assign]
                engine.run_phase(phase, engine.recipe.schedule.at(0), batch.images, batch.labels)
                found[phase.name] = engine.arenas["D"].grad.clone() / phase.weight
        return found

    without, apart, together = gradients(None, 0.0), gradients(2, 1.0), gradients(1, 1.0)
    assert apart.keys() == {"D/main", "D/r1_r2"}
    assert together.keys() == {"D/main"}
    torch.testing.assert_close(apart["D/main"], without["D/main"])
    # R2's images are drawn for another purpose there: alike in size, not in every number.
    penalty = together["D/main"] - without["D/main"]
    assert torch.linalg.vector_norm(penalty) == pytest.approx(float(apart["D/r1_r2"].norm()), rel=0.5)


def test_settings_follow_half_a_cosine() -> None:
    anneal = AnnealConfig(kimg=1.0, lr=0.25, gamma=0.1, beta2=0.99, ema=0.0)
    loss = {"kind": "relativistic", "r1_gamma": 150.0, "r1_interval": 1}
    config = resolved("r3gan", loss=loss, anneal=anneal, ema=EMAConfig(kimg=500.0))
    recipe = GANRecipe(config, CPU)
    start = config.optim.beta2
    for images, share in ((0, 0.0), (504, 0.5063), (1000, 1.0), (5000, 1.0)):
        stage = recipe.schedule.at(images)
        recipe.begin(stage)
        found = recipe.anneal(stage)
        assert found.lr == pytest.approx(1 - 0.75 * share, abs=1e-3)
        assert found.beta2 == pytest.approx(start + (0.99 - start) * share, abs=1e-3)
        assert found.ema_kimg == pytest.approx(500 * share, abs=0.5)
        assert float(recipe.gamma_share) == pytest.approx(1 - 0.9 * share, abs=1e-3)


def test_the_published_cosines_of_r3gan() -> None:
    """lr 2e-4 to 5e-5, gamma 150 to 15, beta2 0.9 to 0.99, EMA 0 to 500 kimg, p 0 to 0.3, over 20M images."""
    config = resolve(Config(res=256, preset="r3gan"), 8)
    end = config.anneal
    assert (end.kimg, config.optim.g_lr, config.optim.g_lr * end.lr) == (20_000, 2e-4, pytest.approx(5e-5))
    assert (config.loss.r1_gamma, config.loss.r2_gamma, config.loss.r1_gamma * end.gamma) == (150, 150, 15)
    assert (config.optim.beta2, end.beta2, config.ema.kimg * end.ema, config.ema.kimg) == (0.9, 0.99, 0, 500)
    assert (config.augment, config.aug.p, config.aug.schedule_kimg) == ("schedule", 0.3, 20_000)
    assert (config.batch_size, config.batch_gpu, config.network.z_dim) == (256, 32, 64)


@pytest.mark.parametrize("kind", ["progan", "dcgan"])
def test_labels_go_with_plain_networks(kind: str) -> None:
    engine = make_engine(resolved(kind, cond=True), c_dim=3)
    engine.step(batch_at(0, 3))
    images = engine.recipe.sample(2, 3, engine.recipe.schedule.at(0))
    assert images.shape == (6, 16, 16, 3)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "dcgan",
            {"network": {"w_dim": 5}},
            "--network.w-dim 5: networks of kind dcgan make no use .* stylegan2, styl",
        ),
        ("progan", {"loss": {"pl_weight": 1.0}}, "--loss.pl-weight 1: networks of kind progan have no styles"),
        ("r3gan", {"growth": GrowthConfig(start_res=8)}, "--growth.start-res 8: networks of kind r3gan do not grow"),
        ("dcgan", {"network": {"norm": "batch"}, "loss": {"kind": "wgan-gp"}}, "--network.norm batch: .*gp-weight 10"),
        ("progan", {"loss": {"kind": "wgan", "weight_clip": 0.0}}, "--loss wgan: nothing bounds the critic"),
        ("progan", {"loss": {"kind": "wgan-gp", "gp_weight": 0.0}}, "--loss wgan-gp: nothing bounds the critic"),
        ("progan", {"loss": {"margin": 5.0}}, "--loss.margin 5: --loss non-saturating has none"),
        ("r3gan", {"network": {"spectral_norm": True}}, "--network.spectral-norm: r3gan's residual branches"),
        (
            "progan",
            {"network": {"spectral_norm": True}, "loss": {"kind": "wgan"}},
            "--network.spectral-norm and --loss.weight-clip 0.01",
        ),
        (
            "stylegan2",
            {"network": {"g_architecture": "resnet"}, "growth": GrowthConfig(start_res=8)},
            "--network.g-architecture resnet: only its last level makes an image",
        ),
        ("progan", {"growth": GrowthConfig(stable_kimg=5.0)}, "--growth.stable-kimg 5.0: nothing grows"),
        ("progan", {"anneal": AnnealConfig(lr=0.5)}, "--anneal.lr 0.5: .*--anneal.kimg"),
        ("progan", {"growth": GrowthConfig(start_res=4, batch_sizes="4=3")}, "--growth.batch-sizes 4=3: '4=3' found"),
        (
            "progan",
            {"growth": GrowthConfig(start_res=4, batch_sizes="4:8,4:9")},
            "4 px twice; expected each level once",
        ),
        ("progan", {"loss": {"gp_target": 2.0}}, "--loss.gp-target 2: there is no gradient penalty"),
        ("stylegan2", {"loss": {"pl_decay": 0.5, "pl_weight": 0.0}}, "--loss.pl-decay 0.5: path length is not regul"),
        ("progan", {"loss": {"r1_interval": 4, "r1_gamma": 0.0}}, "--loss.r1-interval 4: there is neither R1 nor R2"),
        (
            "progan",
            {"anneal": AnnealConfig(kimg=1.0, gamma=0.1), "loss": {"kind": "wgan-gp"}},
            "--anneal.gamma 0.1: there is neither R1 nor R2; leave it out, or add --loss.r1-gamma",
        ),
        (
            "r3gan",
            {"network": {"mbstd_group_size": 8}},
            "--network.mbstd-group-size 8: minibatch stddev is off; leave it out, or add --network.mbstd-channels 1",
        ),
        ("progan", {"ema": EMAConfig(kimg=1.0, decay=0.9)}, "--ema.kimg 1 and --ema.decay 0.9: give one of them"),
        (
            "dcgan",
            {"network": {"norm": "batch", "spectral_norm": True}},
            "--network.norm batch and --network.spectral-",
        ),
        ("progan", {"freeze_d": 1}, "--freeze-d 1: expected networks of kind stylegan2, found progan"),
        (
            "progan",
            {"loss": {"historical_weight": 0.1}, "growth": GrowthConfig(start_res=4)},
            "--loss.historical-weight 0.1: holds levels that grow to their random first weights",
        ),
    ],
)
def test_what_contradicts_is_refused(kind: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(kind, **changes)


def test_batches_of_levels_are_checked_against_the_processes() -> None:
    growth = GrowthConfig(start_res=4, batch_sizes="4:8,16:10")
    with pytest.raises(UserError, match=r"--growth.batch-sizes 4:8,16:10: 10 at 16 px; expected a multiple of the 4 "):
        resolved("progan", world_size=4, growth=growth)


@pytest.mark.parametrize("kind", ["dcgan", "r3gan"])
def test_a_growing_preset_with_networks_that_do_not_grow_trains_them_at_once(kind: str) -> None:
    config = resolve(Config(res=16, preset="progan", network=NetworkConfig(kind=kind, channel_base=128)), 1)
    assert config.growth == GrowthConfig(start_res=16)


def test_path_length_counts_the_updates_of_the_generator() -> None:
    engine = make_engine(resolved("stylegan2", loss={"kind": "wgan", "n_critic": 5, "pl_weight": 2.0}))
    (phase,) = [phase for phase in engine.recipe.phases if phase.name == "G/path_length"]
    assert (phase.interval, phase.weight) == (20, 4)
    assert engine.optimizers["G"].learning_rate == pytest.approx(engine.recipe.config.optim.g_lr * 4 / 5)


def test_frozen_layers_are_not_clipped() -> None:
    engine = make_engine(resolved("stylegan2", loss={"kind": "wgan"}, freeze_d=1))
    before = {name: p.clone() for name, p in engine.recipe.D.b16.named_parameters()}
    engine.step(batch_at(0))
    for name, p in engine.recipe.D.b16.named_parameters():
        assert torch.equal(p, before[name]), name


def test_annealed_beta2_is_corrected_for_lazy_phases() -> None:
    anneal = AnnealConfig(kimg=1.0, beta2=0.5)
    engine = make_engine(resolved("stylegan2", loss={"r1_gamma": 1.0}, anneal=anneal))
    engine.step(batch_at(0))
    assert engine.optimizers["D"]._adam.param_groups[0]["betas"][1] == pytest.approx(0.99 ** (16 / 17))


def test_one_sided_label_smoothing_is_refused_where_there_are_no_labels() -> None:
    config = resolved("progan", loss={"kind": "wgan-gp", "real_label": 0.9})
    with pytest.raises(UserError, match=r"--loss.real-label 0.9"):
        GANRecipe(config, CPU)


@pytest.mark.parametrize("preset", ["progan", "stylegan", "r3gan", "dcgan"])
@pytest.mark.parametrize("res", [16, 64])
def test_every_preset_works_from_16_px_up(preset: str, res: int) -> None:
    config = resolve(Config(res=res, preset=preset, network=NetworkConfig(channel_base=256, channel_max=16)), 1)
    recipe = GANRecipe(with_precision(config, "fp32"), CPU)
    stage = recipe.schedule.final()
    recipe.begin(stage)
    assert recipe.sample(2, 1, stage).shape == (2, res, res, 3)
