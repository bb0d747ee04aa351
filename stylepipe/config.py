"""Every option of a training run, once: typed, with its help text.

A field that is `None` means "as the preset says"; `stylepipe.presets.resolve` fills it, so a resolved
`Config` holds every number and training from its file reproduces the run. Order of precedence:
default, preset, `--config` file, flag.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from stylepipe.errors import UserError
from stylepipe.parsing import one_line

Architecture = Literal["skip", "resnet", "orig"]
Conditioning = Literal["projection", "aux", "both"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
ReduceType = Literal["fp32", "bf16"]
TrackerKind = Literal["wandb", "tensorboard", "none"]
NetworkKind = Literal["stylegan2", "stylegan", "progan", "r3gan", "dcgan"]
LossKind = Literal["minimax", "non-saturating", "wgan", "wgan-gp", "lsgan", "hinge", "relativistic", "ebgan"]
LastLayer = Literal["linear", "normalized"]
Norm = Literal["batch", "virtual", "none"]
OnBad = Literal["stop", "skip"]
OnDivergence = Literal["stop", "rollback"]
AugmentMode = Literal["none", "ada", "fixed", "schedule", "diff"]
AugmentPipe = Literal["blit", "geom", "color", "filter", "noise", "cutout", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc"]

MIN_RES, MAX_RES = 8, 1024
MAX_SEED = 2**63
MAX_KIMG = 1e9
MIN_KEEP = 3

T = TypeVar("T")


@dataclass(frozen=True)
class NetworkConfig:
    """Generator and discriminator. What a kind of network has no use for is refused."""

    kind: NetworkKind | None = None
    """Networks of which paper. Default: as the preset says; any goes with any loss."""
    z_dim: int | None = None
    """Dimensions of the input latent z."""
    w_dim: int | None = None
    """Dimensions of the intermediate latent w (stylegan, stylegan2)."""
    channel_base: int | None = None
    """Feature maps at resolution r: min(channel_base / r, channel_max)."""
    channel_max: int | None = None
    """Most feature maps of any layer."""
    mapping_layers: int | None = None
    """Fully connected layers of the mapping network (stylegan, stylegan2)."""
    g_architecture: Architecture | None = None
    """How the generator makes its image (stylegan2): sum of upsampled RGB, residual, or last layer only."""
    d_architecture: Architecture | None = None
    """How the discriminator takes its image in (stylegan2)."""
    norm: Norm | None = None
    """Normalization of the generator's activations (dcgan): by the batch at hand, by a fixed reference batch, none."""
    mbstd_group_size: int | None = None
    """Images compared by minibatch stddev; the largest divisor of batch_gpu up to this is used."""
    mbstd_channels: int | None = None
    """Feature maps that minibatch stddev adds; 0 switches it off."""
    mbdisc_kernels: int = 0
    """Features that minibatch discrimination adds; 0 switches it off."""
    d_last_layer: LastLayer = "linear"
    """Last layer of the discriminator: linear, or a direction of unit length with a loss of its own (SAN)."""
    spectral_norm: bool = False
    """Divide the discriminator's weights by their largest singular value."""
    conv_clamp: float | None = None
    """Clamp activations to +-this; 256 where the activations are half precision."""
    half_levels: int = 4
    """With bf16 or fp16, how many of the highest resolutions use it; the rest stay in float32."""
    d_conditioning: Conditioning = "projection"
    """What the discriminator does with labels (see --cond): project its features onto them, classify images by an
    auxiliary output (see --loss.acgan-weight), or both."""
    class_w_avg: bool = False
    """Also keep a mean style of each class, so that truncation can pull towards that of the image's class."""


@dataclass(frozen=True)
class LossConfig:
    """What the networks play for (see --loss), regularizers and remedies."""

    kind: LossKind | None = None
    """The same as --loss."""
    real_label: float = 1.0
    """One-sided label smoothing: probability of being real that the discriminator is to give real images."""
    margin: float = 10.0
    """ebgan: energy of generated images from which on the discriminator is content."""
    n_critic: int | None = None
    """Steps of the discriminator for one of the generator."""
    r1_gamma: float | None = None
    """Weight of the R1 penalty, on the gradient at real images; 0 switches it off, here as below."""
    r2_gamma: float | None = None
    """Weight of the R2 penalty, on the gradient at generated images."""
    r1_interval: int | None = None
    """Steps between two R1 and R2 phases; with 1 they are part of every step of the discriminator."""
    gp_weight: float | None = None
    """Weight of the gradient penalty, between real and generated images."""
    gp_target: float = 1.0
    """Length of the gradient that it asks for."""
    gp_one_sided: bool = False
    """Penalize longer gradients only."""
    drift: float | None = None
    """Weight of the squared logits of real images."""
    weight_clip: float | None = None
    """Clip the discriminator's weights to +-this after every step."""
    feature_matching: float = 0.0
    """Weight of feature matching in the generator's loss."""
    historical_weight: float = 0.0
    """Weight of historical averaging: distance of both networks' weights from their mean so far."""
    pl_weight: float | None = None
    """Weight of path length regularization (stylegan, stylegan2)."""
    pl_interval: int = 4
    """Steps between two path length phases."""
    pl_decay: float = 0.01
    """How fast the running mean of path lengths follows, per phase."""
    pl_batch_shrink: int = 2
    """Path lengths are measured on batch / this images."""
    style_mixing: float | None = None
    """Share of generated images that mix two latents (stylegan, stylegan2)."""
    acgan_weight: float = 0.0
    """Weight of the auxiliary classifier's loss in both networks; needs --network.d-conditioning aux or both."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam, for both networks."""

    g_lr: float | None = None
    """Learning rate of the generator."""
    d_lr: float | None = None
    """Learning rate of the discriminator."""
    beta1: float | None = None
    """Decay of the mean of gradients."""
    beta2: float | None = None
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the latter."""


@dataclass(frozen=True)
class EMAConfig:
    """Moving average of the generator's weights; its images are the ones to look at."""

    kimg: float | None = None
    """Half-life, in thousands of images; 0 for no averaging."""
    decay: float | None = None
    """Share that a step keeps, whatever its batch, in place of --ema.kimg."""
    rampup: float | None = None
    """The half-life is at most this share of the images seen so far; 0 for no ramp-up."""
    posthoc_kimg: float | None = None
    """Save both power-function averages this often, for `stylepipe ema`; 0: keep none. Default: 32 times a run, and at
    most once in 1 kimg."""


@dataclass(frozen=True)
class GrowthConfig:
    """Progressive growing: train at low resolution first, and fade in one level after the other."""

    start_res: int | None = None
    """Resolution to begin with; that of --res trains it from the beginning. Default: as the preset says."""
    stable_kimg: float | None = None
    """Thousands of images that each level is trained for when it is there."""
    fade_kimg: float | None = None
    """Thousands of images over which a level is faded in."""
    batch_sizes: str | None = None
    """Batch size by level, such as 4:128,32:64: from 4 px on 128, from 32 px on 64. Default: --batch-size for all."""
    lr_multipliers: str | None = None
    """Factor of both learning rates by level, written the same way. Default: 1 for all."""


@dataclass(frozen=True)
class AnnealConfig:
    """Let settings follow half a cosine from their value to another, and then keep that."""

    kimg: float | None = None
    """Thousands of images that it takes; 0 for none of it."""
    lr: float | None = None
    """Share of both learning rates at the end."""
    gamma: float | None = None
    """Share of --loss.r1-gamma and --loss.r2-gamma at the end."""
    beta2: float | None = None
    """--optim.beta2 at the end."""
    ema: float | None = None
    """Share of --ema.kimg at the beginning, the whole of it being reached at the end."""


@dataclass(frozen=True)
class AugmentConfig:
    """What images go through before the discriminator sees them, real and generated alike (see --augment)."""

    pipe: AugmentPipe = "bgc"
    """Which augmentations, all but those of diff: one kind, or several by their first letters."""
    p: float | None = None
    """Probability of each: where ada begins, what fixed and diff keep, where schedule ends."""
    target: float = 0.6
    """ada: E[sign(D(real))] to hold; above it p rises, below it p falls."""
    interval: int = 4
    """ada: steps from one adjustment of p to the next."""
    speed_kimg: float | None = None
    """ada: thousands of images that p takes from 0 to 1 at the fastest."""
    schedule_kimg: float | None = None
    """schedule: thousands of images over which p rises from 0, along half a cosine. Default: the whole training."""
    xflip: float | None = None
    """Strength of the flip left to right: its probability is p times this. Default, here as below: as pipe says."""
    rotate90: float | None = None
    """Strength of rotations by 90 degrees."""
    xint: float | None = None
    """Strength of translations by whole pixels."""
    scale: float | None = None
    """Strength of isotropic scaling."""
    rotate: float | None = None
    """Strength of rotations by any angle."""
    aniso: float | None = None
    """Strength of scaling that changes the aspect ratio."""
    xfrac: float | None = None
    """Strength of translations by parts of pixels."""
    brightness: float | None = None
    """Strength of brightness."""
    contrast: float | None = None
    """Strength of contrast."""
    lumaflip: float | None = None
    """Strength of the luma flip."""
    hue: float | None = None
    """Strength of hue rotation."""
    saturation: float | None = None
    """Strength of saturation."""
    imgfilter: float | None = None
    """Strength of the filter of four octave bands."""
    noise: float | None = None
    """Strength of noise."""
    cutout: float | None = None
    """Strength of cutout."""


_AUGMENT_WAYS = ("pipe", "p", "target", "interval", "speed_kimg", "schedule_kimg")
AUGMENTATIONS = tuple(f.name for f in dataclasses.fields(AugmentConfig) if f.name not in _AUGMENT_WAYS)
"""The single augmentations that AugmentConfig has a strength of."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    res: int = 256
    """Resolution in pixels, a power of two from 8 to 1024."""
    data: str | None = None
    """A prepared folder (see `stylepipe prepare`), the location of one (https://, s3://, gs://, hf://, pipe:), or
    photographs: a folder, zip, tar, WebDataset shards or LMDB; or stream:SHARDS, photographs in WebDataset shards as
    they come, for more than can be prepared (not exactly resumable). Default: drawn faces, built in."""
    preset: str | None = None
    """Published setting to start from: stylegan2, paper1024, paper256, auto, transfer, stylegan, progan, r3gan, dcgan.
    Default: transfer with --init, else stylegan2 from 512 pixels on, auto below."""
    data_window: int | None = None
    """Shuffle within windows of this many shards, which come in another order each epoch; 0: over all images at once.
    Default: 16 where --data is the location of a prepared folder, else 0. Training on a location begins when its first
    window is here; with 0 it is copied whole before."""
    data_cache_gb: float | None = None
    """Keep at most this much of a location's shards in the cache (STYLEPIPE_CACHE), in GB; two windows must fit.
    Default: all that have come."""
    on_bad: OnBad = "stop"
    """When an image of the data cannot be read: stop, or skip it: another one, drawn from its place, stands in."""
    init: str | None = None
    """Fine-tune: start from the networks of this file, of another training. Gives --res and the architecture too."""
    freeze_d: int = 0
    """Fine-tuning: keep the first levels of the discriminator as they are, this many from the image on."""
    kimg: float | None = None
    """Length of the training, in thousands of real images shown to the discriminator."""
    batch_size: int | None = None
    """Images per step on all devices together."""
    batch_gpu: int | Literal["auto"] | None = None
    """Images at a time on one device, the rest by accumulation; auto takes the most that fits its free memory."""
    out: str | None = None
    """Folder of the run. Default: runs/00000-<preset>-<data>-<res>, numbered."""
    resume: str = "auto"
    """auto: go on from the newest state in --out; none: start anew; or the path of a state folder."""
    seed: int = 0
    """Seed of everything random."""
    mirror: bool = False
    """Show half of the images flipped left to right."""
    cond: bool = False
    """Train on the labels of the data."""
    augment: AugmentMode | None = None
    """Augment what the discriminator sees: ada adapts the probability to how far it overfits, fixed keeps it, schedule
    raises it; diff is DiffAugment's colour, translation and cutout. Default: as the preset says."""
    tracker: TrackerKind = "wandb"
    """Dashboard besides the files in --out."""
    tracker_artifacts: bool = False
    """Also upload network files to the tracker."""
    snapshot_kimg: float = 100
    """Save network-<kimg>.safetensors, and state-<kimg>/ to go on from, this often; the last ones always are."""
    state_kimg: float = 10
    """Save a state this often as well, to lose no more than that with a machine; only the newest of these is kept."""
    snapshot_with_d: bool = True
    """Network files hold G and D beside the averaged G, to fine-tune from; about three times the size."""
    keep_states: int = 3
    """How many of the newest states of --snapshot-kimg to keep; 0 keeps all states."""
    keep: int = 0
    """How many network files to keep: first, best and newest, and others evenly spread between; 0 keeps all."""
    metrics: str | None = None
    """What to measure the averaged network by, such as swd,msssim,fid, or none: see `stylepipe evaluate --help`.
    Default: swd."""
    metrics_kimg: float | None = None
    """Measure this often, and at the end; what is measured is saved. Default: --snapshot-kimg."""
    metrics_images: int | None = None
    """Generated images to measure. Default: each metric's own number, for swd 16,384 or as many as there are of real
    ones."""
    best_metric: str | None = None
    """What makes a network the best, network-best.safetensors. Default: the first of --metrics."""
    grid_kimg: float = 20
    """Save grids/<kimg>.png, images at fixed latents, this often."""
    clip_kimg: float = 100
    """Save clips/<kimg>.gif, faces that turn into one another, this often, and at the end."""
    tick_kimg: float = 1
    """Log this often."""
    diversity_kimg: float = 4
    """Measure this often how much generated images differ, and raise an alarm when they become alike."""
    on_divergence: OnDivergence = "stop"
    """When gradients stay inf or NaN: stop, or roll back to the last healthy state and go on with the weights of R1, R2
    and gradient penalty doubled."""
    divergence_updates: int = 20
    """How many updates of a network, one after the other, must have been skipped for inf or NaN gradients."""
    precision: Precision = "auto"
    """Activations of the highest resolutions; auto is bf16 on GPUs that have it, else float32."""
    reduce_dtype: ReduceType = "fp32"
    """What processes send one another their gradients in, to average them; bf16 is half the bytes."""
    workers: int | None = None
    """Threads that decode images, per device. Default: by the number of cores; none without a GPU."""
    max_hours: float | None = None
    """Save and stop after so many hours; the same command goes on from there. Default: no limit."""
    stall_minutes: float = 10
    """Of several processes, end all when one has not got on for so long; 0: never."""
    dry_run: bool = False
    """Print the resolved settings, the networks, estimates of memory and time, and exit."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    aug: AugmentConfig = field(default_factory=AugmentConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    anneal: AnnealConfig = field(default_factory=AnnealConfig)


def filled(value: T | None) -> T:
    """Return the value of an option in a resolved config, where none is open any more."""
    assert value is not None
    return value


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit` (both at least 1)."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def overlay(base: Any, over: Any) -> Any:
    """Fill every `None` field of the dataclass `over` from `base`, sections included."""
    changes = {}
    for f in dataclasses.fields(over):
        old, new = getattr(base, f.name), getattr(over, f.name)
        if dataclasses.is_dataclass(new):
            changes[f.name] = overlay(old, new)
        elif new is None:
            changes[f.name] = old
    return dataclasses.replace(over, **changes)


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from nested plain values, as a YAML file gives them.

    Raises:
        UserError: an unknown key (the nearest known one is named) or a value of another type.
            `where` names the file, and the section within it, in the message.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(one_line(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise UserError(f"{where}: unknown option {one_line(repr(key))}; {hint}")
        hint_type = hints[key]
        if dataclasses.is_dataclass(hint_type):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: {key} is {one_line(repr(value))}; expected a section of options")
            arguments[key] = from_mapping(typing.cast(type, hint_type), value, f"{where}, section {key}")
        else:
            arguments[key] = _checked(value, hint_type, f"{where}: {key}")
    return cls(**arguments)


def _checked(value: Any, hint: Any, where: str) -> Any:
    """Return `value` if it is of type `hint` (unions and literals understood), else raise."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    choices = options if origin in (typing.Union, types.UnionType) else (hint,)
    for choice in choices:
        if typing.get_origin(choice) is Literal:
            if value in typing.get_args(choice):
                return value
        elif choice is float and isinstance(value, int) and not isinstance(value, bool):
            with suppress(OverflowError):  # as `inf` is it refused by name
                return float(value)
        elif isinstance(value, choice) and (choice is bool or not isinstance(value, bool)):
            return value
    accepted = " or ".join(
        " | ".join(map(str, typing.get_args(c))) if typing.get_origin(c) is Literal else getattr(c, "__name__", str(c))
        for c in choices
    )
    raise UserError(f"{where} is {one_line(repr(value))}; expected {accepted}".replace("NoneType", "null"))
