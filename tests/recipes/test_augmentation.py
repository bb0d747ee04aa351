"""The discriminator's view within the training: who is augmented, with which draws, and how p moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stylepipe.config import AugmentConfig, Config, NetworkConfig
from stylepipe.errors import UserError
from stylepipe.networks.head import Judgement
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.augmentation import Augmentation
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training.draws import Draws
from stylepipe.training.growth import Stage
from stylepipe.training.phase import MicroBatch, Record

CPU = torch.device("cpu")
TINY = Config(
    res=16,
    batch_size=8,
    batch_gpu=8,
    network=NetworkConfig(z_dim=16, w_dim=16, channel_base=128, channel_max=16, mapping_layers=2),
)
STRONG = AugmentConfig(pipe="bgcfnc", p=1.0)


def resolved(**changes: object) -> Config:
    return with_precision(resolve(dataclasses.replace(TINY, **changes), 1), "fp32")


def micro_batch(positions: list[int], img: torch.Tensor | None = None, images_seen: int = 0) -> MicroBatch:
    return MicroBatch(positions, Stage(16, 1.0, 8, 1.0, 0, images_seen, 8), img, torch.zeros(len(positions), 0))


@pytest.fixture
def img() -> torch.Tensor:
    return torch.rand(8, 3, 16, 16).mul_(2).sub_(1).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("mode", "p"), [("none", None), ("ada", 0.0), ("fixed", 0.2), ("schedule", 0.3), ("diff", 1.0)]
)
def test_what_is_left_open_is_filled_from_the_papers(mode: str, p: float | None) -> None:
    assert resolved(augment=mode).aug.p == p
    if p is not None:
        assert resolved(augment=mode, aug=AugmentConfig(p=0.7)).aug.p == 0.7


def test_without_augmentation_the_discriminator_sees_the_image_itself(img: torch.Tensor) -> None:
    augment = Augmentation(resolved(augment="none"), Draws(0, CPU), CPU)
    assert augment(img, "any", micro_batch(list(range(8)), img)) is img
    assert augment.state == {}
    assert augment.p is None


@pytest.mark.parametrize(
    ("mode", "aug"),
    [
        ("ada", STRONG),
        ("fixed", STRONG),
        ("schedule", dataclasses.replace(STRONG, schedule_kimg=1.0)),
        ("diff", AugmentConfig()),
    ],
)
def test_an_images_augmentation_follows_from_its_position_and_use(
    mode: str, aug: AugmentConfig, img: torch.Tensor
) -> None:
    config = resolved(augment=mode, aug=aug)
    augment = Augmentation(config, Draws(0, CPU), CPU)
    whole = augment(img, "D/main/real", micro_batch(list(range(8)), images_seen=1000))
    part = augment(img[[5, 2]], "D/main/real", micro_batch([5, 2], images_seen=1000))
    torch.testing.assert_close(part, whole[[5, 2]], atol=1e-5, rtol=0)
    assert (whole - img).abs().mean() > 0.01
    for other in (
        augment(img, "D/main/fake", micro_batch(list(range(8)), images_seen=1000)),
        augment(img, "D/main/real", micro_batch(list(range(8, 16)), images_seen=1000)),
        Augmentation(config, Draws(1, CPU), CPU)(img, "D/main/real", micro_batch(list(range(8)), images_seen=1000)),
    ):
        assert (whole - other).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_a_schedule_follows_the_clock() -> None:
    config = resolved(augment="schedule", aug=AugmentConfig(p=0.5, schedule_kimg=2.0))
    augment = Augmentation(config, Draws(0, CPU), CPU)
    seen = []
    for images_seen in (0, 1000, 2000, 5000, 1000):
        augment.begin(micro_batch([], images_seen=images_seen).stage)
        seen.append(float(augment.p))
    assert seen == pytest.approx([0, 0.25, 0.5, 0.5, 0.25])
    assert augment.state == {}  # nothing but the clock


def test_the_schedule_is_the_length_of_the_training_unless_said() -> None:
    config = resolved(augment="schedule", kimg=2.0, aug=AugmentConfig(p=0.5))
    assert config.aug.schedule_kimg is None  # so that a longer --kimg stretches it
    augment = Augmentation(config, Draws(0, CPU), CPU)
    augment.begin(micro_batch([], images_seen=1000).stage)
    assert float(augment.p) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("mode", "aug", "message"),
    [
        ("none", AugmentConfig(p=0.5), "--aug.p 0.5: --augment none makes no use of it.* ada, fixed, schedule, diff"),
        ("none", AugmentConfig(rotate90=0.5), "--aug.rotate90 0.5: --augment none"),
        (
            "diff",
            AugmentConfig(pipe="color"),
            "--aug.pipe color: --augment diff .*choose --augment ada, fixed, schedule$",
        ),
        ("fixed", AugmentConfig(target=0.5), "--aug.target 0.5: --augment fixed .*choose --augment ada$"),
        ("ada", AugmentConfig(schedule_kimg=4), "--aug.schedule-kimg 4: --augment ada .*choose --augment schedule$"),
        (None, AugmentConfig(p=0.5), "--aug.p 0.5: --augment none"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(mode: str | None, aug: AugmentConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(preset="paper256", augment=mode, aug=aug)


@pytest.mark.parametrize("mode", ["none", "ada", "fixed", "schedule", "diff"])
def test_a_resolved_config_is_accepted_again(mode: str) -> None:
    config = resolved(preset="transfer", augment=mode)
    assert resolve(config, 1) == config


def test_strengths_that_leave_nothing_are_refused() -> None:
    config = resolved(augment="fixed", aug=AugmentConfig(pipe="noise", noise=0.0))
    with pytest.raises(UserError, match=r"--aug.pipe noise: every strength is 0"):
        Augmentation(config, Draws(0, CPU), CPU)


@pytest.mark.parametrize(("target", "end"), [(-0.99, 0.004), (0.99, 0.0)])
def test_ada_follows_the_discriminators_certainty(target: float, end: float, img: torch.Tensor) -> None:
    config = resolved(augment="ada", aug=AugmentConfig(target=target, interval=2, speed_kimg=4.0))
    augment = Augmentation(config, Draws(0, CPU), CPU)
    record = Record(CPU)
    for _ in range(2):
        augment.record(torch.tensor([[1.0], [-1.0]]), record)
        augment.follow(record.take_averages(1), Stage(16, 1.0, 8, 1.0, 0, 0, 8))
    assert float(augment.p) == pytest.approx(end)


@pytest.mark.parametrize("phase", ["G/main", "D/main", "D/r1"])
def test_every_image_that_reaches_the_discriminator_is_augmented(phase: str, img: torch.Tensor) -> None:
    recipe = GANRecipe(resolved(augment="fixed", aug=STRONG), CPU)
    made: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    recipe.augment._pipelines[16].register_forward_hook(lambda module, inputs, image: made.append(image))
    recipe.D.b16.fromrgb.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    (one,) = [each for each in recipe.phases if each.name == phase]
    terms = list(one.loss(micro_batch(list(range(8)), img if one.uses_reals else None), Record(CPU)))
    assert len(seen) == len(made) == len(terms)
    for judged, augmented in zip(seen, made, strict=True):
        assert torch.equal(judged, augmented)


@pytest.mark.parametrize(("mode", "aug"), [("ada", STRONG), ("diff", AugmentConfig())])
def test_gradients_pass_through_to_the_generator(mode: str, aug: AugmentConfig) -> None:
    recipe = GANRecipe(resolved(augment=mode, aug=aug), CPU)
    for term in recipe.g_main(micro_batch(list(range(8))), Record(CPU)):
        term.backward()
    for name, p in recipe.G.named_parameters():
        if "conv" in name and name.endswith(".weight") and "affine" not in name:
            assert p.grad.abs().sum() > 0, name


def test_r1_is_that_of_the_image_before_it_is_augmented(img: torch.Tensor) -> None:
    """|dD(T(x))/dx|^2 along one direction, by finite differences in float64."""
    recipe = GANRecipe(resolved(augment="fixed", aug=AugmentConfig(pipe="bgc", p=1.0)), CPU)
    weight = torch.randn(3, 16, 16, dtype=torch.float64)

    def logits(image: torch.Tensor) -> torch.Tensor:
        return (image.double() * weight).sum(dim=(1, 2, 3)).unsqueeze(1)

    recipe.D.judge = lambda image, c, alpha: Judgement(logits(image), image)  # type: ignore
    batch = micro_batch(list(range(8)), img)
    record = Record(CPU)
    list(recipe.d_penalty(batch, record))
    total, count = record.take_sums()["Loss/D/r1"].tolist()
    squares = torch.zeros(8, dtype=torch.float64)
    base = logits(recipe.augment(img.detach(), "D/r1", batch))
    for index in range(3 * 16 * 16):
        step = torch.zeros(3 * 16 * 16)
        step[index] = 1.0  # the way to D is linear in the image here, but for what float32 rounds
        moved = recipe.augment(img.detach() + step.view(3, 16, 16), "D/r1", batch)
        squares += (logits(moved) - base).flatten().square()
    assert total / count == pytest.approx(float(squares.mean()), rel=1e-3)


def test_a_state_from_before_augmentation_goes_on(img: torch.Tensor) -> None:
    from stylepipe.training.engine import Engine

    def engine(mode: str) -> Engine:
        config = resolved(augment=mode, aug=AugmentConfig(p=0.25) if mode == "ada" else AugmentConfig())
        return Engine(GANRecipe(config, CPU), optim=config.optim, ema=config.ema)

    old, new = engine("none"), engine("ada")
    new.load_state({name: tensor.clone() for name, tensor in old.state().items()}, images_seen=64)
    assert new.images_seen == 64
    assert float(new.recipe.state["augment.p"]) == 0.25
