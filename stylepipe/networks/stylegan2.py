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
from stylepipe.networks.head import DiscriminatorEpilogue, HeadOptions, Judgement, head_config, label_mapping
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
from stylepipe.networks.spectral import add_spectral_norm_

ARCHITECTURES = ("skip", "resnet", "orig")
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
            if c_dim == 0:
                raise UserError("class_w_avg: expected a network with labels, found c_dim 0")
            self.config["class_w_avg"] = True
        if alpha < 1:
            self.config["alpha"] = alpha
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self.synthesis = SynthesisNetwork(levels, w_dim, img_channels, _checked(architecture), conv_clamp, alpha)
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
        super().__init__()
        self.resolutions, self.architecture, self.alpha = levels.resolutions, architecture, alpha
        for res in levels.resolutions:
            block = SynthesisBlock(levels, res, w_dim, img_channels, architecture, conv_clamp)
            self.add_module(f"b{res}", block)
        self.num_ws = self.num_ws_at(levels.res)

    def blocks(self, res: int | None = None) -> list[SynthesisBlock]:
        """Return the blocks from 4 px up to `res`, by default all."""
        return [getattr(self, f"b{r}") for r in self.resolutions if res is None or r <= res]

    def num_ws_at(self, res: int) -> int:
        """Return how many of the styles an image of `res` pixels takes."""
        return sum(len(block.layers()) for block in self.blocks(res)) + 1

    def noise_size(self, res: int | None = None) -> int:
        """Return how many random numbers one image of `res` pixels takes, by default one of the full size."""
        return sum(layer.res**2 for block in self.blocks(res) for layer in block.layers())

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
        """Return img [N, img_channels, res, res] float32, channels_last.

        Args:
            ws: [N, num_ws, w_dim] float32.
            noise_mode: random (fresh, or taken from `noise`), const (the buffers noise_const) or none.
            noise: [N, noise_size(res)] float32 normal, used when noise_mode is random; None draws it here.
            res: size of the image while the network grows, by default the full one.
            alpha: [] float32, how far the last level is faded in; None: wholly, unless the network says less.
        """
        if alpha is None and self.alpha < 1:
            alpha = torch.tensor(self.alpha, device=ws.device)
        if noise_mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode {noise_mode!r}: expected random, const or none")
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(f"ws of shape {list(ws.shape)}: expected [N, {self.num_ws}, w_dim]")
        if noise_mode == "random" and noise is None:
            noise = torch.randn(ws.shape[0], self.noise_size(res), device=ws.device)
        blocks = self.blocks(res)
        styles = self._styles(ws, blocks)
        x: torch.Tensor | None = None
        img: torch.Tensor | None = None
        first_noise = 0
        for i, block in enumerate(blocks):
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
            x, img = block(x, img, styles[i], noises, next_style, alpha if block is blocks[-1] else None)
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


class Discriminator(nn.Module):
    """Maps images to logits, positive for real, through blocks of halving resolution.

    One that grows (Karras et al. 2018, arXiv:1710.10196, section 2) takes images of any of its resolutions; each has a
    fromRGB of its own.
    """

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
            grows: take images of lower resolutions too.
            spectral_norm: divide all weights by their largest singular value (Miyato et al. 2018, arXiv:1802.05957).
            head: options of the last block and of labels; `conv_clamp` holds for all blocks.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "res": res,
            "img_channels": img_channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "architecture": architecture,
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
            **head_config(head),
        }
        if grows:  # files without it stay as they always were
            self.config["grows"] = True
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        conv_clamp, channels = head.get("conv_clamp"), levels.channels
        self.resolutions, self.grows, self.architecture = levels.resolutions, grows, _checked(architecture)

        def fromrgb(r: int) -> Conv2d | None:
            if architecture == "skip" or grows or r == res:
                return Conv2d(img_channels, channels[r], 1, act="lrelu", conv_clamp=conv_clamp)
            return None

        for r in reversed(levels.resolutions[1:]):
            self.add_module(f"b{r}", DiscriminatorBlock(fromrgb(r), levels, r, architecture, conv_clamp))
        lowest = channels[LOWEST_RES]
        self.mapping = label_mapping(head.get("c_dim", 0), head.get("conditioning", "projection"), lowest)
        self.b4 = DiscriminatorEpilogue(fromrgb(LOWEST_RES), lowest, **head)
        self.register_buffer("resample_filter", resample_filter(), persistent=False)
        if spectral_norm:
            self.config["spectral_norm"] = True
            add_spectral_norm_(self)

    def forward(
        self, img: torch.Tensor, c: torch.Tensor | None = None, alpha: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits [N, 1] float32 of img [N, img_channels, res, res] and c [N, c_dim]; `alpha` as in `judge`."""
        return self.judge(img, c, alpha).logits

    def judge(self, img: torch.Tensor, c: torch.Tensor | None = None, alpha: torch.Tensor | None = None) -> Judgement:
        """Return all that the last block says of the images.

        Args:
            img: [N, img_channels, R, R] float32, R a resolution of this network; the full one unless it grows.
            c: [N, c_dim] float32.
            alpha: [] float32, how far the first level that sees the image is faded in, the next seeing it at half the
                size; None: wholly.
        """
        res, full = img.shape[-1], self.resolutions[-1]
        if img.ndim != 4 or img.shape[2] != res or (res != full and not (self.grows and res in self.resolutions)):
            raise ValueError(f"img of shape {list(img.shape)}: expected [N, C, {full}, {full}]")
        img = to_channels_last(img, torch.float32)
        x: torch.Tensor | None = None
        for r in reversed([r for r in self.resolutions[1:] if r <= res]):
            block: DiscriminatorBlock = getattr(self, f"b{r}")
            x = block(self._enter(r, x, img, block.dtype))
            fades = alpha is not None and r == res
            if fades or self.architecture == "skip":
                img = downsample2d(img, self.resample_filter)
            if fades:
                assert alpha is not None
                x = self._faded(r // 2, x, img, alpha)
        cmap = None if self.mapping is None else self.mapping(None, c)
        judgement: Judgement = self.b4(self._enter(LOWEST_RES, x, img, torch.float32), cmap)
        return judgement

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that see an image of `res` pixels."""
        entered = [r for r in self.resolutions if r == res or (r < res and self.architecture == "skip")]
        entered += [res // 2] if fading and res // 2 not in entered else []
        blocks = [getattr(self, f"b{r}") for r in self.resolutions if r <= res]
        modules = [child for block in blocks for name, child in block.named_children() if name != "fromrgb"]
        modules += [getattr(self, f"b{r}").fromrgb for r in entered]
        return modules + ([] if self.mapping is None else [self.mapping])

    def at_half(self, img: torch.Tensor) -> torch.Tensor:
        """Return img [N, C, H, W] without what a level of half its size has not, by the filters of both networks."""
        return upsample2d(downsample2d(img, self.resample_filter), self.resample_filter)

    def _enter(self, res: int, x: torch.Tensor | None, img: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the input of a level in its type: x, the image's features, or their sum."""
        if x is not None and self.architecture != "skip":
            return to_channels_last(x, dtype)
        features = to_channels_last(self._fromrgb(res, img), dtype)
        return features if x is None else to_channels_last(x, dtype) + features

    def _faded(self, res: int, x: torch.Tensor, img: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """Fade x, of the level above, into what the level of `res` pixels would make of the image without it.

        In float32, which rounds neither, so that alpha 0 and 1 are exact.
        """
        x = to_channels_last(x, torch.float32)
        if self.architecture == "skip":
            return x * alpha  # the image's features are added anyway
        return self._fromrgb(res, img).lerp(x, alpha)

    def _fromrgb(self, res: int, img: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = getattr(self, f"b{res}").fromrgb(img)  # in float32
        return features


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
