"""DCGAN: the plain baseline, at 64 px as in its paper or any other resolution by the same rule.

Paper:     Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional GANs", arXiv:1511.06434
Command:   accelerate launch launch/train.py --res 64 --preset dcgan --data PHOTOGRAPHS
Hardware:  1 GPU
Expected:  faces with visible flaws; no score is published
"""

from __future__ import annotations

from stylepipe.config import Config, EMAConfig, LossConfig, NetworkConfig, OptimConfig


def preset(res: int, world_size: int, batch_size: int | None) -> Config:
    """Return the settings; see `stylepipe.presets`."""
    batch_size = batch_size or -(-128 // world_size) * world_size
    return Config(
        kimg=10_000,
        batch_size=batch_size,
        batch_gpu=batch_size // world_size,  # whole, since batch normalization depends on it
        augment="none",
        network=NetworkConfig(kind="dcgan", channel_base=4096, channel_max=1024, mbstd_group_size=4),
        loss=LossConfig(kind="non-saturating", r1_gamma=0.0),
        optim=OptimConfig(g_lr=2e-4, d_lr=2e-4),
        ema=EMAConfig(kimg=0.0, rampup=0.0),
    )
