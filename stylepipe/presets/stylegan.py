"""StyleGAN, as its paper trains it on FFHQ: progressive growing from 8 px, non-saturating loss, R1 every step.

Paper:     Karras et al. 2019, "A Style-Based Generator Architecture for GANs", arXiv:1812.04948
Command:   accelerate launch launch/train.py --res 1024 --preset stylegan --data PHOTOGRAPHS --mirror
Hardware:  8 GPUs; the batches of a single one where there are fewer
Expected:  FID 4.40 on FFHQ-1024 after 25,000 kimg (the paper's best configuration)
"""

from __future__ import annotations

from stylepipe.config import Config, EMAConfig, LossConfig, NetworkConfig, OptimConfig
from stylepipe.presets import progan


def preset(res: int, world_size: int, batch_size: int | None) -> Config:
    """Return the settings; see `stylepipe.presets`."""
    growth, last_batch = progan.growth_of(res, world_size, batch_size, start_res=8)
    return Config(
        kimg=25_000,
        batch_size=last_batch,
        batch_gpu=4,
        augment="none",
        network=NetworkConfig(
            kind="stylegan", channel_base=16384, channel_max=512, mapping_layers=8, mbstd_group_size=4
        ),
        loss=LossConfig(kind="non-saturating", r1_gamma=10.0, r1_interval=1),
        optim=OptimConfig(g_lr=0.001, d_lr=0.001),
        ema=EMAConfig(kimg=10.0, rampup=0.0),
        growth=growth,
    )
