"""Published settings, one file each: how to fill every option that the user left open.

A preset is a function of resolution, number of processes and the batch size asked for (None: its own).
To add one, write its file and name it here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from stylepipe.config import (
    AUGMENTATIONS,
    AugmentConfig,
    AugmentMode,
    Config,
    filled,
    largest_divisor,
    overlay,
    validate,
)
from stylepipe.errors import UserError
from stylepipe.presets import auto, paper256, paper1024, stylegan2, transfer

Preset = Callable[[int, int, int | None], Config]

PRESETS: dict[str, Preset] = {
    "stylegan2": stylegan2.preset,
    "paper1024": paper1024.preset,
    "paper256": paper256.preset,
    "auto": auto.preset,
    "transfer": transfer.preset,
}

CONV_CLAMP_HALF = 256.0  # Karras et al. 2020 (arXiv:2006.06676): keeps float16 activations in range

# Where ada begins, what fixed and diff keep and schedule reaches: Karras et al. 2020 (arXiv:2006.06676) for the first
# (the paper's fixed p is the user's to choose: a mild one here), Zhao et al. 2020 (arXiv:2006.10738), Huang et al. 2024
# (arXiv:2501.05441).
AUGMENT_P: Mapping[str, float] = {"ada": 0.0, "fixed": 0.2, "diff": 1.0, "schedule": 0.3}
ADA_SPEED_KIMG = 500.0
AUGMENT_USES: Mapping[AugmentMode, Collection[str]] = {
    "none": (),
    "ada": ("pipe", "p", "target", "interval", "speed_kimg", *AUGMENTATIONS),
    "fixed": ("pipe", "p", *AUGMENTATIONS),
    "schedule": ("pipe", "p", "schedule_kimg", *AUGMENTATIONS),
    "diff": ("p",),
}


def resolve(config: Config, world_size: int, batch_gpu_limit: int | None = None) -> Config:
    """Fill every open option for `world_size` processes and check that the numbers fit together.

    Only `precision="auto"` and `batch_gpu="auto"` may remain, which need the device. `batch_gpu_limit` caps the
    preset's micro-batch where the device is smaller than those it was made for.

    Raises:
        UserError: an option no run could use, an unknown preset, a batch size that does not divide.
    """
    validate(config)
    name = config.preset or ("transfer" if config.init is not None else "stylegan2" if config.res >= 512 else "auto")
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PRESETS)}"
        raise UserError(f"--preset {name}: unknown preset; {hint}")
    defaults = PRESETS[name](config.res, world_size, config.batch_size)
    batch_gpu_given = config.batch_gpu is not None
    augment = config.augment or defaults.augment or "none"
    check_augment(config.aug, augment)
    config = with_augment(overlay(replace(defaults, preset=name), config), augment)
    validate(config)

    batch_size = filled(config.batch_size)
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        raise UserError(
            f"--batch-size {batch_size}: expected a multiple of the {world_size} processes; "
            f"try {below or world_size} or {(below or world_size) + world_size}"
        )
    if config.batch_gpu == "auto":
        return config
    assert isinstance(config.batch_gpu, int)
    per_process = batch_size // world_size
    if batch_gpu_given and per_process % config.batch_gpu:
        raise UserError(
            f"--batch-gpu {config.batch_gpu}: expected a divisor of {per_process}, the images of one process "
            f"(--batch-size {batch_size} / {world_size} processes); "
            f"try {largest_divisor(per_process, config.batch_gpu)}"
        )
    limit = config.batch_gpu if batch_gpu_given or batch_gpu_limit is None else min(config.batch_gpu, batch_gpu_limit)
    return with_batch_gpu(config, largest_divisor(per_process, limit))


def with_batch_gpu(config: Config, batch_gpu: int) -> Config:
    """Set the micro-batch, and the minibatch stddev group to its largest divisor up to the preset's."""
    group = largest_divisor(batch_gpu, filled(config.network.mbstd_group_size))
    return replace(config, batch_gpu=batch_gpu, network=replace(config.network, mbstd_group_size=group))


def check_augment(aug: AugmentConfig, mode: AugmentMode) -> None:
    """Refuse options that this way of augmenting would leave unused: nobody shall train on without noticing.

    Raises:
        UserError: names the option, and the ways that use it.
    """
    for name, value in vars(aug).items():
        if value != getattr(AugmentConfig(), name) and name not in AUGMENT_USES[mode]:
            ways = ", ".join(way for way, uses in AUGMENT_USES.items() if name in uses)
            raise UserError(
                f"--aug.{name.replace('_', '-')} {value}: --augment {mode} makes no use of it; leave it out, or choose "
                f"--augment {ways}"
            )


def with_augment(config: Config, mode: AugmentMode) -> Config:
    """Set the way of augmenting and fill what it leaves open with the numbers of its paper; no others stay."""
    used = AugmentConfig(**{name: value for name, value in vars(config.aug).items() if name in AUGMENT_USES[mode]})
    filling = AugmentConfig(p=AUGMENT_P.get(mode), speed_kimg=ADA_SPEED_KIMG if mode == "ada" else None)
    return replace(config, augment=mode, aug=overlay(filling, used))


def with_precision(config: Config, precision: str) -> Config:
    """Set the type of the highest resolutions; half precision brings the paper's clamp unless one is set."""
    network = config.network
    if precision != "fp32" and network.conv_clamp is None:
        network = replace(network, conv_clamp=CONV_CLAMP_HALF)
    return replace(config, precision=precision, network=network)  # type: ignore[arg-type]
