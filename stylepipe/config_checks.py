"""Values of options that no run could use, refused before anything is allocated; and options written level by level."""

from __future__ import annotations

import math
from collections.abc import Mapping

from stylepipe.config import AUGMENTATIONS, MAX_KIMG, MAX_RES, MAX_SEED, MIN_KEEP, MIN_RES, Config
from stylepipe.errors import UserError


def validate(config: Config) -> None:
    """Refuse values that no run could use; called on options before anything is allocated.

    Raises:
        UserError: names the option, the value found and what is accepted.
    """
    res = config.res
    if not (MIN_RES <= res <= MAX_RES and res & (res - 1) == 0):
        near = min((2**k for k in range(3, 11)), key=lambda r: abs(r - res))
        raise UserError(f"--res {res}: expected a power of two from {MIN_RES} to {MAX_RES}; try {near}")
    paths = {"--data": config.data, "--init": config.init, "--out": config.out, "--resume": config.resume}
    for option, text in paths.items():
        if text == "":
            raise UserError(f'{option} "": expected a path; leave the option out for its default')
    limited = {
        "--kimg": (config.kimg, MAX_KIMG),
        "--snapshot-kimg": (config.snapshot_kimg, MAX_KIMG),
        "--state-kimg": (config.state_kimg, MAX_KIMG),
        "--grid-kimg": (config.grid_kimg, MAX_KIMG),
        "--clip-kimg": (config.clip_kimg, MAX_KIMG),
        "--tick-kimg": (config.tick_kimg, MAX_KIMG),
        "--diversity-kimg": (config.diversity_kimg, MAX_KIMG),
        "--metrics-kimg": (config.metrics_kimg, MAX_KIMG),
        "--ema.posthoc-kimg": (config.ema.posthoc_kimg, MAX_KIMG),
        "--batch-size": (config.batch_size, 2**20),
        "--network.z-dim": (config.network.z_dim, 2**16),
        "--network.w-dim": (config.network.w_dim, 2**16),
        "--network.channel-base": (config.network.channel_base, 2**24),
        "--network.channel-max": (config.network.channel_max, 2**16),
        "--network.mapping-layers": (config.network.mapping_layers, 100),
    }
    for option, (number, most) in limited.items():
        if number is not None and number > most:
            raise UserError(f"{option} {number}: expected at most {most}")
    positive = {
        "--kimg": config.kimg,
        "--batch-size": config.batch_size,
        "--batch-gpu": None if config.batch_gpu == "auto" else config.batch_gpu,
        "--snapshot-kimg": config.snapshot_kimg,
        "--state-kimg": config.state_kimg,
        "--max-hours": config.max_hours,
        "--grid-kimg": config.grid_kimg,
        "--clip-kimg": config.clip_kimg,
        "--tick-kimg": config.tick_kimg,
        "--data-cache-gb": config.data_cache_gb,
        "--diversity-kimg": config.diversity_kimg,
        "--metrics-kimg": config.metrics_kimg,
        "--divergence-updates": config.divergence_updates,
        "--network.z-dim": config.network.z_dim,
        "--network.w-dim": config.network.w_dim,
        "--network.channel-max": config.network.channel_max,
        "--network.mapping-layers": config.network.mapping_layers,
        "--network.mbstd-group-size": config.network.mbstd_group_size,
        "--network.conv-clamp": config.network.conv_clamp,
        "--loss.r1-interval": config.loss.r1_interval,
        "--loss.n-critic": config.loss.n_critic,
        "--loss.margin": config.loss.margin,
        "--loss.gp-target": config.loss.gp_target,
        "--growth.stable-kimg": config.growth.stable_kimg,
        "--loss.pl-interval": config.loss.pl_interval,
        "--loss.pl-batch-shrink": config.loss.pl_batch_shrink,
        "--optim.eps": config.optim.eps,
        "--aug.interval": config.aug.interval,
        "--aug.speed-kimg": config.aug.speed_kimg,
        "--aug.schedule-kimg": config.aug.schedule_kimg,
    }
    for option, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{option} {value}: expected a finite number above 0")
    not_negative = {
        "--seed": config.seed,
        "--freeze-d": config.freeze_d,
        "--keep-states": config.keep_states,
        "--stall-minutes": config.stall_minutes,
        "--keep": config.keep,
        "--workers": config.workers,
        "--data-window": config.data_window,
        "--loss.r1-gamma": config.loss.r1_gamma,
        "--loss.r2-gamma": config.loss.r2_gamma,
        "--loss.gp-weight": config.loss.gp_weight,
        "--loss.drift": config.loss.drift,
        "--loss.weight-clip": config.loss.weight_clip,
        "--loss.feature-matching": config.loss.feature_matching,
        "--loss.historical-weight": config.loss.historical_weight,
        "--network.mbdisc-kernels": config.network.mbdisc_kernels,
        "--growth.fade-kimg": config.growth.fade_kimg,
        "--anneal.kimg": config.anneal.kimg,
        "--anneal.lr": config.anneal.lr,
        "--anneal.gamma": config.anneal.gamma,
        "--anneal.ema": config.anneal.ema,
        "--loss.pl-weight": config.loss.pl_weight,
        "--loss.acgan-weight": config.loss.acgan_weight,
        "--network.mbstd-channels": config.network.mbstd_channels,
        "--network.half-levels": config.network.half_levels,
        "--ema.kimg": config.ema.kimg,
        "--ema.rampup": config.ema.rampup,
        "--ema.posthoc-kimg": config.ema.posthoc_kimg,
        "--optim.g-lr": config.optim.g_lr,
        "--optim.d-lr": config.optim.d_lr,
    }
    for option, value in not_negative.items():
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{option} {value}: expected a finite number, 0 or more")
    if config.seed >= MAX_SEED:
        raise UserError(f"--seed {config.seed}: expected less than 2^63")
    levels = res.bit_length() - 3
    if config.freeze_d > levels:
        raise UserError(
            f"--freeze-d {config.freeze_d}: expected at most {levels}, the levels above 4 px at --res {res}"
        )
    shares = {
        "--loss.style-mixing": config.loss.style_mixing,
        "--loss.pl-decay": config.loss.pl_decay,
        "--aug.p": config.aug.p,
        **{f"--aug.{name}": getattr(config.aug, name) for name in AUGMENTATIONS},
    }
    for option, value in shares.items():
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{option} {value}: expected a share from 0 to 1")
    decays = {
        "--optim.beta1": config.optim.beta1,
        "--optim.beta2": config.optim.beta2,
        "--anneal.beta2": config.anneal.beta2,
        "--ema.decay": config.ema.decay,
    }
    for option, value in decays.items():
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{option} {value}: expected a decay from 0 to below 1")
    if not 0.5 < config.loss.real_label <= 1:
        raise UserError(f"--loss.real-label {config.loss.real_label}: expected a probability above 0.5, up to 1")
    start = config.growth.start_res
    if start is not None and not (4 <= start <= res and start & (start - 1) == 0):
        raise UserError(f"--growth.start-res {start}: expected a power of two from 4 to --res {res}")
    by_level("--growth.batch-sizes", config.growth.batch_sizes, whole=True)
    by_level("--growth.lr-multipliers", config.growth.lr_multipliers)
    if not -1 < config.aug.target < 1:
        raise UserError(f"--aug.target {config.aug.target}: expected a mean sign, between -1 and 1")
    _validate_conditioning(config)
    if 0 < config.keep < MIN_KEEP:
        raise UserError(f"--keep {config.keep}: expected 0 for all, or {MIN_KEEP} at least: first, best and newest")
    if config.metrics_images is not None and config.metrics_images < 2:
        raise UserError(f"--metrics-images {config.metrics_images}: expected at least 2")
    base = config.network.channel_base
    if base is not None and base < res:
        raise UserError(f"--network.channel-base {base}: leaves less than one channel at {res} px; try {64 * res}")


def by_level(option: str, text: str | None, whole: bool = False) -> dict[int, float]:
    """Read "4:128,32:64" as {4: 128, 32: 64}.

    Args:
        option: its name, for messages.
        text: None or empty for no level.
        whole: the numbers are whole.

    Raises:
        UserError: it is something else.
    """
    found: dict[int, float] = {}
    for part in (text or "").split(",") if text else []:
        level, _, number = part.strip().partition(":")
        try:
            res, value = int(level), int(number) if whole else float(number)
        except ValueError:
            raise UserError(f"{option} {text}: {part!r} found, expected LEVEL:NUMBER, such as 4:128,32:64") from None
        if res < 4 or res & (res - 1) or not 0 < value < 2**20:
            raise UserError(f"{option} {text}: {part!r} found, expected a power of two from 4, and a number above 0")
        if res in found:
            raise UserError(f"{option} {text}: {res} px twice; expected each level once")
        found[res] = value
    return found


def at_level(table: Mapping[int, float], res: int, default: float) -> float:
    """Return what a table of `by_level` says of a resolution: the entry of the highest level that is not above it."""
    below = [level for level in table if level <= res]
    return table[max(below)] if below else default


def _validate_conditioning(config: Config) -> None:
    """Refuse options of labels that do not go together."""
    conditioning, weight = config.network.d_conditioning, config.loss.acgan_weight
    if not config.cond:
        if conditioning != "projection":
            raise UserError(f"--network.d-conditioning {conditioning}: expected a training on labels; add --cond")
        if config.network.class_w_avg:
            raise UserError("--network.class-w-avg: expected a training on labels; add --cond")
    if weight > 0 and conditioning == "projection":
        raise UserError(
            f"--loss.acgan-weight {weight:g}: the discriminator has no classifier; "
            f"add --network.d-conditioning aux or both"
        )
    if weight == 0 and conditioning != "projection":
        raise UserError(
            f"--network.d-conditioning {conditioning}: nothing trains its classifier; "
            f"add --loss.acgan-weight 1, or leave it out"
        )
