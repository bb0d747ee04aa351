"""StyleGAN2 as the ADA paper trains it at 256 pixels: half the channels, batch 64.

Paper:     Karras et al. 2020, "Training GANs with Limited Data", arXiv:2006.06676
Command:   accelerate launch launch/train.py --res 256 --preset paper256 --data PHOTOGRAPHS --mirror
Hardware:  8 GPUs, 8 images each; any other number reaches batch 64 by accumulation
Expected:  FID 3.78 on FFHQ-256 (Huang et al. 2024, arXiv:2501.05441)
"""

from __future__ import annotations

from stylepipe.config import Config, EMAConfig, LossConfig, NetworkConfig, OptimConfig


def preset(res: int, world_size: int, batch_size: int | None) -> Config:
    """Return the settings; see `stylepipe.presets`."""
    return Config(
        kimg=25_000,
        batch_size=batch_size or 64,
        batch_gpu=8,
        network=NetworkConfig(channel_base=16384, channel_max=512, mapping_layers=8, mbstd_group_size=8),
        loss=LossConfig(r1_gamma=1.0),
        optim=OptimConfig(g_lr=0.0025, d_lr=0.0025),
        ema=EMAConfig(kimg=20.0, rampup=0.0),
    )
