"""DCGAN, the plain baseline.

Radford et al. 2016, arXiv:1511.06434, section 3 and Fig. 1. The paper's is 64 px; other sizes have more or fewer layers
of the same kind. Images are [N, img_channels, res, res] float32 in [-1, 1] at the borders of both networks.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import nn

from stylepipe.errors import UserError
from stylepipe.kernels import bias_act, conv2d
from stylepipe.networks.head import HEAD_RES, HeadOptions, Judgement, head_config
from stylepipe.networks.levels import LOWEST_RES, Levels, half_dtype_name
from stylepipe.networks.norms import BatchNorm2d, VirtualBatchNorm2d, at_least_float32
from stylepipe.networks.plain import (
    Conv2d,
    LabelEmbedding,
    PlainDiscriminator,
    PlainGenerator,
    PlainHead,
    activations,
    plain_stddev,
)
from stylepipe.networks.spectral import add_spectral_norm_

G_NORMS = ("batch", "virtual", "none")
D_NORMS = ("batch", "none")
CHANNEL_BASE = 4096
CHANNEL_MAX = 1024
_STD = 0.02  # of all weights at the start: section 4
_SMALLEST_RES = 8


class Generator(PlainGenerator):
    """Maps latents to images: transposed 4x4 convolutions of stride 2, each with normalisation and ReLU, and tanh."""

    reference_z: torch.Tensor
    reference_c: torch.Tensor | None

    def __init__(
        self,
        res: int,
        *,
        z_dim: int = 100,
        c_dim: int = 0,
        img_channels: int = 3,
        channel_base: int = CHANNEL_BASE,
        channel_max: int = CHANNEL_MAX,
        norm: str = "batch",
        reference_size: int = 64,
        conv_clamp: float | None = None,
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            res: image size in pixels, a power of two from 8.
            z_dim, c_dim: sizes of latent (normal; the paper's is uniform) and label, 0 for none.
            img_channels: colours.
            channel_base, channel_max: resolution r has min(channel_base / r, channel_max) channels; in the paper 1024
                at 4 px, 128 at 32 px.
            norm: batch, virtual (by a reference batch drawn here, in training and later) or none.
            reference_size: images of that reference batch.
            conv_clamp: limit of activations, meant for float16; None for none.
            half_levels, half_dtype: how many of the highest resolutions run in float16 or bfloat16.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "res": res,
            "z_dim": z_dim,
            "c_dim": c_dim,
            "img_channels": img_channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "norm": _checked_norm(norm, G_NORMS),
            "reference_size": reference_size,
            "conv_clamp": conv_clamp,
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
        }
        self.z_dim, self.c_dim = z_dim, c_dim
        self.resolutions = [_checked_res(res)]
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self._levels, self._references = levels.resolutions, reference_size if norm == "virtual" else 0
        self.embed = LabelEmbedding(c_dim, z_dim) if c_dim else None
        below = 2 * z_dim if c_dim else z_dim
        for r in levels.resolutions:
            last = r == res
            conv = ConvTranspose2d(
                below,
                img_channels if last else levels.channels[r],
                stride=1 if r == LOWEST_RES else 2,
                bias=last or norm == "none",
            )
            act, kind = ("tanh", "none") if last else ("relu", norm)
            self.add_module(f"b{r}", _Layer(conv, kind, act, levels.dtypes[r], conv_clamp, reference_size))
            below = levels.channels[r]
        if norm == "virtual":
            self.register_buffer("reference_z", torch.randn(reference_size, z_dim))
            classes = torch.randint(max(c_dim, 1), (reference_size,))
            self.register_buffer("reference_c", F.one_hot(classes, c_dim).float() if c_dim else None)

    def make(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        """See PlainGenerator."""
        if self._references:
            z = torch.cat([self.reference_z, z])
            c = torch.cat([self.reference_c, c]) if self.reference_c is not None and c is not None else c
        x = (z if self.embed is None else self.embed(z, c))[:, :, None, None]
        for r in self._levels[:-1]:
            x = self.get_submodule(f"b{r}")(x)
        return at_least_float32(self.get_submodule(f"b{self._levels[-1]}")(x[self._references :]))


class Discriminator(PlainDiscriminator):
    """Maps images to logits, positive for real: 4x4 convolutions of stride 2 with normalisation and leaky ReLU."""

    def __init__(
        self,
        res: int,
        *,
        img_channels: int = 3,
        channel_base: int = CHANNEL_BASE,
        channel_max: int = CHANNEL_MAX,
        norm: str = "batch",
        half_levels: int = 0,
        half_dtype: str | torch.dtype | None = None,
        spectral_norm: bool = False,
        **head: Unpack[HeadOptions],
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            res, img_channels, channel_base, channel_max, half_levels, half_dtype: as Generator.
            norm: batch (except in the first layer, as in the paper) or none.
            spectral_norm: divide all weights by their largest singular value (Miyato et al. 2018, arXiv:1802.05957).
            head: options of the last layer and of labels; `mbstd_channels` is 0 unless given, `conv_clamp` holds for
                all layers.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "res": res,
            "img_channels": img_channels,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "norm": _checked_norm(norm, D_NORMS),
            "half_levels": half_levels,
            "half_dtype": half_dtype_name(half_dtype),
            **head_config({"mbstd_channels": 0, **head}),
        }
        self.resolutions = [_checked_res(res)]
        levels = Levels(res, channel_base, channel_max, half_levels, half_dtype)
        self._levels = levels.resolutions[:0:-1]
        x_channels = img_channels
        for r in self._levels:
            kind = "none" if r == res else norm
            conv = Conv2d(x_channels, levels.channels[r // 2], 4, stride=2, padding=1, bias=kind == "none", std=_STD)
            self.add_module(f"b{r}", _Layer(conv, kind, "lrelu", levels.dtypes[r], head.get("conv_clamp")))
            x_channels = levels.channels[r // 2]
        self.mbstd = plain_stddev(x_channels, head)
        self.b4 = PlainHead((x_channels + self.mbstd.num_channels) * HEAD_RES**2, std=_STD, **head)
        if spectral_norm:
            self.config["spectral_norm"] = True
            add_spectral_norm_(self)

    def look(self, img: torch.Tensor, c: torch.Tensor | None) -> Judgement:
        """See PlainDiscriminator; features are the activations at 4 px, whose 4x4 convolution the logits are."""
        x = img
        for r in self._levels:
            x = self.get_submodule(f"b{r}")(x)
        judgement: Judgement = self.b4(self.mbstd(at_least_float32(x)).flatten(1), c)
        return judgement


class _Layer(nn.Module):
    """Convolution, normalisation or bias, and activation, in the type of one resolution."""

    def __init__(
        self,
        conv: Conv2d | ConvTranspose2d,
        norm: str,
        act: str,
        dtype: torch.dtype,
        clamp: float | None,
        reference_size: int = 0,
    ) -> None:
        super().__init__()
        self.conv, self.dtype, self._act, self._clamp = conv, dtype, act, clamp
        self.norm: BatchNorm2d | VirtualBatchNorm2d | None = None
        if norm == "batch":
            self.norm = BatchNorm2d(conv.out_channels)
        elif norm == "virtual":
            self.norm = VirtualBatchNorm2d(conv.out_channels, reference_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, C, H, W] to activations of another size."""
        x = self.conv(activations(x, self.dtype))
        if self._act == "tanh":  # the image, whose rounding to half precision would show
            x = at_least_float32(x)
        if self.norm is not None:
            x = self.norm(x)
        return bias_act(x, self.conv.bias, act=self._act, gain=1, clamp=self._clamp)


class ConvTranspose2d(nn.Module):
    """Transposed 4x4 convolution in the type of x: 1 px to 4, or with stride 2 to twice the size; bias as Conv2d."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, bias: bool) -> None:
        super().__init__()
        self.out_channels, self._stride = out_channels, stride
        self.weight = nn.Parameter(torch.randn(in_channels, out_channels, 4, 4) * _STD)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, in_channels, H, W] to [N, out_channels, 2H, 2W], or [N, in_channels, 1, 1] to 4 px."""
        return conv2d(x, self.weight.to(x.dtype), stride=self._stride, padding=self._stride - 1, transposed=True)


def _checked_res(res: int) -> int:
    if res < _SMALLEST_RES:
        raise UserError(f"res {res}: expected a power of two from {_SMALLEST_RES} up, such as 64 or 256")
    return res


def _checked_norm(norm: str, accepted: tuple[str, ...]) -> str:
    if norm not in accepted:
        raise UserError(f"norm {norm!r}: expected one of {', '.join(accepted)}")
    return norm
