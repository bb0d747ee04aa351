"""StyleGAN2: generator and discriminator.

Karras et al. 2020, arXiv:1912.04958 (architecture: section 4, Fig. 7); precision as in Karras et al. 2020,
arXiv:2006.06676, appendix D. Images are [N, img_channels, res, res] float32 in [-1, 1] at the borders of both networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import torch
from torch import nn

from stylepipe.errors import UserError
from stylepipe.kernels import downsample2d, per_pixel_dot, upsample2d
from stylepipe.networks.discriminator import PyramidDiscriminator
from stylepipe.networks.head import HeadOptions, head_config
from stylepipe.networks.layers import (
    Conv2d,
    Modulation,
    SynthesisLayer,
    ToRGB,
    UpsampleConv1x1,
    resample_filter,
    to_channels_last,
)
from stylepipe.networks.levels import LOWEST_RES, Levels, half_dtype_name
from stylepipe.networks.mapping import MappingNetwork
from stylepipe.networks.style_based import StyleGenerator, Synthesis

ARCHITECTURES = ("skip", "resnet", "orig")
_RESIDUAL_GAIN = math.sqrt(0.5)


class Generator(StyleGenerator):
    """Maps latents to images: `mapping(z, c) -> ws`, `synthesis(ws) -> img`, or both in one call."""

    def __init__(
        self,
        res: int,
        *,
        z_dim: int = 512,
        w_dim: int = 512,
        c_dim: int = 0,
        img_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        mapping_layers: int = 8,
        architecture: str = "skip",
        conv_clamp: float | None = None,
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
        class_w_avg: bool = False,
        alpha: float = 1,
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            res: image size in pixels, a power of two from 4.
            z_dim, w_dim: sizes of latent and style.
            c_dim: number of labels, 0 for none.
            img_channels: colours.
            channel_base, channel_max: resolution r has min(channel_base / r, channel_max) channels.
            mapping_layers: depth of the mapping network.
            architecture: skip (sum of upsampled RGB), resnet or orig.
            conv_clamp: limit of activations, meant for float16; None for none.
            half_levels: how many of the highest resolutions run their activations in `half_dtype` (never 4 px).
            half_dtype: float16 or bfloat16, by name or as torch.dtype.
            class_w_avg: keep a mean style of each class, for truncation; needs one-hot labels.
            alpha: how far the last level is faded in, where nothing else is said: of a network that was growing.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "res": res,
            "z_dim": z_dim,
            "w_dim": w_dim,
            "c_dim": c_dim,
            "img_channels": img_channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "mapping_layers": mapping_layers,
            "architecture": architecture,
            "conv_clamp": conv_clamp,
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
        }
        if class_w_avg:  # files without it stay as they always were
            self.config["class_w_avg"] = True
        if alpha < 1:
            self.config["alpha"] = alpha
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self.synthesis = SynthesisNetwork(levels, w_dim, img_channels, _checked(architecture), conv_clamp, alpha)
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.synthesis.num_ws, mapping_layers, class_w_avg)
        self.take_dimensions()


class SynthesisNetwork(Synthesis["SynthesisBlock"]):
    """Maps ws to images through blocks b4, b8, ... of doubling resolution.

    Attributes:
        num_ws: styles that one image takes: one per convolution and one for the last toRGB. The toRGB of a block in
            between shares its style with the next block's first convolution. A smaller image takes the first of them.
    """

    def __init__(
        self,
        levels: Levels,
        w_dim: int,
        img_channels: int,
        architecture: str,
        conv_clamp: float | None,
        alpha: float,
    ) -> None:
        super().__init__(levels, alpha, torgb_styles=1)
        self.architecture = architecture
        for res in levels.resolutions:
            block = SynthesisBlock(levels, res, w_dim, img_channels, architecture, conv_clamp)
            self.add_module(f"b{res}", block)
        self.num_ws = self.num_ws_at(levels.res)

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that an image of `res` pixels takes."""
        if self.architecture != "skip" and res < self.resolutions[-1]:
            raise UserError(f"g_architecture {self.architecture}: makes no image of {res} px; growing takes skip")
        return [*self.blocks(res)]  # fading or not: the image is a sum over all of them

    def forward(
        self,
        ws: torch.Tensor,
        noise_mode: str = "random",
        noise: torch.Tensor | None = None,
        res: int | None = None,
        alpha: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return img [N, img_channels, res, res] float32, channels_last; the arguments are those of Synthesis."""
        alpha, noises = self.prepared(ws, noise_mode, noise, res, alpha)
        blocks = self.blocks(res)
        styles = self._styles(ws, blocks)
        x: torch.Tensor | None = None
        img: torch.Tensor | None = None
        for i, block in enumerate(blocks):
            own = [next(noises) for _ in block.layers()]
            next_style = styles[i + 1].layers[0].style if i + 1 < len(styles) else None
            x, img = block(x, img, styles[i], own, next_style, alpha if block is blocks[-1] else None)
        assert img is not None
        return img

    def _styles(self, ws: torch.Tensor, blocks: Sequence[SynthesisBlock]) -> list[BlockStyles]:
        """Return what ws make of the blocks."""
        w_of = ws.unbind(dim=1)
        styles = []
        first = 0
        for block in blocks:
            styles.append(block.modulate(w_of[first : first + len(block.layers()) + 1]))
            first += len(block.layers())
        return styles


class BlockStyles(NamedTuple):
    """What the styles make of a block: of each convolution, and ToRGB's weights [N, img_channels, C] if it has one."""

    layers: list[Modulation]
    rgb_weight: torch.Tensor | None


class SynthesisBlock(nn.Module):
    """The layers of one resolution."""

    resample_filter: torch.Tensor

    def __init__(
        self,
        levels: Levels,
        res: int,
        w_dim: int,
        img_channels: int,
        architecture: str,
        conv_clamp: float | None,
    ) -> None:
        super().__init__()
        self.dtype = levels.dtypes[res]
        self.first = res == LOWEST_RES
        channels = levels.channels[res]
        residual = architecture == "resnet" and not self.first
        if self.first:
            self.const = nn.Parameter(torch.randn(channels, res, res))
        else:
            below = levels.channels[res // 2]
            self.conv0 = SynthesisLayer(below, channels, w_dim=w_dim, res=res, up=2, conv_clamp=conv_clamp)
        gain = _RESIDUAL_GAIN if residual else 1
        self.conv1 = SynthesisLayer(channels, channels, w_dim=w_dim, res=res, gain=gain, conv_clamp=conv_clamp)
        self.torgb = (
            ToRGB(channels, img_channels, w_dim=w_dim, conv_clamp=conv_clamp)
            if architecture == "skip" or res == levels.res
            else None
        )
        self.skip = UpsampleConv1x1(below, channels, gain=_RESIDUAL_GAIN) if residual else None
        self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def layers(self) -> list[SynthesisLayer]:
        """Return the block's convolutions in the order of their styles and noise."""
        return [self.conv1] if self.first else [self.conv0, self.conv1]

    def modulate(self, ws: tuple[torch.Tensor, ...]) -> BlockStyles:
        """Return what ws make of the block: one [N, w_dim] per convolution, and one for toRGB."""
        layers = [layer.modulate(w, self.dtype) for layer, w in zip(self.layers(), ws, strict=False)]
        return BlockStyles(layers, None if self.torgb is None else self.torgb.modulate(ws[-1]))

    def forward(
        self,
        x: torch.Tensor | None,
        img: torch.Tensor | None,
        styles: BlockStyles,
        noises: list[torch.Tensor | None],
        next_style: torch.Tensor | None,
        alpha: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return activations [N, C, res, res] and image [N, img_channels, res, res] of those at half the size.

        Every layer multiplies its output by the style of the next one, `next_style` being that of the next block's
        first. Where a residual connection reads x, x comes and goes without.

        Args:
            x, img: of the block before; None for the first.
            styles: of this block.
            noises: one [N or 1, 1, res, res] per convolution, or None.
            next_style: [N, C], None behind the last block.
            alpha: [] float32, how far this block's share of the image is faded in; None: wholly.
        """
        x = self.const * _per_channel(styles.layers[0]) if x is None else x
        x = to_channels_last(x, self.dtype)
        if self.skip is None:
            x, rgb = self._convolve(x, styles, noises, next_style, styles.rgb_weight)
        else:
            shortcut = self.skip(x)
            x, _ = self._convolve(x * _per_channel(styles.layers[0]).to(x.dtype), styles, noises, None, None)
            x = shortcut.add_(x)  # in place: nobody reads the shortcut again
            rgb = None if styles.rgb_weight is None else per_pixel_dot(x, styles.rgb_weight)
        if img is not None:
            img = upsample2d(img, self.resample_filter)
        if self.torgb is not None and rgb is not None:
            rgb = self.torgb(rgb)
            grown = rgb if img is None else img + rgb
            img = grown if img is None or alpha is None else img.lerp(grown, alpha)
        return x, img

    def _convolve(
        self,
        x: torch.Tensor,
        styles: BlockStyles,
        noises: list[torch.Tensor | None],
        next_style: torch.Tensor | None,
        rgb_weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the convolutions on x, which comes with the first one's style."""
        if not self.first:
            x, _ = self.conv0(x, styles.layers[0], noises[0], styles.layers[1].style)
        return self.conv1(x, styles.layers[-1], noises[-1], next_style, rgb_weight)


def _per_channel(modulation: Modulation) -> torch.Tensor:
    return modulation.style[:, :, None, None]


class Discriminator(PyramidDiscriminator):
    """Maps images to logits, positive for real, through blocks of halving resolution."""

    resample_filter: torch.Tensor

    def __init__(
        self,
        res: int,
        *,
        img_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: str = "resnet",
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
        grows: bool = False,
        spectral_norm: bool = False,
        **head: Unpack[HeadOptions],
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            res, img_channels, channel_base, channel_max, half_levels, half_dtype: as Generator.
            architecture: resnet (residual blocks), skip (fromRGB at every resolution) or orig.
            grows, spectral_norm: as PyramidDiscriminator.
            head: options of the last block and of labels; `conv_clamp` holds for all blocks.
        """
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)

        def make_block(fromrgb: Conv2d | None, r: int) -> DiscriminatorBlock:
            return DiscriminatorBlock(fromrgb, levels, r, architecture, head.get("conv_clamp"))

        super().__init__(
            levels,
            make_block,
            img_channels=img_channels,
            architecture=_checked(architecture),
            grows=grows,
            spectral_norm=spectral_norm,
            **head,
        )
        since = {"grows": grows, "spectral_norm": spectral_norm}  # files without them stay as they always were
        self.config = {
            "res": res,
            "img_channels": img_channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "architecture": architecture,
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
            **head_config(head),
            **{name: True for name, wanted in since.items() if wanted},
        }
        self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def downsample(self, img: torch.Tensor) -> torch.Tensor:
        """Return img [N, C, H, W] at half the size, filtered."""
        return downsample2d(img, self.resample_filter)

    def upsample(self, img: torch.Tensor) -> torch.Tensor:
        """Return img [N, C, H, W] at twice the size, filtered."""
        return upsample2d(img, self.resample_filter)


class DiscriminatorBlock(nn.Module):
    """The layers of one resolution above 4 px, which halve it."""

    def __init__(
        self, fromrgb: Conv2d | None, levels: Levels, res: int, architecture: str, conv_clamp: float | None
    ) -> None:
        super().__init__()
        self.dtype = levels.dtypes[res]
        channels, below = levels.channels[res], levels.channels[res // 2]
        residual = architecture == "resnet"
        self.fromrgb = fromrgb
        self.conv0 = Conv2d(channels, channels, 3, act="lrelu", conv_clamp=conv_clamp)
        gain = _RESIDUAL_GAIN if residual else 1
        self.conv1 = Conv2d(channels, below, 3, act="lrelu", down=2, gain=gain, conv_clamp=conv_clamp)
        self.skip = Conv2d(channels, below, 1, bias=False, down=2, gain=_RESIDUAL_GAIN) if residual else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map activations [N, C, res, res], the image's features among them, to [N, C, res / 2, res / 2]."""
        shortcut = None if self.skip is None else self.skip(x)
        x = self.conv1(self.conv0(x, blur=self.conv1.resample_filter), blurred=True)
        return x if shortcut is None else shortcut.add_(x)  # in place: nobody reads the shortcut again


def _checked(architecture: str) -> str:
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
    return architecture
