"""R3GAN: a plain convolutional GAN under a relativistic loss with R1 and R2.

Paper:     Huang et al. 2024, "The GAN is dead; long live the GAN!", arXiv:2501.05441
Command:   accelerate launch launch/train.py --res 256 --preset r3gan --data PHOTOGRAPHS --mirror
Hardware:  8 GPUs, 32 images each; any other number reaches batch 256 by accumulation
Expected:  FID 2.75 on FFHQ-256 (the paper's figure)
"""

from __future__ import annotations

from stylepipe.config import AnnealConfig, AugmentConfig, Config, EMAConfig, LossConfig, NetworkConfig, OptimConfig

_ANNEALED_KIMG = 20_000.0


def preset(res: int, world_size: int, batch_size: int | None) -> Config:
    """Return the settings; see `stylepipe.presets`. At other resolutions than 256 px, gamma's is our own choice."""
    gamma = 150.0 * (res / 256) ** 3
    return Config(
        kimg=25_000,
        batch_size=batch_size or 256 // world_size * world_size,
        batch_gpu=32,
        augment="schedule",
        network=NetworkConfig(kind="r3gan", channel_base=24576, channel_max=768, mbstd_group_size=4),
        loss=LossConfig(kind="relativistic", r1_gamma=gamma, r2_gamma=gamma, r1_interval=1),
        optim=OptimConfig(g_lr=2e-4, d_lr=2e-4, beta2=0.9),
        ema=EMAConfig(kimg=500.0, rampup=0.0),
        aug=AugmentConfig(
            p=0.3, schedule_kimg=_ANNEALED_KIMG, cutout=1.0,
            brightness=0.5, contrast=0.5, lumaflip=0.5, hue=0.5, saturation=0.5,
        ),
        anneal=AnnealConfig(kimg=_ANNEALED_KIMG, lr=0.25, gamma=0.1, beta2=0.99, ema=0.0),
    )  # fmt: skip
