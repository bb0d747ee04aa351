"""R3GAN: generator and discriminator of grouped residual bottlenecks, without any normalisation.

Huang et al. 2024, arXiv:2501.05441, section 4, configuration E. Images are [N, img_channels, res, res] float32, about
in [-1, 1], at the borders of both networks. What the paper's text leaves open (where biases stand, that transitions of
equal width have no convolution) is settled by its parameter counts, 23.058M and 23.010M at 256 px.
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import nn

from stylepipe.kernels import bias_act, downsample2d, setup_filter, upsample2d
from stylepipe.networks.head import HEAD_RES, HeadOptions, Judgement, head_config
from stylepipe.networks.layers import LRELU_SLOPE
from stylepipe.networks.levels import LOWEST_RES, Levels, half_dtype_name
from stylepipe.networks.norms import at_least_float32
from stylepipe.networks.plain import (
    Conv2d,
    LabelEmbedding,
    PlainDiscriminator,
    PlainGenerator,
    PlainHead,
    activations,
    linear,
    plain_stddev,
)
from stylepipe.networks.spectral import add_spectral_norm_

RESAMPLE_TAPS = (1, 2, 1)
CHANNEL_BASE = 24576
CHANNEL_MAX = 768
BLOCKS_PER_LEVEL = 2
EXPANSION = 2
CHANNELS_PER_GROUP = 8  # of a block's width; EXPANSION times as many where they are convolved
_LRELU_GAIN = math.sqrt(2 / (1 + LRELU_SLOPE**2))  # He et al. 2015, arXiv:1502.01852, Eq. 15


class Generator(PlainGenerator):
    """Maps latents to images: a learned 4x4 basis scaled by the latent, then levels of doubling resolution."""

    def __init__(
        self,
        res: int,
        *,
        z_dim: int = 64,
        c_dim: int = 0,
        img_channels: int = 3,
        channel_base: int = CHANNEL_BASE,
        channel_max: int = CHANNEL_MAX,
        conv_clamp: float | None = None,
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            res: image size in pixels, a power of two from 4.
            z_dim, c_dim: sizes of latent and label, 0 for none.
            img_channels: colours.
            channel_base, channel_max: resolution r has min(channel_base / r, channel_max) channels.
            conv_clamp: limit of activations within blocks, meant for float16; None for none.
            half_levels: how many of the highest resolutions run their activations in `half_dtype` (never 4 px).
            half_dtype: float16 or bfloat16 (the paper's, at four levels), by name or as torch.dtype.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "res": res,
            "z_dim": z_dim,
            "c_dim": c_dim,
            "img_channels": img_channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "conv_clamp": conv_clamp,
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
        }
        self.z_dim, self.c_dim, self.resolutions = z_dim, c_dim, [res]
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        lowest, latent_dim = levels.channels[LOWEST_RES], 2 * z_dim if c_dim else z_dim
        self.embed = LabelEmbedding(c_dim, z_dim) if c_dim else None
        self.fc = linear(latent_dim, lowest, std=1 / math.sqrt(latent_dim))
        self.basis = nn.Parameter(torch.randn(lowest, LOWEST_RES, LOWEST_RES))
        self._levels = levels.resolutions
        for r in self._levels:
            self.add_module(f"b{r}", SynthesisLevel(levels, r, conv_clamp))
        self.torgb = _conv1x1(levels.channels[res], img_channels)

    def make(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        """See PlainGenerator."""
        z = at_least_float32(z)
        x = self.basis * self.fc(z if self.embed is None else self.embed(z, c))[:, :, None, None]
        for r in self._levels:
            x = self.get_submodule(f"b{r}")(x)
        img: torch.Tensor = self.torgb(at_least_float32(x))
        return img


class Discriminator(PlainDiscriminator):
    """Maps images to logits, positive for real: levels of halving resolution, a global convolution, a linear layer."""

    def __init__(
        self,
        res: int,
        *,
        img_channels: int = 3,
        channel_base: int = CHANNEL_BASE,
        channel_max: int = CHANNEL_MAX,
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
        spectral_norm: bool = False,
        **head: Unpack[HeadOptions],
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            res, img_channels, channel_base, channel_max, half_levels, half_dtype: as Generator.
            spectral_norm: divide all weights by their largest singular value (Miyato et al. 2018, arXiv:1802.05957);
                refused, for those that start at zero have none.
            head: options of the last layer and of labels; `mbstd_channels` is 0 unless given, `conv_clamp` as in
                Generator.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "res": res,
            "img_channels": img_channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
            **head_config({"mbstd_channels": 0, **head}),
        }
        self.resolutions = [res]
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self.fromrgb = _conv1x1(img_channels, levels.channels[res])
        self._levels = levels.resolutions[::-1]
        for r in self._levels:
            self.add_module(f"b{r}", DiscriminatorLevel(levels, r, head.get("conv_clamp")))
        lowest = levels.channels[LOWEST_RES]
        self.mbstd = plain_stddev(lowest, head)
        features = lowest + self.mbstd.num_channels
        self.pool = nn.Parameter(torch.randn(features, HEAD_RES, HEAD_RES) / HEAD_RES)
        self.head = PlainHead(features, **head)
        if spectral_norm:
            self.config["spectral_norm"] = True
            add_spectral_norm_(self)

    def look(self, img: torch.Tensor, c: torch.Tensor | None) -> Judgement:
        """See PlainDiscriminator."""
        x = self.fromrgb(activations(img, torch.float32))
        for r in self._levels:
            x = self.get_submodule(f"b{r}")(x)
        # The depthwise 4x4 convolution without padding: a weighted sum over the pixels of each channel.
        features = (self.mbstd(at_least_float32(x)) * self.pool).sum(dim=(2, 3))
        judgement: Judgement = self.head(features, c)
        return judgement


class _Level(nn.Module):
    """The residual blocks of one resolution."""

    resample_filter: torch.Tensor

    def __init__(self, levels: Levels, res: int, conv_clamp: float | None) -> None:
        super().__init__()
        self.dtype = levels.dtypes[res]
        in_network = BLOCKS_PER_LEVEL * len(levels.resolutions)
        blocks = [ResidualBlock(levels.channels[res], in_network, conv_clamp) for _ in range(BLOCKS_PER_LEVEL)]
        self.blocks = nn.Sequential(*blocks)
        below = levels.channels[max(res // 2, LOWEST_RES)]
        self.wide, self.narrow = max(below, levels.channels[res]), min(below, levels.channels[res])
        self.resampled = res > LOWEST_RES
        self.register_buffer("resample_filter", setup_filter(RESAMPLE_TAPS, separable=True), persistent=False)


class SynthesisLevel(_Level):
    """A generator's level: to its width, to twice the size, and its blocks."""

    def __init__(self, levels: Levels, res: int, conv_clamp: float | None) -> None:
        super().__init__(levels, res, conv_clamp)
        self.transition = _conv1x1(self.wide, self.narrow) if self.wide > self.narrow else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, C, res / 2, res / 2] to [N, C, res, res]; at 4 px x comes at full size."""
        x = activations(x, self.dtype)
        if self.transition is not None:  # commutes with the filter, and works on a quarter of the pixels before it
            x = self.transition(x)
        y: torch.Tensor = self.blocks(upsample2d(x, self.resample_filter) if self.resampled else x)
        return y


class DiscriminatorLevel(_Level):
    """A discriminator's level: its blocks, to half the size, and to the width there."""

    def __init__(self, levels: Levels, res: int, conv_clamp: float | None) -> None:
        super().__init__(levels, res, conv_clamp)
        self.transition = _conv1x1(self.narrow, self.wide) if self.wide > self.narrow else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, C, res, res] to [N, C, res / 2, res / 2]; at 4 px the size stays."""
        x = self.blocks(activations(x, self.dtype))
        x = downsample2d(x, self.resample_filter) if self.resampled else x
        return x if self.transition is None else self.transition(x)


class ResidualBlock(nn.Module):
    """Inverted bottleneck: 1x1 to twice the width, grouped 3x3, 1x1 back, added to the input.

    Initialised by fix-up (Zhang et al. 2019, arXiv:1901.09321): the last convolution is zero, so that the block starts
    as the identity, and the others are scaled by L^-1/4, L being the number of blocks in the network.
    """

    def __init__(self, channels: int, blocks_in_network: int, conv_clamp: float | None) -> None:
        super().__init__()
        inner, groups = EXPANSION * channels, cardinality(channels)
        gain = _LRELU_GAIN * blocks_in_network**-0.25
        grouped_std = gain / math.sqrt(inner // groups * 9)
        self.conv0 = Conv2d(channels, inner, 1, bias=True, std=gain / math.sqrt(channels))
        self.conv1 = Conv2d(inner, inner, 3, padding=1, groups=groups, bias=True, std=grouped_std)
        self.conv2 = Conv2d(inner, channels, 1, std=0)
        self._clamp = conv_clamp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, channels, H, W] to the same shape."""
        y = bias_act(self.conv0(x), self.conv0.bias, act="lrelu", alpha=LRELU_SLOPE, gain=1, clamp=self._clamp)
        y = bias_act(self.conv1(y), self.conv1.bias, act="lrelu", alpha=LRELU_SLOPE, gain=1, clamp=self._clamp)
        branch: torch.Tensor = self.conv2(y)
        return branch.add_(x)  # in place: nobody reads the branch again


def cardinality(channels: int) -> int:
    """Return the groups of a block's 3x3 convolution: one per 8 channels of its width, or the next number to fit."""
    groups = max(channels // CHANNELS_PER_GROUP, 1)
    while (EXPANSION * channels) % groups:
        groups -= 1
    return groups


def _conv1x1(in_channels: int, out_channels: int) -> Conv2d:
    return Conv2d(in_channels, out_channels, 1, std=1 / math.sqrt(in_channels))
