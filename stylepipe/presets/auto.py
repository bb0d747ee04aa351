"""StyleGAN2 with settings that follow resolution, batch size and number of devices.

Paper:     Karras et al. 2020, "Training GANs with Limited Data", arXiv:2006.06676
Command:   accelerate launch launch/train.py --res 256 --data PHOTOGRAPHS
Hardware:  any; as many images per step as the devices take at once, from 1 to 64
Expected:  a good start on new data; no score is published
"""

from __future__ import annotations

from stylepipe.config import Config, EMAConfig, LossConfig, NetworkConfig, OptimConfig
from stylepipe.presets.defaults import auto_gamma


def preset(res: int, world_size: int, batch_size: int | None) -> Config:
    """Return the settings; see `stylepipe.presets`."""
    batch_gpu = min(4096 // res, 32)
    if batch_size is None:
        batch_size = max(min(world_size * batch_gpu, 64) // world_size, 1) * world_size  # the formula's, made to divide
    learning_rate = 0.002 if res >= 1024 else 0.0025
    return Config(
        kimg=25_000,
        augment="ada",
        batch_size=batch_size,
        batch_gpu=batch_gpu,
        network=NetworkConfig(
            channel_base=32768 if res >= 512 else 16384, channel_max=512, mapping_layers=2, mbstd_group_size=4
        ),
        loss=LossConfig(r1_gamma=auto_gamma(res, batch_size)),
        optim=OptimConfig(g_lr=learning_rate, d_lr=learning_rate),
        ema=EMAConfig(kimg=batch_size * 10 / 32, rampup=0.05),
    )
