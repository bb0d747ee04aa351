"""The last block of every discriminator: from 4x4 activations to what it says of an image, in float32."""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import nn

from stylepipe.errors import UserError
from stylepipe.networks.layers import Conv2d, Linear, MinibatchStdDev
from stylepipe.networks.mapping import MappingNetwork

CONDITIONINGS = ("projection", "aux", "both")
LAST_LAYERS = ("linear", "normalized")
HEAD_RES = 4
_MBDISC_DIMENSIONS = 16  # per kernel


class Judgement(NamedTuple):
    """What a discriminator says of N images.

    Attributes:
        logits: [N, 1] float32, positive for real.
        features: [N, C] float32 of the layer before, for feature matching.
        class_logits: [N, c_dim] float32 of the auxiliary classifier; None without it.
        direction: [N, 1] float32, the logits again, with gradients to a normalized last layer alone, while `logits`
            have them to everything else; None with a linear one.
    """

    logits: torch.Tensor
    features: torch.Tensor
    class_logits: torch.Tensor | None = None
    direction: torch.Tensor | None = None


class HeadOptions(TypedDict, total=False):
    """Keyword arguments of DiscriminatorHead, which every discriminator takes too.

    Attributes:
        c_dim: label dimensions, 0 for none.
        conditioning: what labels do: projection (Miyato & Koyama 2018, arXiv:1802.05637), aux (logits do not see them;
            a classifier is added: Odena et al. 2016, arXiv:1610.09585) or both.
        mbstd_group_size: images per group of the minibatch standard deviation, at most the batch; must divide it.
        mbstd_channels: channels that it appends, a divisor of those at 4 px; 0 switches it off.
        mbdisc_kernels: similarities to the rest of the batch that are added to the features; 0 switches them off.
        last_layer: linear, or normalized to a direction of unit length.
        conv_clamp: limit of activations, meant for float16; None for none.
    """

    c_dim: int
    conditioning: str
    mbstd_group_size: int
    mbstd_channels: int
    mbdisc_kernels: int
    last_layer: str
    conv_clamp: float | None


class DiscriminatorHead(nn.Module):
    """Minibatch statistics, a convolution, a fully connected layer, and the last one.

    With last_layer "normalized" (SAN: Takida et al. 2023, arXiv:2301.12811, Eq. 14) the logit is <h(x), w / ||w||>, the
    features learning by the loss of the logits and the direction w by a Wasserstein loss of its own.
    """

    def __init__(
        self,
        channels: int,
        *,
        c_dim: int = 0,
        conditioning: str = "projection",
        mbstd_group_size: int = 4,
        mbstd_channels: int = 1,
        mbdisc_kernels: int = 0,
        last_layer: str = "linear",
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        projected = is_projected(c_dim, conditioning)
        self.normalized = is_normalized(last_layer)
        self.mbstd = minibatch_stddev(channels, mbstd_group_size, mbstd_channels)
        self.conv = Conv2d(channels + mbstd_channels, channels, 3, act="lrelu", conv_clamp=conv_clamp)
        self.fc = Linear(channels * HEAD_RES**2, channels, act="lrelu")
        self.mbdisc = MinibatchDiscrimination(channels, mbdisc_kernels) if mbdisc_kernels else None
        width, outputs = channels + mbdisc_kernels, channels if projected else 1
        if self.normalized:
            self.direction = nn.Parameter(torch.randn(outputs, width))
        else:
            self.out = Linear(width, outputs)
        self.aux = Linear(width, c_dim) if conditioning != "projection" else None
        self._cmap_gain = 1 / math.sqrt(outputs)

    def forward(self, x: torch.Tensor, cmap: torch.Tensor | None) -> Judgement:
        """Judge activations [N, channels, 4, 4] float32, where labels are projected by cmap [N, channels]."""
        x = self.conv(self.mbstd(x))
        features = self.fc(x.flatten(1))
        h = features if self.mbdisc is None else torch.cat([features, self.mbdisc(features)], dim=1)
        class_logits = None if self.aux is None else self.aux(h)
        if self.normalized:
            return judge_along(self.direction if cmap is None else cmap @ self.direction, h, features, class_logits)
        y = self.out(h)
        logits = y if cmap is None else (y * cmap).sum(dim=1, keepdim=True) * self._cmap_gain
        return Judgement(logits, features, class_logits)


class MinibatchDiscrimination(nn.Module):
    """Tell how similar each image is to the others of its batch.

    Salimans et al. 2016, arXiv:1606.03498, section 3.2: o(x_i)_b = sum over j of exp(-||M_ib - M_jb||_1), M = f(x) T.
    Here T has an equalized learning rate, j is not i, and the sum is a mean, so that it depends on no batch size.
    """

    def __init__(self, features: int, kernels: int) -> None:
        super().__init__()
        self.kernels = kernels
        self.project = Linear(features, kernels * _MBDISC_DIMENSIONS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features [N, F] to similarities [N, kernels] in [0, 1]; 0 for a batch of one."""
        m = self.project(features).unflatten(1, (self.kernels, _MBDISC_DIMENSIONS))
        similar = (-(m[:, None] - m[None]).abs().sum(dim=3)).exp()  # [N, N, kernels], 1 where an image meets itself
        return (similar.sum(dim=1) - 1) / max(len(m) - 1, 1)


def judge_along(
    w: torch.Tensor, h: torch.Tensor, features: torch.Tensor, class_logits: torch.Tensor | None
) -> Judgement:
    """Judge h [N, F] by the direction of w [1 or N, F]: SAN's last layer."""
    direction = F.normalize(w, dim=1)
    logits = (h * direction.detach()).sum(dim=1, keepdim=True)
    return Judgement(logits, features, class_logits, (h.detach() * direction).sum(dim=1, keepdim=True))


def minibatch_stddev(channels: int, group_size: int, num_channels: int) -> MinibatchStdDev:
    """Return the minibatch standard deviation of activations at 4 px; raise UserError where they do not divide."""
    if num_channels and channels % num_channels:
        raise UserError(
            f"mbstd_channels {num_channels}: expected a divisor of the {channels} channels at 4 px, or 0 for none"
        )
    return MinibatchStdDev(group_size, num_channels)


def is_normalized(last_layer: str) -> bool:
    """Tell whether a last layer is normalized; raise UserError where there is no such layer."""
    if last_layer not in LAST_LAYERS:
        raise UserError(f"last_layer {last_layer!r}: expected one of {', '.join(LAST_LAYERS)}")
    return last_layer == "normalized"


def is_projected(c_dim: int, conditioning: str) -> bool:
    """Tell whether labels are projected; raise UserError where there is nothing to condition on."""
    if conditioning not in CONDITIONINGS:
        raise UserError(f"conditioning {conditioning!r}: expected one of {', '.join(CONDITIONINGS)}")
    if conditioning != "projection" and c_dim == 0:
        raise UserError(f"conditioning {conditioning!r}: expected a network with labels, found c_dim 0")
    return c_dim > 0 and conditioning != "aux"


def label_mapping(c_dim: int, conditioning: str, channels: int) -> MappingNetwork | None:
    """Return the network that makes cmap [N, channels] of labels, where they are projected."""
    return MappingNetwork(0, c_dim, channels, num_ws=None) if is_projected(c_dim, conditioning) else None


def head_config(options: HeadOptions) -> dict[str, object]:
    """Return what a network's JSON config says of its head.

    All options, those not given as DiscriminatorHead has them, but none that came later and is as it was before.
    """
    since = {"conditioning": "projection", "mbdisc_kernels": 0, "last_layer": "linear"}
    complete = {"c_dim": 0, "mbstd_group_size": 4, "mbstd_channels": 1, "conv_clamp": None, **options}
    return {name: value for name, value in complete.items() if name not in since or value != since[name]}
