"""How diverse the generated images are beside those of the data: measured at intervals, at fixed latents."""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool2d

from stylepipe.datasets.training_data import TrainingData
from stylepipe.metrics.diversity import Diversity, diversity, thumbnails
from stylepipe.training.grids import read_images
from stylepipe.training.growth import Stage
from stylepipe.training.phase import Recipe

SAMPLES = 32


class DiversityWatch:
    """Compares the images of a recipe with the first ones of a data set.

    Args:
        recipe: what is trained.
        dataset: of the run's resolution; read once, when first needed.
        skip_bad: take images that cannot be read for black.
    """

    def __init__(self, recipe: Recipe, dataset: TrainingData, skip_bad: bool = False) -> None:
        self._recipe, self._dataset, self._skip_bad = recipe, dataset, skip_bad
        self._ids = dataset.previewed[:SAMPLES]
        self._real: dict[int, Diversity] = {}

    def measure(self, stage: Stage) -> dict[str, float]:
        """Return `Diversity/pairwise` and `Diversity/nearest` (see `stylepipe.metrics.diversity.Diversity`).

        As shares of the data's at the stage's resolution: 1 is as diverse. Empty where the data has no two different
        images.
        """
        if len(self._ids) < 2:
            return {}
        img = torch.cat([thumbnails(part).cpu() for part in self._recipe.watched(len(self._ids), stage)])
        if (side := img.shape[2]) not in self._real:
            images = read_images(self._dataset, self._ids, self._skip_bad)
            img_of_data = thumbnails(torch.from_numpy(images))
            self._real[side] = diversity(avg_pool2d(img_of_data, img_of_data.shape[2] // side))
        real, fake = self._real[side], diversity(img)
        if real.nearest == 0:
            return {}
        return {
            "Diversity/pairwise": fake.pairwise / real.pairwise,
            "Diversity/nearest": fake.nearest / real.nearest,
        }
