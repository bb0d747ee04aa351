"""ProGAN: progressive growing with WGAN-GP.

Paper:     Karras et al. 2018, "Progressive Growing of GANs", arXiv:1710.10196
Command:   accelerate launch launch/train.py --res 1024 --preset progan --data PHOTOGRAPHS --mirror
Hardware:  8 GPUs; the batches of a single one where there are fewer
Expected:  SWD 4.66 (x1000) and MS-SSIM 0.338 on CelebA-HQ-1024 after 12,000 kimg (a public re-training)
"""

from __future__ import annotations

from stylepipe.config import Config, EMAConfig, GrowthConfig, LossConfig, NetworkConfig, OptimConfig
from stylepipe.config_checks import at_level, by_level

# Published with the paper: by level, for eight GPUs and for one.
_BATCHES = {8: "4:512,8:256,16:128,32:64,64:32", 1: "4:128,32:64,64:32,128:16,256:8,512:4"}
_RATES = {8: "128:1.5,256:2,512:3", 1: "1024:1.5"}
EMA_DECAY = 0.999  # per step


def preset(res: int, world_size: int, batch_size: int | None) -> Config:
    """Return the settings; see `stylepipe.presets`."""
    growth, last_batch = growth_of(res, world_size, batch_size)
    return Config(
        kimg=12_000,
        batch_size=last_batch,
        batch_gpu=4,
        augment="none",
        network=NetworkConfig(kind="progan", channel_base=16384, channel_max=512, mbstd_group_size=4),
        loss=LossConfig(kind="wgan-gp", gp_weight=10.0, drift=0.001, n_critic=1),
        optim=OptimConfig(g_lr=0.001, d_lr=0.001),
        ema=EMAConfig(decay=EMA_DECAY),
        growth=growth,
    )


def growth_of(res: int, world_size: int, batch_size: int | None, start_res: int = 4) -> tuple[GrowthConfig, int]:
    """Return the published growth from `start_res` to `res`, and the batch of the last level.

    A batch that is asked for takes the place of the table. Every batch is a multiple of the processes.
    """
    gpus = 8 if world_size >= 8 else 1
    table = {} if batch_size is not None else by_level("batch sizes", _BATCHES[gpus], whole=True)
    table = {level: -(-int(size) // world_size) * world_size for level, size in table.items()}
    growth = GrowthConfig(
        start_res=min(start_res, res),
        stable_kimg=600.0,
        fade_kimg=600.0,
        batch_sizes=",".join(f"{level}:{size}" for level, size in table.items()),
        lr_multipliers=_RATES[gpus],
    )
    return growth, batch_size or int(at_level(table, res, 0))
