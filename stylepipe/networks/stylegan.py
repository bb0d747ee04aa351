"""StyleGAN: generator and discriminator, which grow as ProGAN's do.

Karras et al. 2019, arXiv:1812.04948 (generator: section 2 and Fig. 1b; both networks: appendix C). Images are
[N, img_channels, res, res] float32 in [-1, 1] at the borders of both networks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from stylepipe.errors import UserError
from stylepipe.kernels import bias_act, conv2d, upfirdn2d
from stylepipe.networks import progan, stylegan2
from stylepipe.networks.layers import Conv2d, Linear, resample_filter, to_channels_last
from stylepipe.networks.levels import Levels, half_dtype_name
from stylepipe.networks.mapping import MappingNetwork
from stylepipe.networks.progan import enlarge, shown_at, to_rgb, used_modules

_INSTANCE_NORM_EPS = 1e-8


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
        if class_w_avg and c_dim == 0:
            raise UserError("class_w_avg: expected a network with labels, found c_dim 0")
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self.synthesis = SynthesisNetwork(levels, w_dim, img_channels, conv_clamp, alpha)
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
        img: torch.Tensor = self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), noise_mode=noise_mode)
        return img


class SynthesisNetwork(nn.Module):
    """Maps ws to images through blocks b4, b8, ... of doubling resolution, each with a toRGB of its own.

    Attributes:
        num_ws: styles that one image takes, two per resolution. A smaller image takes the first of them.
    """

    def __init__(self, levels: Levels, w_dim: int, img_channels: int, conv_clamp: float | None, alpha: float) -> None:
        super().__init__()
        self.resolutions, self.alpha = levels.resolutions, alpha
        for r in levels.resolutions:
            self.add_module(f"b{r}", SynthesisBlock(levels, r, w_dim, img_channels, conv_clamp))
        self.num_ws = self.num_ws_at(levels.res)

    def blocks(self, res: int | None = None) -> list[SynthesisBlock]:
        """Return the blocks from 4 px up to `res`, by default all."""
        return [getattr(self, f"b{r}") for r in self.resolutions if res is None or r <= res]

    def num_ws_at(self, res: int) -> int:
        """Return how many of the styles an image of `res` pixels takes."""
        return sum(len(block.layers()) for block in self.blocks(res))

    def noise_size(self, res: int | None = None) -> int:
        """Return how many random numbers one image of `res` pixels takes, by default one of the full size."""
        return sum(layer.res**2 for block in self.blocks(res) for layer in block.layers())

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that an image of `res` pixels takes."""
        return used_modules(self, [r for r in self.resolutions if r <= res], "torgb", shown_at(res, fading))

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
            alpha: [] float32, how far the last level is faded in over the enlarged image of the one before; None:
                wholly, unless the network says less.
        """
        if alpha is None and self.alpha < 1:
            alpha = torch.tensor(self.alpha, device=ws.device)
        if noise_mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode {noise_mode!r}: expected random, const or none")
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(f"ws of shape {list(ws.shape)}: expected [N, {self.num_ws}, w_dim]")
        if noise_mode == "random" and noise is None:
            noise = torch.randn(ws.shape[0], self.noise_size(res), device=ws.device)
        blocks, w_of = self.blocks(res), iter(ws.unbind(dim=1))
        x: torch.Tensor | None = None
        before: torch.Tensor | None = None
        first_noise = 0
        for block in blocks:
            if x is not None and block is blocks[-1] and alpha is not None:
                before = enlarge(to_rgb(blocks[-2].torgb, x))
            for layer in block.layers():
                if noise_mode == "random":
                    assert noise is not None
                    flat = noise[:, first_noise : first_noise + layer.res**2]
                    x = layer(x, next(w_of), flat.view(-1, 1, layer.res, layer.res))
                    first_noise += layer.res**2
                else:
                    x = layer(x, next(w_of), layer.noise_const[None, None] if noise_mode == "const" else None)
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
    def _block(
        fromrgb: Conv2d | None, levels: Levels, res: int, conv_clamp: float | None
    ) -> stylegan2.DiscriminatorBlock:
        return stylegan2.DiscriminatorBlock(fromrgb, levels, res, "orig", conv_clamp)
