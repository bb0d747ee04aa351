"""ProGAN: generator and discriminator that grow from 4x4 pixels.

Karras et al. 2018, arXiv:1710.10196 (growing: section 2 and Fig. 2; layers: appendix A, Table 2). Images are
[N, img_channels, res, res] float32 in [-1, 1] at the borders of both networks.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import nn

from stylepipe.kernels import conv2d
from stylepipe.networks.discriminator import PyramidDiscriminator
from stylepipe.networks.head import HeadOptions, head_config
from stylepipe.networks.layers import Conv2d, Linear, normalize_second_moment, to_channels_last
from stylepipe.networks.levels import LOWEST_RES, Levels, half_dtype_name, used_modules

_PIXEL_NORM_EPS = 1e-8


class Generator(nn.Module):
    """Maps latents to images through blocks b4, b8, ... of doubling resolution, each with a toRGB of its own."""

    def __init__(
        self,
        res: int,
        *,
        z_dim: int = 512,
        c_dim: int = 0,
        img_channels: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        conv_clamp: float | None = None,
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
        alpha: float = 1,
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            res: size in pixels of the images of the grown network, a power of two from 4.
            z_dim: size of the latent.
            c_dim: number of labels, 0 for none.
            img_channels: colours.
            channel_base, channel_max: resolution r has min(channel_base / r, channel_max) channels.
            conv_clamp: limit of activations before their normalization, meant for float16; None for none.
            half_levels: how many of the highest resolutions run their activations in `half_dtype` (never 4 px).
            half_dtype: float16 or bfloat16, by name or as torch.dtype.
            alpha: how far the last level is faded in, where nothing else is said: of a network that was growing.
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
            "alpha": alpha,
        }
        self.alpha = alpha
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self.z_dim, self.c_dim, self.resolutions = z_dim, c_dim, levels.resolutions
        for r in levels.resolutions:
            self.add_module(f"b{r}", GeneratorBlock(levels, r, z_dim + c_dim, img_channels, conv_clamp))

    def blocks(self, res: int | None = None) -> list[GeneratorBlock]:
        """Return the blocks from 4 px up to `res`, by default all."""
        return [getattr(self, f"b{r}") for r in self.resolutions if res is None or r <= res]

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that an image of `res` pixels takes."""
        return used_modules(self, self.resolutions, res, "torgb", {res, res // 2} if fading else {res})

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None = None,
        res: int | None = None,
        alpha: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return img [N, img_channels, res, res] float32, channels_last.

        Args:
            z: [N, z_dim] float32 normal.
            c: [N, c_dim] float32, joined to z; ignored where c_dim is 0.
            res: size of the image while the network grows, by default the full one.
            alpha: [] float32, how far the last level is faded in over the enlarged image of the one before; None:
                wholly, unless the network says less.
        """
        if alpha is None and self.alpha < 1:
            alpha = torch.tensor(self.alpha, device=z.device)
        if self.c_dim > 0:
            if c is None:
                raise ValueError(f"c: a network with {self.c_dim} labels needs c [N, {self.c_dim}], found None")
            z = torch.cat([z, c.to(z.dtype)], dim=1)
        x = normalize_second_moment(z)
        *lower, last = self.blocks(res)
        for block in lower:
            x = block(x)
        img = to_rgb(last.torgb, last(x))
        return img if alpha is None or not lower else enlarge(to_rgb(lower[-1].torgb, x)).lerp(img, alpha)


class GeneratorBlock(nn.Module):
    """The layers of one resolution: convolution, leaky ReLU and pixel norm, twice; at 4 px the first is dense."""

    def __init__(self, levels: Levels, res: int, inputs: int, img_channels: int, conv_clamp: float | None) -> None:
        super().__init__()
        self.res, self.dtype, self.first = res, levels.dtypes[res], res == LOWEST_RES
        channels = levels.channels[res]
        if self.first:
            self.fc = Linear(inputs, channels * res**2, act="lrelu")
        else:
            self.conv0 = UpsampleConv2d(levels.channels[res // 2], channels, conv_clamp=conv_clamp)
        self.conv1 = Conv2d(channels, channels, 3, act="lrelu", conv_clamp=conv_clamp)
        self.torgb = Conv2d(channels, img_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [N, C', res / 2, res / 2], at 4 px the latent [N, F], to activations [N, C, res, res], channels_last."""
        if self.first:
            x = self.fc(x).unflatten(1, (self.res, self.res, -1)).permute(0, 3, 1, 2)
        else:
            x = self.conv0(to_channels_last(x, self.dtype))
        return pixel_norm(self.conv1(pixel_norm(x)))


class UpsampleConv2d(Conv2d):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution, in one.

    Where pixels that upsampling makes of one meet the same window, their weights add up: a transposed convolution with
    4 products per output does the work of 9, to the edge of the image.
    """

    spread: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, *, conv_clamp: float | None = None) -> None:
        super().__init__(in_channels, out_channels, 3, act="lrelu", conv_clamp=conv_clamp)
        # To sums over windows of 2x2, mirrored, for a transposed convolution convolves: [9, 16].
        each = torch.eye(9).view(9, 1, 3, 3)
        sums = F.avg_pool2d(each, 2, stride=1, padding=1, divisor_override=1).flip([2, 3])
        self.register_buffer("spread", sums.flatten(1), persistent=False)

    def _convolve(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, blurred: bool
    ) -> torch.Tensor:
        del blurred
        weight = (weight.flatten(2) @ self.spread.to(weight.dtype)).view(*weight.shape[:2], 4, 4)
        return conv2d(x, weight.transpose(0, 1), bias, stride=2, padding=1, transposed=True)


class Discriminator(PyramidDiscriminator):
    """Maps images of any of its resolutions to logits, positive for real, through blocks of halving resolution."""

    def __init__(
        self,
        res: int,
        *,
        img_channels: int = 3,
        channel_base: int = 16384,
        channel_max: int = 512,
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
        grows: bool = True,
        spectral_norm: bool = False,
        **head: Unpack[HeadOptions],
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            res, img_channels, channel_base, channel_max, half_levels, half_dtype: as Generator.
            grows, spectral_norm: as PyramidDiscriminator.
            head: options of the last block and of labels; `conv_clamp` holds for all blocks.
        """
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)

        def make_block(fromrgb: Conv2d | None, r: int) -> nn.Module:
            return self.make_block(fromrgb, levels, r, head.get("conv_clamp"))

        super().__init__(
            levels,
            make_block,
            img_channels=img_channels,
            architecture="orig",
            grows=grows,
            spectral_norm=spectral_norm,
            **head,
        )
        self.config = {
            "res": res,
            "img_channels": img_channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
            "grows": grows,
            "spectral_norm": spectral_norm,
            **head_config(head),
        }

    @staticmethod
    def make_block(fromrgb: Conv2d | None, levels: Levels, res: int, conv_clamp: float | None) -> nn.Module:
        """Return the layers of a resolution above 4 px."""
        return DiscriminatorBlock(fromrgb, levels, res, conv_clamp)

    def downsample(self, img: torch.Tensor) -> torch.Tensor:
        """Return the 2x2 means of img [N, C, H, W]."""
        return F.avg_pool2d(img, 2)

    def upsample(self, img: torch.Tensor) -> torch.Tensor:
        """Return img [N, C, H, W] with each pixel four times."""
        return enlarge(img)


class DiscriminatorBlock(nn.Module):
    """The layers of one resolution above 4 px, which halve it: two convolutions with leaky ReLU, and the 2x2 mean."""

    def __init__(self, fromrgb: Conv2d | None, levels: Levels, res: int, conv_clamp: float | None) -> None:
        super().__init__()
        self.dtype, channels = levels.dtypes[res], levels.channels[res]
        self.fromrgb = fromrgb
        self.conv0 = Conv2d(channels, channels, 3, act="lrelu", conv_clamp=conv_clamp)
        self.conv1 = Conv2d(channels, levels.channels[res // 2], 3, act="lrelu", conv_clamp=conv_clamp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map activations [N, C, res, res], the image's features, to [N, C', res / 2, res / 2]."""
        return F.avg_pool2d(self.conv1(self.conv0(x)), 2)


def pixel_norm(x: torch.Tensor) -> torch.Tensor:
    """Return x [N, C, H, W] with the mean square over the channels of each pixel brought to 1 (section 4.2)."""
    return F.rms_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=_PIXEL_NORM_EPS).permute(0, 3, 1, 2)


def to_rgb(torgb: Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return the image [N, img_channels, H, W], in the parameters' type float32, of activations [N, C, H, W]."""
    img: torch.Tensor = torgb(to_channels_last(x, torgb.weight.dtype))
    return img


def enlarge(img: torch.Tensor) -> torch.Tensor:
    """Return img [N, C, H, W] as [N, C, 2H, 2W], each pixel four times."""
    return F.interpolate(img, scale_factor=2, mode="nearest")
