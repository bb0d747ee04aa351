"""Growing: the published schedule, what a stage trains and leaves alone, and that it is resumed to the bit."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
from torch import nn

from stylepipe.config import AugmentConfig, Config, EMAConfig, GrowthConfig, LossConfig, NetworkConfig
from stylepipe.datasets.reader import Batch
from stylepipe.kernels import downsample2d, upsample2d
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.build import schedule_of
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training.engine import Engine
from stylepipe.training.growth import GrowthSchedule, Level, end_of

# Karras et al. 2018, arXiv:1710.10196, appendix A and the paper's settings for eight GPUs: 600 kimg stable and 600 kimg
# fading per level. kimg, resolution, alpha in the middle of a fade, batch, factor of the learning rate 0.001.
PUBLISHED = [
    (300, 4, 1.0, 512, 1.0),
    (900, 8, 0.5, 256, 1.0),
    (1500, 8, 1.0, 256, 1.0),
    (2100, 16, 0.5, 128, 1.0),
    (2700, 16, 1.0, 128, 1.0),
    (3300, 32, 0.5, 64, 1.0),
    (3900, 32, 1.0, 64, 1.0),
    (4500, 64, 0.5, 32, 1.0),
    (5100, 64, 1.0, 32, 1.0),
    (5700, 128, 0.5, 32, 1.5),
    (6300, 128, 1.0, 32, 1.5),
    (6900, 256, 0.5, 32, 2.0),
    (7500, 256, 1.0, 32, 2.0),
    (8100, 512, 0.5, 32, 3.0),
    (8700, 512, 1.0, 32, 3.0),
    (9300, 1024, 0.5, 32, 3.0),
    (9900, 1024, 1.0, 32, 3.0),
    (11_999, 1024, 1.0, 32, 3.0),
]
ONE_GPU = {4: 128, 8: 128, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8, 512: 4, 1024: 4}

KINDS = ("progan", "stylegan", "stylegan2")


@pytest.mark.parametrize(("kimg", "res", "alpha", "batch_size", "rate"), PUBLISHED)
def test_the_published_schedule(kimg: int, res: int, alpha: float, batch_size: int, rate: float) -> None:
    config = resolve(Config(res=1024, preset="progan"), 8)
    assert (config.kimg, config.optim.g_lr, config.optim.d_lr) == (12_000, 0.001, 0.001)
    stage = schedule_of(config, 8).at(kimg * 1000)
    assert (stage.resolution, stage.batch_size, stage.lr_multiplier) == (res, batch_size, rate)
    assert stage.alpha == pytest.approx(alpha, abs=0.003)  # levels begin with whole batches, up to 1.3 kimg later
    assert stage.fading == (alpha < 1)
    assert stage.batch_gpu == batch_size // 8  # nothing is accumulated on the hardware it was published for


def test_the_published_batches_of_one_gpu() -> None:
    schedule = schedule_of(resolve(Config(res=1024, preset="progan"), 1), 1)
    assert {stage.resolution: stage.batch_size for stage in schedule.stages()} == ONE_GPU
    assert schedule.final().lr_multiplier == 1.5


def test_stylegan_begins_with_8_px() -> None:
    schedule = schedule_of(resolve(Config(res=1024, preset="stylegan"), 8), 8)
    assert (schedule.at(0).resolution, schedule.at(0).batch_size) == (8, 256)
    assert schedule.at(9_000_000).resolution == 1024


def test_a_batch_that_is_asked_for_replaces_the_table() -> None:
    schedule = schedule_of(resolve(Config(res=64, preset="progan", batch_size=24), 2), 2)
    assert {stage.batch_size for stage in schedule.stages()} == {24}


SMALL = GrowthSchedule((Level(4, 12, 12), Level(8, 8, 4), Level(16, 4, 2, 1.5)), stable=20, fade=30)


def test_steps_belong_to_one_level_and_are_counted() -> None:
    images, seen = 0, []
    for step in range(40):
        stage = SMALL.at(images)
        assert (stage.step, stage.images_seen) == (step, images)
        seen.append((stage.resolution, stage.fading, stage.first_step))
        images += stage.batch_size
    # 20 images are 2 batches of 12; 50 are 7 of 8, of which the first 4 begin within the fade's 30
    assert seen[:2] == [(4, False, 0)] * 2
    assert seen[2:6] == [(8, True, 2)] * 4
    assert seen[6:9] == [(8, False, 2)] * 3
    assert seen[9:17] == [(16, True, 9)] * 8
    assert set(seen[17:]) == {(16, False, 9)}


def test_stages_are_where_the_structure_changes() -> None:
    found = [(stage.images_seen, stage.resolution, stage.fading) for stage in SMALL.stages()]
    assert found == [(0, 4, False), (24, 8, True), (56, 8, False), (80, 16, True), (112, 16, False)]
    for images, res, fading in found[1:]:
        before = SMALL.at(images - 4)  # within the step before
        assert (before.resolution, before.fading) != (res, fading)


@pytest.mark.parametrize("wanted", [1, 24, 25, 56, 57, 80, 81, 100, 112, 113, 500])
@pytest.mark.parametrize("start", [0, 24, 40])
def test_the_end_is_the_first_step_that_reaches_it(start: int, wanted: int) -> None:
    images = start
    while images < wanted:
        images += SMALL.at(images).batch_size
    assert end_of(SMALL, start, wanted) == images


def test_alpha_rises_linearly_and_ends_before_1() -> None:
    alphas = [SMALL.at(images).alpha for images in range(24, 56, 8)]
    assert alphas == pytest.approx([0, 8 / 30, 16 / 30, 24 / 30])
    assert SMALL.at(56).alpha == 1


def settings(kind: str, **changes: object) -> Config:
    """Return resolved settings that grow from 4 to 16 px: 16 images each, fading or stable, 8 at a time."""
    values: dict[str, object] = {
        "res": 16,
        "preset": "auto",
        "batch_size": 8,
        "batch_gpu": 4,
        "network": NetworkConfig(kind=kind, channel_base=128, channel_max=16, z_dim=16),
        "loss": LossConfig(r1_gamma=1.0, r1_interval=2),
        "ema": EMAConfig(kimg=0.1),
        "growth": GrowthConfig(start_res=4, stable_kimg=0.016, fade_kimg=0.016),
        "augment": "ada",
        "aug": AugmentConfig(p=0.5, interval=2, speed_kimg=0.1),
    }
    return with_precision(resolve(Config(**(values | changes)), 1), "fp32")  # type: ignore[arg-type]


def make_engine(config: Config) -> Engine:
    recipe = GANRecipe(config, torch.device("cpu"))
    return Engine(recipe, optim=config.optim, ema=config.ema)


def next_batch(engine: Engine) -> Batch:
    stage, seen = engine.recipe.schedule.at(engine.images_seen), engine.images_seen
    generator = torch.Generator().manual_seed(seen)
    size = stage.resolution
    images = torch.randint(0, 256, (stage.batch_size, size, size, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.zeros(stage.batch_size, 0), torch.arange(stage.batch_size) + seen)


def copy_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.state().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_trains_what_it_uses_and_leaves_the_rest_to_the_bit(kind: str) -> None:
    engine = make_engine(settings(kind))
    seen = set()
    while engine.images_seen < 96:
        stage = engine.recipe.schedule.at(engine.images_seen)
        seen.add((stage.resolution, stage.fading))
        used = engine.recipe.used_at(stage)
        before = {
            name: {key: p.detach().clone() for key, p in network.named_parameters()}
            for name, network in engine.recipe.networks.items()
        }
        average = {key: p.clone() for key, p in engine.recipe.averaged["G"].named_parameters()}
        engine.step(next_batch(engine))
        for name, network in engine.recipe.networks.items():
            parts = {id(p) for module in used[name] for p in module.parameters()}
            for key, p in network.named_parameters():
                if id(p) in parts:
                    assert p.grad is not None
                    # Of the last phase, R1 or path length, to which additive parameters may be nothing. At alpha 0 the
                    # new level changes nothing at all.
                    if stage.alpha > 0 and "bias" not in key and "noise" not in key:
                        assert p.grad.any(), (stage, name, key)
                else:
                    assert torch.equal(p, before[name][key]), (stage, name, key)
                    if name == "G":
                        assert torch.equal(engine.recipe.averaged["G"].get_parameter(key), average[key]), key
    assert seen == {(4, False), (8, True), (8, False), (16, True), (16, False)}


@pytest.mark.parametrize("kind", KINDS)
def test_levels_that_are_not_there_yet_are_never_run(kind: str) -> None:
    engine = make_engine(settings(kind))
    stage = engine.recipe.schedule.at(0)
    used = {id(p) for modules in engine.recipe.used_at(stage).values() for m in modules for p in m.parameters()}
    with torch.no_grad():
        for network in engine.recipe.networks.values():
            for p in network.parameters():
                if id(p) not in used:
                    p.fill_(float("nan"))
    engine.step(next_batch(engine))
    stats = {name: float(total / count) for name, (total, count) in engine.record.take_sums().items()}
    assert all(share == 0 for name, share in stats.items() if name.endswith("not_finite"))


@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_forgotten_where_a_level_begins(kind: str) -> None:
    engine = make_engine(settings(kind))
    steps = []
    for _ in range(12):
        engine.step(next_batch(engine))
        steps.append(int(engine.state()["G.adam_step"]))
    per_step = [b - a for a, b in itertools.pairwise(steps)]
    assert [i + 1 for i, taken in enumerate(per_step) if taken < 0] == [2, 6]  # 16 images; then 32 fading and stable


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [24, *(pytest.param(seen, marks=pytest.mark.slow) for seen in (16, 40, 56))])
def test_resuming_in_a_fade_and_at_its_ends_is_exact(kind: str, seen: int) -> None:
    """At 16 and 48 images a level begins, up to 32 and 64 it fades."""
    straight = make_engine(settings(kind))
    state = None
    while straight.images_seen < 96:
        if straight.images_seen == seen:
            state = copy_of(straight)
        straight.step(next_batch(straight))
    assert state is not None
    resumed = make_engine(settings(kind))
    resumed.load_state(state, seen)
    while resumed.images_seen < 96:
        resumed.step(next_batch(resumed))
    expected = straight.state()
    for name, tensor in resumed.state().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_real_images_fade_in_with_the_generated_ones(kind: str) -> None:
    engine = make_engine(settings(kind, augment="none", aug=AugmentConfig()))
    recipe = engine.recipe
    stage = recipe.schedule.at(24)
    assert (stage.resolution, stage.alpha) == (8, 0.5)
    recipe.begin(stage)
    batch = next_batch_at(engine, 24)
    micro_batch = engine._micro_batch(recipe.phases[-1], stage, batch.images, batch.labels, 0, 2)
    found = recipe._real(micro_batch)
    if kind == "stylegan2":  # by its own filters, as its generator's images fade
        taps = recipe.D.resample_filter
        below = upsample2d(downsample2d(micro_batch.img, taps), taps)
    else:
        blocks = micro_batch.img.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
        below = blocks.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(found, (below + micro_batch.img) / 2)


def next_batch_at(engine: Engine, images_seen: int) -> Batch:
    engine.images_seen = images_seen
    return next_batch(engine)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seen", [0, 24, 40, 56, 80])
def test_files_hold_what_has_grown_so_far(kind: str, seen: int) -> None:
    """What is saved of a stage makes the images that the training would show."""
    engine = make_engine(settings(kind))
    recipe, stage = engine.recipe, engine.recipe.schedule.at(seen)
    recipe.begin(stage)
    network, beside = recipe.export(stage)
    z = torch.randn(2, 16)
    expected = recipe.source.sample(recipe.G_ema, z, torch.zeros(2, 0), stage)
    assert expected.shape == (2, 3, stage.resolution, stage.resolution)
    torch.testing.assert_close(rebuilt(network)(z), expected)
    assert rebuilt(beside["D"])(expected, torch.zeros(2, 0)).shape == (2, 1)


def rebuilt(network: nn.Module) -> nn.Module:
    """Make of a network's settings and tensors another, as reading a file does."""
    other = type(network)(**cast(Any, network).config)
    other.load_state_dict(network.state_dict())
    return other.eval()
