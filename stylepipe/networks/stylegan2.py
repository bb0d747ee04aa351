"""StyleGAN2: generator and discriminator.

Karras et al. 2020, arXiv:1912.04958 (architecture: section 4, Fig. 7); precision as in Karras et al. 2020,
arXiv:2006.06676, appendix D. Images are [N, img_channels, res, res] float32 in [-1, 1] at the borders of both networks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from stylepipe.errors import UserError
from stylepipe.kernels import downsample2d, per_pixel_dot, upsample2d
from stylepipe.networks.layers import (
    Conv2d,
    Linear,
    MinibatchStdDev,
    Modulation,
    SynthesisLayer,
    ToRGB,
    UpsampleConv1x1,
    resample_filter,
    to_channels_last,
)
from stylepipe.networks.levels import LOWEST_RES, Levels, half_dtype_name
from stylepipe.networks.mapping import MappingNetwork

ARCHITECTURES = ("skip", "resnet", "orig")
CONDITIONINGS = ("projection", "aux", "both")
_RESIDUAL_GAIN = math.sqrt(0.5)


class Generator(nn.Module):
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
            if c_dim == 0:
                raise UserError("class_w_avg: expected a network with labels, found c_dim 0")
            self.config["class_w_avg"] = True
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self.synthesis = SynthesisNetwork(levels, w_dim, img_channels, _checked(architecture), conv_clamp)
        self.z_dim, self.w_dim, self.c_dim, self.num_ws = z_dim, w_dim, c_dim, self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, mapping_layers, class_w_avg)

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
    ) -> torch.Tensor:
        """Return img [N, img_channels, res, res] float32, about in [-1, 1], of z [N, z_dim] and c [N, c_dim]."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), noise_mode=noise_mode)


class SynthesisNetwork(nn.Module):
    """Maps ws to images through blocks b4, b8, ... of doubling resolution.

    Attributes:
        num_ws: styles that one image takes: one per convolution and one for the last toRGB. The toRGB of a block in
            between shares its style with the next block's first convolution.
        noise_size: random numbers that one image takes.
    """

    def __init__(
        self, levels: Levels, w_dim: int, img_channels: int, architecture: str, conv_clamp: float | None
    ) -> None:
        super().__init__()
        self.resolutions = levels.resolutions
        for res in levels.resolutions:
            block = SynthesisBlock(levels, res, w_dim, img_channels, architecture, conv_clamp)
            self.add_module(f"b{res}", block)
        self.num_ws = sum(len(block.layers()) for block in self.blocks()) + 1
        self.noise_size = sum(layer.res**2 for block in self.blocks() for layer in block.layers())

    def blocks(self) -> list[SynthesisBlock]:
        """Return the blocks from 4 px up."""
        return [getattr(self, f"b{res}") for res in self.resolutions]

    def forward(self, ws: torch.Tensor, noise_mode: str = "random", noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return img [N, img_channels, res, res] float32, channels_last.

        Args:
            ws: [N, num_ws, w_dim] float32.
            noise_mode: random (fresh, or taken from `noise`), const (the buffers noise_const) or none.
            noise: [N, noise_size] float32 normal, used when noise_mode is random; None draws it here.
        """
        if noise_mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode {noise_mode!r}: expected random, const or none")
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(f"ws of shape {list(ws.shape)}: expected [N, {self.num_ws}, w_dim]")
        if noise_mode == "random" and noise is None:
            noise = torch.randn(ws.shape[0], self.noise_size, device=ws.device)
        styles = self._styles(ws)
        x: torch.Tensor | None = None
        img: torch.Tensor | None = None
        first_noise = 0
        for i, block in enumerate(self.blocks()):
            noises: list[torch.Tensor | None] = []
            for layer in block.layers():
                if noise_mode == "random":
                    assert noise is not None
                    flat = noise[:, first_noise : first_noise + layer.res**2]
                    noises.append(flat.view(-1, 1, layer.res, layer.res))
                    first_noise += layer.res**2
                else:
                    noises.append(layer.noise_const[None, None] if noise_mode == "const" else None)
            next_style = styles[i + 1].layers[0].style if i + 1 < len(styles) else None
            x, img = block(x, img, styles[i], noises, next_style)
        assert img is not None
        return img

    def _styles(self, ws: torch.Tensor) -> list[BlockStyles]:
        """Return what ws make of every block."""
        w_of = ws.unbind(dim=1)
        styles = []
        first = 0
        for block in self.blocks():
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return activations [N, C, res, res] and image [N, img_channels, res, res] of those at half the size.

        Every layer multiplies its output by the style of the next one, `next_style` being that of the next block's
        first. Where a residual connection reads x, x comes and goes without.

        Args:
            x, img: of the block before; None for the first.
            styles: of this block.
            noises: one [N or 1, 1, res, res] per convolution, or None.
            next_style: [N, C], None behind the last block.
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
            img = rgb if img is None else img + rgb
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


class Discriminator(nn.Module):
    """Maps images to logits, positive for real, through blocks of halving resolution.

    With labels, the logits are a projection of the last features onto an embedding of the label (Miyato & Koyama 2018,
    arXiv:1802.05637), or an auxiliary classifier tells the class from the features before the last layer (Odena et al.
    2016, arXiv:1610.09585), or both.
    """

    def __init__(
        self,
        res: int,
        *,
        c_dim: int = 0,
        img_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: str = "resnet",
        mbstd_group_size: int = 4,
        mbstd_channels: int = 1,
        conv_clamp: float | None = None,
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
        conditioning: str = "projection",
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            mbstd_group_size: images per group of the minibatch standard deviation, at most the batch; must divide it.
            mbstd_channels: channels that it appends, a divisor of those at 4 px; 0 switches it off.
            res, c_dim, img_channels, channel_base, channel_max, conv_clamp, half_levels, half_dtype: as Generator.
            architecture: resnet (residual blocks), skip (fromRGB at every resolution) or orig.
            conditioning: what labels do: projection, aux (logits do not see them; a classifier is added) or both.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "res": res,
            "c_dim": c_dim,
            "img_channels": img_channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "architecture": architecture,
            "mbstd_group_size": mbstd_group_size,
            "mbstd_channels": mbstd_channels,
            "conv_clamp": conv_clamp,
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
        }
        if conditioning not in CONDITIONINGS:
            raise UserError(f"conditioning {conditioning!r}: expected one of {', '.join(CONDITIONINGS)}")
        if conditioning != "projection":  # files without it stay as they always were
            if c_dim == 0:
                raise UserError(f"conditioning {conditioning!r}: expected a network with labels, found c_dim 0")
            self.config["conditioning"] = conditioning
        projected = c_dim > 0 and conditioning != "aux"
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self.resolutions = levels.resolutions
        for r in reversed(levels.resolutions[1:]):
            self.add_module(f"b{r}", DiscriminatorBlock(levels, r, img_channels, _checked(architecture), conv_clamp))
        cmap_dim = levels.channels[LOWEST_RES]
        if mbstd_channels and cmap_dim % mbstd_channels:
            raise UserError(
                f"mbstd_channels {mbstd_channels}: expected a divisor of the {cmap_dim} channels at 4 px, or 0 for none"
            )
        self.mapping = MappingNetwork(0, c_dim, cmap_dim, num_ws=None) if projected else None
        self.b4 = DiscriminatorEpilogue(
            levels,
            img_channels,
            _checked(architecture),
            MinibatchStdDev(mbstd_group_size, mbstd_channels),
            cmap_dim if projected else 0,
            conv_clamp,
            0 if conditioning == "projection" else c_dim,
        )

    def forward(self, img: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [N, 1] float32 of img [N, img_channels, res, res] and c [N, c_dim]."""
        return self.judge(img, c)[0]

    def judge(self, img: torch.Tensor, c: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the logits of `forward`, and the auxiliary classifier's [N, c_dim] float32; None without it."""
        res = self.resolutions[-1]
        if img.ndim != 4 or img.shape[2:] != (res, res):
            raise ValueError(f"img of shape {list(img.shape)}: expected [N, C, {res}, {res}]")
        x: torch.Tensor | None = None
        img = to_channels_last(img, torch.float32)
        for r in reversed(self.resolutions[1:]):
            x, img = getattr(self, f"b{r}")(x, img)
        cmap = None if self.mapping is None else self.mapping(None, c)
        return self.b4(x, img, cmap)


class DiscriminatorBlock(nn.Module):
    """The layers of one resolution above 4 px, which halve it."""

    resample_filter: torch.Tensor

    def __init__(
        self, levels: Levels, res: int, img_channels: int, architecture: str, conv_clamp: float | None
    ) -> None:
        super().__init__()
        self.dtype = levels.dtypes[res]
        self.passes_image_on = architecture == "skip"
        channels, below = levels.channels[res], levels.channels[res // 2]
        residual = architecture == "resnet"
        self.fromrgb = (
            Conv2d(img_channels, channels, 1, act="lrelu", conv_clamp=conv_clamp)
            if architecture == "skip" or res == levels.res
            else None
        )
        self.conv0 = Conv2d(channels, channels, 3, act="lrelu", conv_clamp=conv_clamp)
        gain = _RESIDUAL_GAIN if residual else 1
        self.conv1 = Conv2d(channels, below, 3, act="lrelu", down=2, gain=gain, conv_clamp=conv_clamp)
        self.skip = Conv2d(channels, below, 1, bias=False, down=2, gain=_RESIDUAL_GAIN) if residual else None
        self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def forward(self, x: torch.Tensor | None, img: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return activations [N, C, res / 2, res / 2], and the image halved too where the next block reads it."""
        x = _add_rgb(x, img, self.fromrgb, self.dtype)
        shortcut = None if self.skip is None else self.skip(x)
        x = self.conv1(self.conv0(x, blur=self.conv1.resample_filter), blurred=True)
        if shortcut is not None:
            x = shortcut.add_(x)  # in place: nobody reads the shortcut again
        return x, downsample2d(img, self.resample_filter) if self.passes_image_on else img


class DiscriminatorEpilogue(nn.Module):
    """The last block, from 4x4 activations to logits, in float32."""

    def __init__(
        self,
        levels: Levels,
        img_channels: int,
        architecture: str,
        mbstd: MinibatchStdDev,
        cmap_dim: int,
        conv_clamp: float | None,
        num_classes: int,
    ) -> None:
        super().__init__()
        channels = levels.channels[LOWEST_RES]
        self.fromrgb = (
            Conv2d(img_channels, channels, 1, act="lrelu", conv_clamp=conv_clamp)
            if architecture == "skip" or levels.res == LOWEST_RES
            else None
        )
        self.mbstd = mbstd
        self.conv = Conv2d(channels + mbstd.num_channels, channels, 3, act="lrelu", conv_clamp=conv_clamp)
        self.fc = Linear(channels * LOWEST_RES**2, channels, act="lrelu")
        self.out = Linear(channels, cmap_dim or 1)
        self.aux = Linear(channels, num_classes) if num_classes else None
        self._cmap_gain = 1 / math.sqrt(max(cmap_dim, 1))

    def forward(
        self, x: torch.Tensor | None, img: torch.Tensor, cmap: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logits [N, 1] and the classifier's [N, num_classes], or None; cmap [N, cmap_dim] projects labels."""
        x = _add_rgb(x, img, self.fromrgb, torch.float32)
        x = self.conv(self.mbstd(x))
        features = self.fc(x.flatten(1))
        x = self.out(features)
        logits = x if cmap is None else (x * cmap).sum(dim=1, keepdim=True) * self._cmap_gain
        return logits, None if self.aux is None else self.aux(features)


def _add_rgb(x: torch.Tensor | None, img: torch.Tensor, fromrgb: Conv2d | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the block's input in its type: x, the image's features, or their sum. fromRGB is float32."""
    if fromrgb is None:
        assert x is not None
        return to_channels_last(x, dtype)
    features = to_channels_last(fromrgb(img), dtype)
    return features if x is None else to_channels_last(x, dtype) + features


def _checked(architecture: str) -> str:
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture {architecture!r}: expected one of {', '.join(ARCHITECTURES)}")
    return architecture
