"""A short training on two classes of drawn faces, before dark and before light backdrops: each class gets its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stylepipe.config import Config, EMAConfig, LossConfig, NetworkConfig
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.order import GlobalOrder
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.reader import Reader
from stylepipe.datasets.shards import ShardDataset, open_dataset
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training.engine import Engine

pytestmark = pytest.mark.slow

DRAWN, PER_CLASS = 240, 90
BACKDROP_ROWS = 3  # of 16, above the hair


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """Give 16 px faces labelled by the folders `dark` and `light`; those of middling backdrops are left out."""
    folder = tmp_path_factory.mktemp("classes")
    drawn = [draw_face(index, 16) for index in range(DRAWN)]
    order = np.argsort([np.asarray(face)[:BACKDROP_ROWS].mean() for face in drawn])
    for name, members in (("dark", order[:PER_CLASS]), ("light", order[-PER_CLASS:])):
        (folder / "in" / name).mkdir(parents=True)
        for index in members:
            drawn[index].save(folder / "in" / name / f"{index:03d}.png")
    prepare(folder / "in", folder / "out", Preparation(16, labels=True), workers=1, progress=False)
    return open_dataset(folder / "out")


@pytest.mark.parametrize("conditioning", ["projection", "aux"])
def test_generated_classes_have_the_backdrops_of_theirs(faces: ShardDataset, conditioning: str) -> None:
    config = Config(
        res=16,
        batch_size=32,
        batch_gpu=32,
        cond=True,
        augment="none",
        network=NetworkConfig(
            z_dim=16, w_dim=16, channel_base=256, channel_max=16, mapping_layers=2, d_conditioning=conditioning
        ),
        loss=LossConfig(r1_gamma=0.1, pl_weight=0, acgan_weight=1.0 if conditioning == "aux" else 0.0),
        ema=EMAConfig(kimg=0.3, rampup=0.05),
    )
    config = with_precision(resolve(config, 1), "fp32")
    recipe = GANRecipe(config, torch.device("cpu"), 2, lambda ids: torch.from_numpy(faces.labels(ids)), len(faces))
    engine = Engine(recipe, optim=config.optim, ema=config.ema)
    for batch in Reader(faces, GlobalOrder(len(faces), 0), batch_size=32, mirror=True):
        engine.step(batch)
        if engine.images_seen >= 2000:
            break

    dark, light = (faces.read(faces.of_class(number))[:, :BACKDROP_ROWS].mean() for number in (0, 1))
    rows = recipe.sample(32, 2, recipe.schedule.final()).view(2, 32, 16, 16, 3)[:, :, :BACKDROP_ROWS]
    drawn_dark, drawn_light = rows.float().mean(dim=(1, 2, 3, 4)).tolist()
    # The latents of both rows are the same: a generator that ignores the class has no difference at all.
    assert drawn_light - drawn_dark > 0.4 * (light - dark) > 15
