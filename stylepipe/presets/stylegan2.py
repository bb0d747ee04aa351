"""StyleGAN2, configuration F.

Paper:     Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", arXiv:1912.04958
Command:   accelerate launch launch/train.py --res 1024 --preset stylegan2 --data PHOTOGRAPHS --mirror
Hardware:  8 GPUs, 4 images each; any other number reaches batch 32 by accumulation
Expected:  FID 2.84 on FFHQ-1024 after 25,000 kimg (the paper's figure)
"""

from __future__ import annotations

from stylepipe.config import Config, EMAConfig, LossConfig, NetworkConfig, OptimConfig


def preset(res: int, world_size: int, batch_size: int | None) -> Config:
    """Return the settings; see `stylepipe.presets`."""
    return Config(
        kimg=25_000,
        batch_size=batch_size or 32,
        batch_gpu=4,
        network=NetworkConfig(channel_base=32768, channel_max=512, mapping_layers=8, mbstd_group_size=4),
        loss=LossConfig(r1_gamma=10.0),
        optim=OptimConfig(g_lr=0.002, d_lr=0.002),
        ema=EMAConfig(kimg=10.0, rampup=0.0),
    )
