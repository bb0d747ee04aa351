"""Started by test_two_ranks.py, once alone and once as two gloo processes: train and write down what came out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from stylepipe.config import AugmentConfig, Config, GrowthConfig, LossConfig, NetworkConfig
from stylepipe.datasets.reader import Batch
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training import averaging
from stylepipe.training.averaging import Exchange, start_sum
from stylepipe.training.distributed import leave, make_accelerator
from stylepipe.training.engine import Engine

STEPS = 4  # of a growing training: the last of 8 px, two fading, the first wholly at 16 px
BATCH_SIZE, BATCH_GPU = 8, 4
LABELS = torch.eye(3)


def main(out: Path, losses: str, exchange: str) -> None:
    accelerator = make_accelerator()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    torch.set_num_threads(1)
    labelled = losses == "labels"
    config = Config(
        res=16,
        batch_size=BATCH_SIZE,
        batch_gpu=BATCH_GPU,
        cond=labelled,
        freeze_d=1 if losses == "frozen" else 0,
        network=NetworkConfig(
            z_dim=16,
            w_dim=16,
            channel_base=256,
            channel_max=16,
            mapping_layers=2,
            class_w_avg=labelled,
            d_conditioning="both" if labelled else "projection",
        ),
        # Every phase in every step; the lazy correction is then k = 1, and the same for both runs.
        loss=LossConfig(
            r1_gamma=0.0 if losses == "path length" else 5.0,
            r1_interval=None if losses == "path length" else 2,
            pl_weight=0.0 if losses == "r1" else 2.0,
            pl_interval=LossConfig().pl_interval if losses == "r1" else 1,
            acgan_weight=1.0 if labelled else 0.0,
        ),
        growth=GrowthConfig(start_res=8, stable_kimg=0.008, fade_kimg=0.016) if losses == "growing" else GrowthConfig(),
        augment="ada",
        # While growing D is unsure, and p would go up and down again: a low target has it rise.
        aug=AugmentConfig(
            pipe="bgcfnc", p=0.5, interval=2, speed_kimg=0.1, target=-0.9 if losses == "growing" else 0.6
        ),
    )
    config = with_precision(resolve(config, world_size), "fp32")
    torch.manual_seed(rank)  # whatever a rank's own generator holds must not matter
    torch.rand(rank + 1)
    c_dim = len(LABELS) if labelled else 0
    recipe = GANRecipe(config, accelerator.device, c_dim, lambda rows: LABELS[rows], len(LABELS), world_size=world_size)
    if losses == "poisoned":
        recipe.phases = [poisoned(phase, rank) if phase.name == "D/main" else phase for phase in recipe.phases]
    settings, early = None, EarlySums()
    if exchange:  # early or late, and what as
        when, reduce_dtype = exchange.split()
        averaging.BUCKET_BYTES = 4096
        settings = Exchange(reduce_dtype, when == "early", early.start)
    engine = Engine(recipe, optim=config.optim, ema=config.ema, rank=rank, world_size=world_size, exchange=settings)
    result: dict[str, torch.Tensor] = {}
    run_phase = engine.run_phase

    def run_and_note(phase, stage, images, labels):
        run_phase(phase, stage, images, labels)
        result[f"grad/{stage.step}/{phase.name}"] = engine.arenas[phase.trains].grad.clone()
        result[f"early/{stage.step}/{phase.name}"] = torch.tensor(early.take())

    engine.run_phase = run_and_note
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        size = recipe.schedule.at(engine.images_seen).resolution
        images = torch.randint(0, 256, (BATCH_SIZE, size, size, 3), dtype=torch.uint8, generator=generator)
        positions = torch.arange(BATCH_SIZE) + step * BATCH_SIZE
        share = slice(rank, None, world_size)
        labels = LABELS[positions % len(LABELS), :c_dim]
        engine.step(Batch(images[share], labels[share], positions[share]))
    result |= {f"state/{name}": tensor.clone() for name, tensor in engine.state().items()}
    result["world_size"] = torch.tensor(dist.get_world_size() if dist.is_initialized() else 1)
    save_file(result, out / f"rank{rank}.safetensors")
    leave()


def poisoned(phase, rank):
    """Have the loss of one rank be NaN in the step that follows the first."""

    def loss(batch, record):
        for term in phase.loss(batch, record):
            yield term * float("nan") if (rank, batch.stage.step) == (1, 1) else term

    return dataclasses.replace(phase, loss=loss)


class EarlySums:
    """Counts the sums that begin while a backward pass runs."""

    def __init__(self):
        self._early, self._in_backward, backward = 0, False, torch.Tensor.backward

        def noting(*args, **kwargs):
            self._in_backward = True
            backward(*args, **kwargs)
            self._in_backward = False

        torch.Tensor.backward = noting

    def start(self, tensor):
        self._early += self._in_backward
        return start_sum(tensor)

    def take(self):
        early, self._early = self._early, 0
        return early


if __name__ == "__main__":
    main(Path(sys.argv[1]), losses=sys.argv[2], exchange=sys.argv[3])
