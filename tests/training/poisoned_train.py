"""`stylepipe train` whose discriminator's loss is NaN from some image on, until its penalties weigh enough."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from stylepipe.cli.main import main
from stylepipe.recipes.gan import GANRecipe


@contextmanager
def poison(start: int, cured_by: float) -> Iterator[None]:
    """Within this context: NaN from image `start` on, on the last process alone, while penalties are below a factor."""
    healthy = GANRecipe.d_main

    def d_main(self, batch, record):
        is_last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
        sick = is_last and batch.stage.images_seen >= start and self._penalty_factor < cured_by
        for term in healthy(self, batch, record):
            yield term * float("nan") if sick else term

    GANRecipe.d_main = d_main
    try:
        yield
    finally:
        GANRecipe.d_main = healthy


if __name__ == "__main__":
    with poison(int(os.environ["POISON_START"]), float(os.environ["POISON_CURED_BY"])):
        sys.exit(main(["train", *sys.argv[1:]]))
