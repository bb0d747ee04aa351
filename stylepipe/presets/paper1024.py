"""StyleGAN2 as the ADA paper trains it at 1024 pixels: configuration F with a weaker R1.

Paper:     Karras et al. 2020, "Training GANs with Limited Data", arXiv:2006.06676
Command:   accelerate launch launch/train.py --res 1024 --preset paper1024 --data PHOTOGRAPHS --mirror
Hardware:  8 GPUs, 4 images each; any other number reaches batch 32 by accumulation
Expected:  as configuration F at 1024 pixels (no separate figure is published for FFHQ)
"""

from __future__ import annotations

from dataclasses import replace

from stylepipe.config import Config, LossConfig
from stylepipe.presets import stylegan2


def preset(res: int, world_size: int, batch_size: int | None) -> Config:
    """Return the settings; see `stylepipe.presets`."""
    return replace(stylegan2.preset(res, world_size, batch_size), loss=LossConfig(r1_gamma=2.0))
