"""Layers of networks without equalized learning rate, DCGAN's and R3GAN's, which have one resolution."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import nn

from stylepipe.kernels import conv2d
from stylepipe.networks.discriminator import JudgingNetwork
from stylepipe.networks.head import (
    HeadOptions,
    Judgement,
    MinibatchDiscrimination,
    is_normalized,
    is_projected,
    judge_along,
    minibatch_stddev,
)
from stylepipe.networks.layers import MinibatchStdDev, normalize_second_moment, to_channels_last
from stylepipe.networks.norms import at_least_float32


class PlainGenerator(nn.Module):
    """A generator that makes images of z itself, of one resolution.

    Attributes:
        config: keyword arguments that make another of its kind.
        z_dim, c_dim: sizes of latent and label.
        resolutions: the one of its images.
    """

    config: dict[str, Any]
    z_dim: int
    c_dim: int
    resolutions: list[int]

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None = None,
        res: int | None = None,
        alpha: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return img [N, img_channels, res, res] float32, channels_last, of z [N, z_dim] and c [N, c_dim].

        Raises:
            ValueError: another `res` than the network's, or an `alpha`: it does not grow.
        """
        if res not in (None, self.resolutions[0]):
            raise ValueError(f"res {res}: this network does not grow, its images are {self.resolutions[0]} px")
        _refuse_fade(alpha)
        img = self.make(z, c)
        return to_channels_last(img, img.dtype)

    def make(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        """Return img [N, img_channels, res, res] float32."""
        raise NotImplementedError

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that an image takes: all."""
        del res, fading
        return [self]


class PlainDiscriminator(JudgingNetwork):
    """A discriminator of images of one resolution."""

    def judge(self, img: torch.Tensor, c: torch.Tensor | None = None, alpha: torch.Tensor | None = None) -> Judgement:
        """See JudgingNetwork."""
        (full,) = self.resolutions
        if img.ndim != 4 or list(img.shape[2:]) != [full, full]:
            raise ValueError(f"img of shape {list(img.shape)}: expected [N, C, {full}, {full}]")
        _refuse_fade(alpha)
        return self.look(img, c)

    def look(self, img: torch.Tensor, c: torch.Tensor | None) -> Judgement:
        """Judge img [N, img_channels, res, res] and c [N, c_dim]."""
        raise NotImplementedError

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that see an image: all."""
        del res, fading
        return [self]


class Conv2d(nn.Conv2d):
    """Convolution in the type of x, differentiable twice at the speed of once; its bias is left to what follows."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        std: float,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
        _draw_(self, std)
        self._stride, self._padding = stride, padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride] (with padding that does so)."""
        weight = self.weight.to(x.dtype)
        return conv2d(x, weight, stride=self._stride, padding=self._padding, groups=self.groups)


class LabelEmbedding(nn.Module):
    """Appends to each latent an embedding of its label, of the same size and mean square as the latent."""

    def __init__(self, c_dim: int, z_dim: int) -> None:
        super().__init__()
        self.c_dim = c_dim
        self.linear = linear(c_dim, z_dim, std=1)

    def forward(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        """Map z [N, z_dim] and c [N, c_dim] to [N, 2 z_dim]."""
        return torch.cat([z, normalize_second_moment(self.linear(required_labels(c, self.c_dim)))], dim=1)


class PlainHead(nn.Module):
    """What a discriminator without equalized learning rate says of the features of its last layer but one.

    The logit is <h, w>, where h are the features with minibatch discrimination's, and w is a learned vector or, with
    labels, V c + b: the projection discriminator (Miyato & Koyama 2018, arXiv:1802.05637, Eq. 3), whose unconditional
    term is <h, b>. Its 1 / sqrt(features) is in the initial V. With last_layer "normalized" (Takida et al. 2023,
    arXiv:2301.12811, Eq. 14) w has unit length.
    """

    def __init__(self, features: int, *, std: float | None = None, **options: Unpack[HeadOptions]) -> None:
        """Build the last layer.

        Args:
            features: of the layer before.
            std: of initial weights; None for 1 / sqrt(their inputs).
            options: as DiscriminatorHead; those of convolutions are left to the network.
        """
        super().__init__()
        c_dim, conditioning = options.get("c_dim", 0), options.get("conditioning", "projection")
        kernels = options.get("mbdisc_kernels", 0)
        self.c_dim, self.normalized = c_dim, is_normalized(options.get("last_layer", "linear"))
        width = features + kernels
        std = 1 / math.sqrt(width) if std is None else std
        self.mbdisc: MinibatchDiscrimination | None = None
        if kernels:
            self.mbdisc = MinibatchDiscrimination(features, kernels)
            # Its projection has an equalized learning rate, as no other layer here.
            products = self.mbdisc.project.weight.shape[0]
            self.mbdisc.add_module("project", linear(features, products, std=1 / math.sqrt(features), bias=True))
        self.embed: nn.Linear | None = None
        if is_projected(c_dim, conditioning):
            self.embed = linear(c_dim, width, std=std, bias=True)
        elif self.normalized:
            self.direction = nn.Parameter(torch.randn(1, width) * std)
        else:
            self.out = linear(width, 1, std=std)
        self.aux = linear(width, c_dim, std=std, bias=True) if conditioning != "projection" else None

    def forward(self, features: torch.Tensor, c: torch.Tensor | None) -> Judgement:
        """Judge features [N, F] float32, given c [N, c_dim]."""
        h = features if self.mbdisc is None else torch.cat([features, self.mbdisc(features)], dim=1)
        class_logits = None if self.aux is None else self.aux(h)
        w = None if self.embed is None else self.embed(required_labels(c, self.c_dim))
        if self.normalized:
            return judge_along(self.direction if w is None else w, h, features, class_logits)
        logits = self.out(h) if w is None else (h * w).sum(dim=1, keepdim=True)
        return Judgement(logits, features, class_logits)


def plain_stddev(channels: int, options: HeadOptions) -> MinibatchStdDev:
    """Return the minibatch standard deviation that `options` ask for, by default of no channels."""
    return minibatch_stddev(channels, options.get("mbstd_group_size", 4), options.get("mbstd_channels", 0))


def linear(in_features: int, out_features: int, *, std: float, bias: bool = False) -> nn.Linear:
    """Return a fully connected layer with weights of N(0, std^2) and biases of 0."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    _draw_(layer, std)
    return layer


def activations(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x [N, C, H, W] in channels_last and in a level's type; float64 stays what it is, for tests' sake."""
    return to_channels_last(x, at_least_float32(x).dtype if dtype == torch.float32 else dtype)


def required_labels(c: torch.Tensor | None, c_dim: int) -> torch.Tensor:
    """Return c [N, c_dim], at least in float32; raise ValueError where there is none."""
    if c is None:
        raise ValueError(f"c: a network with {c_dim} labels needs c [N, {c_dim}], found None")
    return at_least_float32(c)


def _refuse_fade(alpha: torch.Tensor | None) -> None:
    if alpha is not None:
        raise ValueError("alpha: this network does not grow, so no level is faded in")


def _draw_(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
