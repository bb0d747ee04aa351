"""Fine-tuning from a network file with `--init`: the settings of auto, made for a short training on few images.

Paper:     Karras et al. 2020, "Training GANs with Limited Data", arXiv:2006.06676 (adaptive augmentation, at 100 kimg
           per unit of p when fine-tuning); the length and the shorter moving average are our own choice
Command:   accelerate launch launch/train.py --init NETWORK --data PHOTOGRAPHS --mirror
Hardware:  as auto
Expected:  the new kind of image within tens of kimg; no score is published
"""

from __future__ import annotations

from dataclasses import replace

from stylepipe.config import AugmentConfig, Config, EMAConfig, OptimConfig, filled
from stylepipe.presets import auto


def preset(res: int, world_size: int, batch_size: int | None) -> Config:
    """Return the settings; see `stylepipe.presets`."""
    config = auto.preset(res, world_size, batch_size)
    return replace(
        config,
        kimg=1000,
        augment="ada",
        aug=AugmentConfig(speed_kimg=100.0),
        optim=OptimConfig(g_lr=0.002, d_lr=0.002),
        # A quarter of auto's half-life; without ramp-up, which is there to forget random first weights.
        ema=EMAConfig(kimg=filled(config.batch_size) * 2.5 / 32, rampup=0.0),
    )
