"""StyleGAN: generator and discriminator, which grow as ProGAN's do.

Karras et al. 2019, arXiv:1812.04948 (generator: section 2 and Fig. 1b; both networks: appendix C). Images are
[N, img_channels, res, res] float32 in [-1, 1] at the borders of both networks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from stylepipe.kernels import bias_act, conv2d, upfirdn2d
from stylepipe.networks import progan, stylegan2
from stylepipe.networks.layers import Conv2d, Linear, resample_filter, to_channels_last
from stylepipe.networks.levels import Levels, half_dtype_name, used_modules
from stylepipe.networks.mapping import MappingNetwork
from stylepipe.networks.progan import enlarge, to_rgb
from stylepipe.networks.style_based import StyleGenerator, Synthesis

_INSTANCE_NORM_EPS = 1e-8


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
        channel_base: int = 16384,
        channel_max: int = 512,
        mapping_layers: int = 8,
        conv_clamp: float | None = None,
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
        class_w_avg: bool = False,
        alpha: float = 1,
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            res: size in pixels of the images of the grown network, a power of two from 4.
            z_dim, w_dim: sizes of latent and style.
            c_dim: number of labels, 0 for none.
            img_channels: colours.
            channel_base, channel_max: resolution r has min(channel_base / r, channel_max) channels.
            mapping_layers: depth of the mapping network.
            conv_clamp: limit of activations before their normalization, meant for float16; None for none.
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
            "conv_clamp": conv_clamp,
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
            "class_w_avg": class_w_avg,
            "alpha": alpha,
        }
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self.synthesis = SynthesisNetwork(levels, w_dim, img_channels, conv_clamp, alpha)
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.synthesis.num_ws, mapping_layers, class_w_avg)
        self.take_dimensions()


class SynthesisNetwork(Synthesis["SynthesisBlock"]):
    """Maps ws, two per resolution, to images through blocks of doubling resolution, each with a toRGB of its own."""

    def __init__(self, levels: Levels, w_dim: int, img_channels: int, conv_clamp: float | None, alpha: float) -> None:
        super().__init__(levels, alpha, torgb_styles=0)
        for r in levels.resolutions:
            self.add_module(f"b{r}", SynthesisBlock(levels, r, w_dim, img_channels, conv_clamp))
        self.num_ws = self.num_ws_at(levels.res)

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that an image of `res` pixels takes."""
        return used_modules(self, self.resolutions, res, "torgb", {res, res // 2} if fading else {res})

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
        blocks, w_of = self.blocks(res), iter(ws.unbind(dim=1))
        x: torch.Tensor | None = None
        before: torch.Tensor | None = None
        for block in blocks:
            if x is not None and block is blocks[-1] and alpha is not None:
                before = enlarge(to_rgb(blocks[-2].torgb, x))
            for layer in block.layers():
                x = layer(x, next(w_of), next(noises))
        assert x is not None
        img = to_rgb(blocks[-1].torgb, x)
        return img if before is None or alpha is None else before.lerp(img, alpha)


class SynthesisBlock(nn.Module):
    """The layers of one resolution."""

    def __init__(self, levels: Levels, res: int, w_dim: int, img_channels: int, conv_clamp: float | None) -> None:
        super().__init__()
        channels, below = levels.channels[res], levels.channels.get(res // 2)
        dtype = levels.dtypes[res]
        self.layer0 = SynthesisLayer(below, channels, w_dim=w_dim, res=res, up=2, dtype=dtype, conv_clamp=conv_clamp)
        self.layer1 = SynthesisLayer(channels, channels, w_dim=w_dim, res=res, dtype=dtype, conv_clamp=conv_clamp)
        self.torgb = Conv2d(channels, img_channels, 1)

    def layers(self) -> list[SynthesisLayer]:
        """Return the layers in the order of their styles and noise."""
        return [self.layer0, self.layer1]


class SynthesisLayer(nn.Module):
    """Convolution, noise, bias, leaky ReLU and AdaIN; the network's first has a learned constant for a convolution.

    AdaIN cancels any scale of what it normalizes: the gain of leaky ReLU is left out. Upsampling here is that of the
    paper, nearest neighbours and a blur [1, 2, 1] with the convolution between them. All three are one filter
    [1, 3, 3, 1] behind a transposed convolution, as in StyleGAN2, with a quarter of the products. Only the outermost
    pixels differ: the blur there reads what lies beyond the bounds of the image, not zeros.
    """

    noise_const: torch.Tensor
    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int,
        *,
        w_dim: int,
        res: int,
        up: int = 1,
        dtype: torch.dtype = torch.float32,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.res, self.up, self.dtype, self.first = res, up, dtype, in_channels is None
        self.affine = Linear(w_dim, 2 * out_channels)
        if in_channels is None:
            self.const = nn.Parameter(torch.ones(out_channels, res, res))  # appendix C
        else:
            self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
            self._weight_gain = 1 / math.sqrt(in_channels * 9)
        self.noise_strength = nn.Parameter(torch.zeros(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("noise_const", torch.randn(res, res))
        if in_channels is not None and up > 1:
            self.register_buffer("resample_filter", resample_filter(), persistent=False)
        self._clamp = conv_clamp

    def forward(self, x: torch.Tensor | None, w: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Return activations [N, out_channels, res, res] in this layer's type, channels_last.

        Args:
            x: [N, in_channels, res / up, res / up]; None where the constant is.
            w: [N, w_dim] float32.
            noise: [N or 1, 1, res, res] float32 of unit variance; None for none.
        """
        x = self.const.expand(len(w), -1, -1, -1) if x is None else self._convolve(to_channels_last(x, self.dtype))
        x = to_channels_last(x, x.dtype)
        if noise is not None:
            x = torch.addcmul(x, noise.to(x.dtype), self.noise_strength.to(x.dtype)[:, None, None])
        x = bias_act(x, self.bias, act="lrelu", gain=1, clamp=self._clamp)
        scale, shift = self.affine(w).chunk(2, dim=1)
        return adaptive_instance_norm(x, 1 + scale, shift)

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight * self._weight_gain).to(x.dtype)
        if self.up == 1:
            return conv2d(x, weight, padding=1)
        x = conv2d(x, weight.flip([2, 3]).transpose(0, 1), stride=2, transposed=True)
        return upfirdn2d(x, self.resample_filter, padding=1, gain=4)


def adaptive_instance_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return AdaIN (Eq. 1): x [N, C, H, W] with the mean and deviation of each channel of each image replaced.

    Args:
        x: any floating type, which is the output's. The statistics are float32 (float64 for float64).
        scale, shift: [N, C] float32, the new deviation and mean.
    """
    y: torch.Tensor = _AdaptiveInstanceNorm.apply(x, scale[:, :, None, None], shift[:, :, None, None])
    return y


class _AdaptiveInstanceNorm(torch.autograd.Function):
    """With the gradient in closed form, in half of the passes over memory that autograd makes of the composition."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        mean, deviation, rstd = _statistics(x)
        ctx.save_for_backward(x, scale, mean, rstd)
        return torch.addcmul(shift, deviation, rstd * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, scale, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # which differentiates by what it sees made of x
            _, deviation, rstd = _statistics(x)
        else:
            deviation = x - mean
        dshift = dy.sum(dim=(2, 3), keepdim=True, dtype=deviation.dtype)
        dscale = (dy * deviation).sum(dim=(2, 3), keepdim=True) * rstd
        gain = rstd * scale
        share = gain / (x.shape[2] * x.shape[3])
        dx = torch.addcmul(-share * dshift, dy.to(deviation.dtype), gain)
        return torch.addcmul(dx, deviation, -share * rstd * dscale).to(x.dtype), dscale, dshift


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mean [N, C, 1, 1], the deviations from it [N, C, H, W] and 1 / their root mean square [N, C, 1, 1]."""
    mean = x.mean(dim=(2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    deviation = x - mean
    variance = deviation.square().mean(dim=(2, 3), keepdim=True)
    return mean, deviation, (variance + _INSTANCE_NORM_EPS).rsqrt()


class Discriminator(progan.Discriminator):
    """ProGAN's with the blur [1, 2, 1] before downsampling.

    Blur and 2x2 mean are one filter [1, 3, 3, 1] in front of a convolution of stride 2: the block is StyleGAN2's
    without its shortcut. Only the outermost pixels differ, for the second convolution here reads on beyond the bounds.
    """

    @staticmethod
    def make_block(
        fromrgb: Conv2d | None, levels: Levels, res: int, conv_clamp: float | None
    ) -> stylegan2.DiscriminatorBlock:
        """Return the layers of a resolution above 4 px."""
        return stylegan2.DiscriminatorBlock(fromrgb, levels, res, "orig", conv_clamp)
