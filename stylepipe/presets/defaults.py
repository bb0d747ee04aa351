"""What the networks and losses of a paper bring along, wherever a preset and the user leave it open."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from stylepipe.config import Config, LossConfig, LossKind, NetworkConfig, NetworkKind, OptimConfig, filled
from stylepipe.errors import UserError

_COMMON: tuple[str, ...] = ("kind", "z_dim", "channel_base", "channel_max", "half_levels", "conv_clamp")
_COMMON += ("d_conditioning", "d_last_layer", "spectral_norm", "mbstd_group_size", "mbstd_channels", "mbdisc_kernels")
_STYLED = (*_COMMON, "w_dim", "mapping_layers", "class_w_avg")

NETWORK_USES: Mapping[NetworkKind, Collection[str]] = {
    "stylegan2": (*_STYLED, "g_architecture", "d_architecture"),
    "stylegan": _STYLED,
    "progan": _COMMON,
    "r3gan": _COMMON,
    "dcgan": (*_COMMON, "norm"),
}
GROWING: Collection[NetworkKind] = ("stylegan2", "stylegan", "progan")
STYLED: Collection[NetworkKind] = ("stylegan2", "stylegan")

_STYLES_LOSS = ("pl_weight", "style_mixing")
_OPTIM = OptimConfig(beta1=0.0, beta2=0.99)

# Numbers of each paper; see the presets named alike.
NETWORKS: Mapping[NetworkKind, Config] = {
    "stylegan2": Config(
        network=NetworkConfig(
            z_dim=512, w_dim=512, mapping_layers=8, g_architecture="skip", d_architecture="resnet", mbstd_channels=1
        ),
        loss=LossConfig(pl_weight=2.0, style_mixing=0.9),
        optim=_OPTIM,
    ),
    "stylegan": Config(
        network=NetworkConfig(z_dim=512, w_dim=512, mapping_layers=8, mbstd_channels=1),
        loss=LossConfig(pl_weight=0.0, style_mixing=0.9),
        optim=_OPTIM,
    ),
    "progan": Config(network=NetworkConfig(z_dim=512, mbstd_channels=1), optim=_OPTIM),
    "r3gan": Config(network=NetworkConfig(z_dim=64, mbstd_channels=0), optim=_OPTIM),
    "dcgan": Config(network=NetworkConfig(z_dim=100, mbstd_channels=0), optim=OptimConfig(beta1=0.5, beta2=0.999)),
}

# What bounds the discriminator, by loss. WGAN: Arjovsky et al. 2017, arXiv:1701.07875, Algorithm 1. WGAN-GP: Gulrajani
# et al. 2017, arXiv:1704.00028, Algorithm 1, with the drift of Karras et al. 2018, arXiv:1710.10196, appendix A.1.
LOSSES: Mapping[LossKind, LossConfig] = {
    "wgan": LossConfig(r1_gamma=0.0, weight_clip=0.01, n_critic=5),
    "wgan-gp": LossConfig(r1_gamma=0.0, gp_weight=10.0, drift=0.001, n_critic=5),
}
_OFF = LossConfig(r2_gamma=0.0, gp_weight=0.0, drift=0.0, weight_clip=0.0, n_critic=1, r1_interval=16)


def auto_gamma(res: int, batch_size: int) -> float:
    """Return R1's weight by the rule of Karras et al. 2020, arXiv:2006.06676, appendix C."""
    return 0.0002 * res**2 / batch_size


def loss_defaults(kind: LossKind, r1_gamma: float) -> list[LossConfig]:
    """Return what a loss brings along, what comes first prevailing; r1_gamma is for those without bounds of their own.

    The relativistic loss takes R2 beside R1, without which it need not converge (Huang et al. 2024, arXiv:2501.05441,
    section 2.3).
    """
    own = LOSSES.get(kind, LossConfig(r1_gamma=r1_gamma, r2_gamma=r1_gamma if kind == "relativistic" else None))
    return [own, _OFF]


def without_regularizers(loss: LossConfig) -> LossConfig:
    """Leave out what belongs to another loss."""
    return replace(loss, r1_gamma=None, r2_gamma=None, gp_weight=None, drift=None, weight_clip=None, n_critic=None)


def used_by(network: NetworkConfig, kind: NetworkKind) -> NetworkConfig:
    """Leave out what networks of this kind have no use for."""
    unused = {name: getattr(NetworkConfig(), name) for name in vars(network) if name not in NETWORK_USES[kind]}
    return replace(network, **unused)


def check_network(config: Config, kind: NetworkKind) -> None:
    """Refuse options that these networks would leave unused: nobody shall train on without noticing.

    Raises:
        UserError: names the option, and the kinds of network that use it.
    """
    for name, value in vars(config.network).items():
        if value != getattr(NetworkConfig(), name) and name not in NETWORK_USES[kind]:
            kinds = ", ".join(other for other, uses in NETWORK_USES.items() if name in uses)
            raise UserError(
                f"--network.{name.replace('_', '-')} {value}: networks of kind {kind} make no use of it; leave it out, "
                f"or choose --network.kind {kinds}"
            )
    for name in _STYLES_LOSS:
        if (value := getattr(config.loss, name)) and kind not in STYLED:
            raise UserError(
                f"--loss.{name.replace('_', '-')} {value:g}: networks of kind {kind} have no styles; leave it out, or "
                f"choose --network.kind {', '.join(STYLED)}"
            )
    growth = config.growth
    if config.freeze_d > 0 and kind != "stylegan2":
        raise UserError(
            f"--freeze-d {config.freeze_d}: expected networks of kind stylegan2, found {kind}; leave it out"
        )
    if growth.start_res is not None and growth.start_res < config.res and kind not in GROWING:
        raise UserError(
            f"--growth.start-res {growth.start_res}: networks of kind {kind} do not grow; leave it out, or choose "
            f"--network.kind {', '.join(GROWING)}"
        )


def check_used(asked: Config, preset: Config, config: Config) -> None:
    """Refuse options that the settings as a whole leave without effect: nobody shall train on without noticing.

    Args:
        asked: what the user says. What the preset says as well is not refused: a file of resolved settings has it all.
        preset: before anything that the user says.
        config: resolved.

    Raises:
        UserError: names the option, and what would make use of it.
    """
    loss, kind = config.loss, config.loss.kind
    no_r = filled(loss.r1_gamma) == 0 and filled(loss.r2_gamma) == 0
    unused = {
        "loss.margin": (kind != "ebgan", f"--loss {kind} has none", "choose --loss ebgan"),
        "loss.gp_target": (loss.gp_weight == 0, "there is no gradient penalty", "add --loss.gp-weight 10"),
        "loss.gp_one_sided": (loss.gp_weight == 0, "there is no gradient penalty", "add --loss.gp-weight 10"),
        "loss.r1_interval": (no_r, "there is neither R1 nor R2", "add --loss.r1-gamma 1"),
        "anneal.gamma": (no_r, "there is neither R1 nor R2", "add --loss.r1-gamma 1"),
        "loss.pl_interval": (loss.pl_weight == 0, "path length is not regularized", "add --loss.pl-weight 2"),
        "loss.pl_decay": (loss.pl_weight == 0, "path length is not regularized", "add --loss.pl-weight 2"),
        "loss.pl_batch_shrink": (loss.pl_weight == 0, "path length is not regularized", "add --loss.pl-weight 2"),
        "network.mbstd_group_size": (
            config.network.mbstd_channels == 0,
            "minibatch stddev is off",
            "add --network.mbstd-channels 1",
        ),
    }
    for option, (without_effect, reason, remedy) in unused.items():
        section, name = option.split(".")
        value, default = getattr(getattr(asked, section), name), getattr(getattr(preset, section), name)
        if default is None and option == "loss.r1_interval":
            default = _OFF.r1_interval
        if without_effect and value is not None and value != default:
            text = "" if value is True else f" {value:g}"
            raise UserError(f"--{option.replace('_', '-')}{text}: {reason}; leave it out, or {remedy}")


def check_loss(config: Config) -> None:
    """Refuse losses and remedies that contradict each other, of resolved settings.

    Raises:
        UserError: names both.
    """
    loss, network = config.loss, config.network
    kind = filled(loss.kind)
    penalized = {"gp-weight": loss.gp_weight, "r1-gamma": loss.r1_gamma, "r2-gamma": loss.r2_gamma}
    bounded = any(filled(weight) > 0 for weight in [*penalized.values(), loss.weight_clip]) or network.spectral_norm
    if kind in ("wgan", "wgan-gp") and not bounded:
        raise UserError(
            f"--loss {kind}: nothing bounds the critic, so that its loss has no minimum; leave --loss.weight-clip and "
            f"--loss.gp-weight to their defaults, or add --network.spectral-norm"
        )
    if config.on_divergence == "rollback" and not any(filled(weight) > 0 for weight in penalized.values()):
        raise UserError(
            "--on-divergence rollback: it raises the weights of R1, R2 and gradient penalty, and there are none; add "
            "--loss.r1-gamma, or choose stop"
        )
    if network.norm == "batch" and network.spectral_norm:
        raise UserError(
            "--network.norm batch and --network.spectral-norm: the one undoes the scale that the other gives weights; "
            "choose --network.norm virtual or none"
        )
    if network.norm == "batch":
        for option, weight in penalized.items():
            if filled(weight) > 0:
                raise UserError(
                    f"--network.norm batch: the gradient at one image, which --loss.{option} {weight:g} penalizes, "
                    f"would be that of its whole batch (arXiv:1704.00028, section 4); choose --network.norm virtual "
                    f"or none, or --loss.{option} 0"
                )
    if network.spectral_norm and filled(loss.weight_clip) > 0:
        raise UserError(
            f"--network.spectral-norm and --loss.weight-clip {loss.weight_clip:g}: both bound the same weights, by "
            f"scaling and by cutting; choose --network.no-spectral-norm, or --loss.weight-clip 0"
        )
    if network.spectral_norm and network.kind == "r3gan":
        raise UserError(
            "--network.spectral-norm: r3gan's residual branches start from weights of 0, which have no norm to divide "
            "by; leave it out, or choose another --network.kind"
        )
    if filled(config.growth.start_res) < config.res:
        if loss.historical_weight > 0:
            raise UserError(
                f"--loss.historical-weight {loss.historical_weight:g}: holds levels that grow to their random first "
                f"weights; leave it out, or train at once with --growth.start-res {config.res}"
            )
        if network.kind == "stylegan2" and network.g_architecture != "skip":
            raise UserError(
                f"--network.g-architecture {network.g_architecture}: only its last level makes an image, so it cannot "
                f"grow; choose skip, or --growth.start-res {config.res}"
            )
        if config.init is not None:
            raise UserError(
                f"--init {config.init}: its networks are grown already; expected --growth.start-res {config.res}"
            )
