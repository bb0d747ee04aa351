"""Training on labels: what is drawn, shown, averaged and classified, and that it goes on to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stylepipe.config import Config, LossConfig, NetworkConfig
from stylepipe.datasets.reader import Batch
from stylepipe.errors import UserError
from stylepipe.losses.adversarial import auxiliary_classification
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.conditioning import Labels, check_labels, follow_class_styles_, note_class_styles
from stylepipe.recipes.gan import GANRecipe
from stylepipe.recipes.sources import W_AVG_DECAY
from stylepipe.training.draws import Draws
from stylepipe.training.engine import Engine
from stylepipe.training.phase import Record

CPU = torch.device("cpu")
TINY = Config(
    res=16,
    batch_size=8,
    batch_gpu=4,
    cond=True,
    augment="none",
    network=NetworkConfig(z_dim=16, w_dim=16, channel_base=128, channel_max=16, mapping_layers=2),
    loss=LossConfig(r1_interval=2, pl_interval=2, r1_gamma=5.0),
)
CLASSES = 3
# Class 0 in half of the data, class 2 in a sixth.
OF_DATA = torch.eye(CLASSES)[[0, 0, 0, 1, 1, 2]]


def make_engine(**options: object) -> Engine:
    """Make an engine on TINY; options of the network or the loss."""
    loss = {key: options.pop(key) for key in ("acgan_weight",) if key in options}
    config = dataclasses.replace(
        TINY, network=dataclasses.replace(TINY.network, **options), loss=dataclasses.replace(TINY.loss, **loss)
    )
    config = with_precision(resolve(config, 1), "fp32")
    recipe = GANRecipe(config, CPU, CLASSES, lambda rows: OF_DATA[rows], len(OF_DATA))
    return Engine(recipe, optim=config.optim, ema=config.ema)


def batch_at(start: int) -> Batch:
    images = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(start))
    positions = torch.arange(start, start + 8)
    return Batch(images, torch.eye(CLASSES)[positions % CLASSES], positions)


# --- labels of generated images ---


def test_generated_images_have_classes_as_often_as_the_data() -> None:
    labels = Labels(Draws(0, CPU), CLASSES, lambda rows: OF_DATA[rows], len(OF_DATA))
    drawn = labels.draw("G/main/c", range(6000)).mean(dim=0)
    # A share's standard deviation is below sqrt(0.25 / 6000) = 0.0065.
    torch.testing.assert_close(drawn, torch.tensor([1 / 2, 1 / 3, 1 / 6]), atol=0.026, rtol=0)


def test_generated_images_have_vectors_of_the_data() -> None:
    vectors = torch.randn(50, 4)
    labels = Labels(Draws(0, CPU), 4, lambda rows: vectors[rows], 50, vectors=True)
    drawn = labels.draw("G/main/c", range(2000))
    which = (drawn[:, None] == vectors).all(dim=2)
    assert (which.sum(dim=1) == 1).all()
    assert which.any(dim=0).all()


# --- grids ---


def grid_labels(c_dim: int, columns: int, rows: int, seed: int = 0) -> tuple[list[int], torch.Tensor]:
    return Labels(Draws(seed, CPU), c_dim, lambda rows: torch.eye(c_dim)[rows], c_dim or 1).grid(columns, rows)


def test_a_grid_has_rows_of_one_class_and_the_same_latents_for_each() -> None:
    latents, c = grid_labels(c_dim=3, columns=4, rows=8)
    assert c.argmax(dim=1).tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert latents == list(range(8)) * 3  # two rows each: the second has latents of its own


def test_of_many_classes_a_grid_shows_a_choice_of_the_seed() -> None:
    latents, c = grid_labels(c_dim=100, columns=2, rows=5)
    classes = c.argmax(dim=1)[::2]
    assert (classes.diff() > 0).all()
    assert torch.equal(classes.repeat_interleave(2), c.argmax(dim=1))
    assert latents == [0, 1] * 5
    assert torch.equal(grid_labels(100, 2, 5)[1], c)
    assert not torch.equal(grid_labels(100, 2, 5, seed=1)[1], c)


def test_without_labels_every_place_of_a_grid_has_its_own_latent() -> None:
    latents, c = grid_labels(c_dim=0, columns=3, rows=2)
    assert latents == list(range(6))
    assert c.shape == (6, 0)


def test_rows_of_vectors_are_drawn_from_the_data() -> None:
    vectors = torch.randn(50, 4)
    labels = Labels(Draws(0, CPU), 4, lambda rows: vectors[rows], 50, vectors=True)
    latents, c = labels.grid(3, 2)
    assert latents == [0, 1, 2] * 2
    assert torch.equal(c[0].expand(3, -1), c[:3])
    assert (c[3] == vectors).all(dim=1).any()
    assert labels.classes_of_rows(2) == []


def test_the_grid_shows_the_class_of_its_row() -> None:
    recipe = make_engine().recipe
    images = recipe.sample(2, 3, recipe.schedule.at(0))
    assert images.shape == (6, 16, 16, 3)
    z = recipe.draws.normal("grid/z", [0, 1], 16)
    expected = recipe.G_ema(z, torch.eye(CLASSES)[[1, 1]])
    difference = images[2:4].permute(0, 3, 1, 2) - (expected * 127.5 + 128).clamp(0, 255)
    assert difference.abs().max() <= 1


# --- mean styles of classes ---


def test_the_mean_style_of_a_class_follows_the_means_of_what_was_drawn_of_it() -> None:
    w, c = torch.randn(12, 5), torch.eye(3)[[0, 0, 2, 0, 2, 2, 0, 0, 0, 0, 2, 0]]
    offsets, w_avg = torch.randn(3, 5), torch.randn(5)
    expected = offsets.clone()
    for number in (0, 2):  # class 1 was not drawn
        expected[number] = offsets[number].lerp(w[c[:, number] == 1].mean(dim=0) - w_avg, 0.25)
    for micro_batches in (1, 2, 6):
        found, record = offsets.clone(), Record(CPU)
        for part_w, part_c in zip(w.chunk(micro_batches), c.chunk(micro_batches), strict=True):
            note_class_styles(record, part_w, part_c)
        follow_class_styles_(found, w_avg, record.take_averages(micro_batches), 0.25)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found[1], offsets[1])


def test_a_style_that_is_not_finite_moves_no_mean() -> None:
    offsets, record = torch.randn(2, 5), Record(CPU)
    before = offsets.clone()
    note_class_styles(record, torch.full((4, 5), torch.nan), torch.eye(2)[[0, 0, 0, 1]])
    follow_class_styles_(offsets, torch.zeros(5), record.take_averages(1), 0.25)
    assert torch.equal(offsets, before)


def test_a_step_follows_the_mean_styles_of_its_classes() -> None:
    engine = make_engine(class_w_avg=True)
    recipe = engine.recipe
    z = recipe.draws.normal("G/main/z", range(8), 32)[:, :16]  # of two latents each, the first layer has the first
    c = recipe.labels.draw("G/main/c", range(8))
    w = recipe.G.mapping(z, c)[:, 0]
    engine.step(batch_at(0))
    mapping = recipe.G.mapping
    torch.testing.assert_close(mapping.w_avg, (1 - W_AVG_DECAY) * w.mean(dim=0))
    for number in range(CLASSES):
        drawn = c[:, number] == 1
        offset = w[drawn].mean(dim=0) - mapping.w_avg if drawn.any() else torch.zeros(16)
        torch.testing.assert_close(mapping.class_w_offset[number], (1 - W_AVG_DECAY) * offset)
    assert recipe.export(recipe.schedule.at(0))[0].mapping.class_w_offset is mapping.class_w_offset


# --- the auxiliary classifier ---


@pytest.mark.parametrize("conditioning", ["aux", "both"])
def test_the_classifier_trains_both_networks_and_is_reported(conditioning: str) -> None:
    engine = make_engine(d_conditioning=conditioning, acgan_weight=0.5)
    engine.step(batch_at(0))
    D = engine.recipe.D
    assert D.b4.aux.weight.abs().sum() > 0
    stats = {name: float(total / count) for name, (total, count) in engine.record.take_sums().items()}
    assert {"Loss/D/aux", "Loss/G/aux", "Accuracy/real"} <= stats.keys()
    assert 0 <= stats["Accuracy/real"] <= 1


def test_the_classifiers_loss_is_added_with_its_weight() -> None:
    """The terms of both networks' losses, worked out beside the recipe."""
    engine = make_engine(d_conditioning="both", acgan_weight=0.5)
    recipe, batch = engine.recipe, batch_at(0)
    micro_batch = engine._micro_batch(recipe.phases[2], recipe.schedule.at(0), batch.images, batch.labels, 0, 2)
    fake_term, real_term = (term.detach() for term in recipe.d_main(micro_batch, Record(CPU)))
    (g_term,) = (term.detach() for term in recipe.g_main(micro_batch, Record(CPU)))

    def expected(img: torch.Tensor, c: torch.Tensor, sign: float) -> torch.Tensor:
        logits, _, classes, _ = recipe.D.judge(img, c)
        entropy = torch.nn.functional.cross_entropy(classes, c.argmax(dim=1))
        return (torch.nn.functional.softplus(sign * logits).mean() + 0.5 * entropy).detach()

    def generated(purpose: str) -> tuple[torch.Tensor, torch.Tensor]:
        latents = recipe.source.draw(purpose, micro_batch.positions, micro_batch.stage)
        return recipe.source.images(purpose, micro_batch.positions, latents, micro_batch.stage), latents.c

    torch.testing.assert_close(real_term, expected(micro_batch.img, micro_batch.c, -1))
    torch.testing.assert_close(fake_term, expected(*generated("D/main"), +1))
    torch.testing.assert_close(g_term, expected(*generated("G/main"), -1))


def test_the_auxiliary_loss_is_the_cross_entropy() -> None:
    logits, classes = torch.randn(7, 4), torch.randint(4, (7,))
    found = auxiliary_classification(logits, torch.eye(4)[classes])
    torch.testing.assert_close(found[:, 0], torch.nn.functional.cross_entropy(logits, classes, reduction="none"))


def test_the_classifier_of_an_unlabelled_or_blank_image_costs_nothing() -> None:
    """Measuring runs on blank labels."""
    assert torch.equal(auxiliary_classification(torch.randn(2, 4), torch.zeros(2, 4)), torch.zeros(2, 1))


# --- going on, and refusing ---


def test_a_conditional_state_continues_to_the_bit() -> None:
    options = {"class_w_avg": True, "d_conditioning": "both", "acgan_weight": 1.0}
    straight, first, second = make_engine(**options), make_engine(**options), make_engine(**options)
    for step in range(4):
        straight.step(batch_at(8 * step))
    for step in range(2):
        first.step(batch_at(8 * step))
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()}, images_seen=16)
    for step in range(2, 4):
        second.step(batch_at(8 * step))
    assert "G.buffer.mapping.class_w_offset" in straight.state()
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_mean_styles_of_classes_can_be_asked_for_when_a_run_goes_on() -> None:
    before, after = make_engine(), make_engine(class_w_avg=True)
    before.step(batch_at(0))
    after.load_state(before.state(), images_seen=8)
    assert torch.equal(after.arenas["G"].params, before.arenas["G"].params)
    mapping = after.recipe.G.mapping
    assert mapping.w_avg.any()
    center = mapping(torch.randn(CLASSES, 16), torch.eye(CLASSES), truncation_psi=0)
    torch.testing.assert_close(center, mapping.w_avg.expand_as(center))
    after.step(batch_at(8))
    assert mapping.class_w_offset.any()


@pytest.mark.parametrize(
    ("cond", "network", "loss", "message"),
    [
        (True, {}, {"acgan_weight": 1.0}, "--loss.acgan-weight 1: the discriminator has no classifier"),
        (True, {"d_conditioning": "aux"}, {}, "--network.d-conditioning aux: nothing trains its classifier"),
        (False, {"d_conditioning": "both"}, {"acgan_weight": 1.0}, "--network.d-conditioning both: .* add --cond"),
        (False, {"class_w_avg": True}, {}, "--network.class-w-avg: .* add --cond"),
        (True, {}, {"acgan_weight": -1.0}, "--loss.acgan-weight -1.0: expected a finite number, 0 or more"),
    ],
)
def test_options_of_labels_that_do_not_go_together(cond: bool, network: dict, loss: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(Config(res=16, cond=cond, network=NetworkConfig(**network), loss=LossConfig(**loss)), 1)


@pytest.mark.parametrize(
    ("network", "loss", "message"),
    [
        ({"class_w_avg": True}, {}, "--network.class-w-avg: expected classes, and the labels of this data are vectors"),
        ({"d_conditioning": "aux"}, {"acgan_weight": 0.5}, "--loss.acgan-weight 0.5: expected classes"),
    ],
)
def test_options_of_classes_are_refused_where_labels_are_vectors(network: dict, loss: dict, message: str) -> None:
    config = Config(res=16, cond=True, network=NetworkConfig(**network), loss=LossConfig(**loss))
    check_labels(config, ("cats", "dogs"))
    check_labels(dataclasses.replace(config, cond=False), None)
    with pytest.raises(UserError, match=message):
        check_labels(config, None)
