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
    GrowthConfig,
    filled,
    largest_divisor,
    overlay,
)
from stylepipe.config_checks import by_level, validate
from stylepipe.errors import UserError
from stylepipe.presets import auto, dcgan, paper256, paper1024, progan, r3gan, stylegan, stylegan2, transfer
from stylepipe.presets.defaults import (
    GROWING,
    NETWORKS,
    STYLED,
    auto_gamma,
    check_loss,
    check_network,
    check_used,
    loss_defaults,
    used_by,
    without_regularizers,
)

Preset = Callable[[int, int, int | None], Config]

PRESETS: dict[str, Preset] = {
    "stylegan2": stylegan2.preset,
    "paper1024": paper1024.preset,
    "paper256": paper256.preset,
    "auto": auto.preset,
    "transfer": transfer.preset,
    "stylegan": stylegan.preset,
    "progan": progan.preset,
    "r3gan": r3gan.preset,
    "dcgan": dcgan.preset,
}

CONV_CLAMP_HALF = 256.0  # Karras et al. 2020 (arXiv:2006.06676): keeps float16 activations in range

# Where ada begins, what fixed and diff keep and schedule reaches: Karras et al. 2020 (arXiv:2006.06676) for the first
# (the paper's fixed p is the user's to choose: a mild one here), Zhao et al. 2020 (arXiv:2006.10738), Huang et al. 2024
# (arXiv:2501.05441).
AUGMENT_P: Mapping[str, float] = {"ada": 0.0, "fixed": 0.2, "diff": 1.0, "schedule": 0.3}
ADA_SPEED_KIMG = 500.0
GROWTH_KIMG = 600.0
POSTHOC_FILES = 32  # of power-function averages in a run: with lengths from 0.02 to 0.25 in reach to 4 % and less
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
    check_network(config, config.network.kind or defaults.network.kind or "stylegan2")
    _check_schedules(defaults, config)
    augment = config.augment or defaults.augment or "none"
    check_augment(config.aug, augment)
    preset = replace(defaults, preset=name, aug=defaults.aug if augment == defaults.augment else AugmentConfig())
    asked, config = config, with_augment(_with_parts(preset, config), augment)
    if config.metrics_kimg is None:
        config = replace(config, metrics_kimg=config.snapshot_kimg)
    validate(config)
    check_used(asked, preset, config)
    check_loss(config)

    for res, size in by_level("--growth.batch-sizes", config.growth.batch_sizes, whole=True).items():
        if size % world_size:
            raise UserError(
                f"--growth.batch-sizes {config.growth.batch_sizes}: {size} at {res} px; expected a multiple of the "
                f"{world_size} processes, such as {-(-int(size) // world_size) * world_size}"
            )
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
    """Set the micro-batch of the full resolution."""
    return replace(config, batch_gpu=batch_gpu)


def _with_parts(preset: Config, config: Config) -> Config:
    """Fill what is open from the preset, then from the paper of the networks, then from that of the loss.

    What a preset says of other networks or of another loss than those asked for does not count.
    """
    kind = config.network.kind or preset.network.kind or "stylegan2"
    loss_kind = config.loss.kind or preset.loss.kind or "non-saturating"
    loss, preset_kind = preset.loss, preset.loss.kind or "non-saturating"
    if loss_kind != preset_kind:
        loss = without_regularizers(loss)
    if kind not in STYLED:
        loss = replace(loss, pl_weight=None, style_mixing=None)
    ema = preset.ema if config.ema.kimg is None else replace(preset.ema, decay=None)
    growth = preset.growth if kind in GROWING else GrowthConfig()
    filling = replace(preset, network=used_by(preset.network, kind), loss=loss, ema=ema, growth=growth)
    config = overlay(NETWORKS[kind], overlay(filling, config))
    own = preset.loss.r1_gamma  # tuned to this resolution and batch
    gamma = auto_gamma(config.res, filled(config.batch_size)) if own is None else own
    loss = config.loss
    for default in loss_defaults(loss_kind, gamma):
        loss = overlay(default, loss)
    network = replace(config.network, kind=kind)
    if kind == "dcgan" and network.norm is None:
        penalized = any((loss.r1_gamma, loss.r2_gamma, loss.gp_weight, network.spectral_norm))
        network = replace(network, norm="none" if penalized else "batch")
    growth, ema, anneal = config.growth, config.ema, config.anneal
    return replace(
        config,
        network=network,
        loss=replace(loss, kind=loss_kind, pl_weight=loss.pl_weight or 0.0, style_mixing=loss.style_mixing or 0.0),
        growth=_filled_growth(growth, config.res),
        ema=replace(
            ema,
            kimg=0.0 if ema.kimg is None else ema.kimg,
            rampup=ema.rampup or 0.0,
            posthoc_kimg=_posthoc_kimg(filled(config.kimg)) if ema.posthoc_kimg is None else ema.posthoc_kimg,
        ),
        anneal=replace(anneal, kimg=anneal.kimg or 0.0),
    )


def _posthoc_kimg(kimg: float) -> float:
    """Return how often averages are saved in a training of this length: not more than once in 1 kimg."""
    return max(1.0, kimg / POSTHOC_FILES)


def _filled_growth(growth: GrowthConfig, res: int) -> GrowthConfig:
    """Fill what is open: no growth, or the lengths of Karras et al. 2018, arXiv:1710.10196, as they were published."""
    start_res = res if growth.start_res is None else growth.start_res
    if start_res == res:
        return GrowthConfig(start_res=start_res)
    lengths = GrowthConfig(stable_kimg=GROWTH_KIMG, fade_kimg=GROWTH_KIMG)
    return overlay(lengths, replace(growth, start_res=start_res))


def _check_schedules(preset: Config, config: Config) -> None:
    """Refuse options of growing and annealing where nothing grows or anneals, and two half-lives of one average.

    Raises:
        UserError: names the option, and what would make use of it.
    """
    start_res = config.growth.start_res or preset.growth.start_res or config.res
    if config.ema.kimg and config.ema.decay is not None:
        raise UserError(f"--ema.kimg {config.ema.kimg:g} and --ema.decay {config.ema.decay:g}: give one of them")
    length = preset.anneal.kimg if config.anneal.kimg is None else config.anneal.kimg
    if start_res == config.res:
        for name, value in vars(config.growth).items():
            if name != "start_res" and value is not None:
                raise UserError(
                    f"--growth.{name.replace('_', '-')} {value}: nothing grows; add --growth.start-res with less than "
                    f"{config.res}, or leave it out"
                )
    if not length:
        for name, value in vars(config.anneal).items():
            if name != "kimg" and value is not None:
                raise UserError(f"--anneal.{name} {value}: nothing anneals; add --anneal.kimg, or leave it out")


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
