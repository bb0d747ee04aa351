"""DCGAN, the plain baseline, and what networks without equalized learning rate share.

Radford et al. 2016, arXiv:1511.06434, section 3 and Fig. 1. The paper's is 64 px; other sizes have more or fewer layers
of the same kind. Images are [N, img_channels, res, res] float32 in [-1, 1] at the borders of both networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import nn

from stylepipe.errors import UserError
from stylepipe.kernels import bias_act, conv2d
from stylepipe.kernels.conv2d import _Convolution
from stylepipe.networks.head import (
    HEAD_RES,
    LAST_LAYERS,
    HeadOptions,
    Judgement,
    MinibatchDiscrimination,
    head_config,
    is_projected,
)
from stylepipe.networks.layers import MinibatchStdDev, normalize_second_moment, to_channels_last
from stylepipe.networks.levels import LOWEST_RES, Levels, half_dtype_name
from stylepipe.networks.norms import BatchNorm2d, VirtualBatchNorm2d, at_least_float32
from stylepipe.networks.spectral import add_spectral_norm_

G_NORMS = ("batch", "virtual", "none")
D_NORMS = ("batch", "none")
CHANNEL_BASE = 4096
CHANNEL_MAX = 1024
_STD = 0.02  # of all weights at the start: section 4
_SMALLEST_RES = 8
_convolve: Callable[..., torch.Tensor] = _Convolution.apply


class Generator(nn.Module):
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
        refuse_growth(self.resolutions[0], res, alpha)
        if self._references:
            z = torch.cat([self.reference_z, z])
            c = torch.cat([self.reference_c, c]) if self.reference_c is not None and c is not None else c
        x = (z if self.embed is None else self.embed(z, c))[:, :, None, None]
        for r in self._levels[:-1]:
            x = self.get_submodule(f"b{r}")(x)
        img = self.get_submodule(f"b{self._levels[-1]}")(x[self._references :])
        return to_channels_last(img, at_least_float32(img).dtype)

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that an image of `res` pixels takes: all, for the network does not grow."""
        del res, fading
        return [self]


class Discriminator(nn.Module):
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
        self.mbstd = minibatch_stddev(x_channels, head)
        self.b4 = PlainHead((x_channels + self.mbstd.num_channels) * HEAD_RES**2, std=_STD, **head)
        if spectral_norm:
            self.config["spectral_norm"] = True
            add_spectral_norm_(self)

    def forward(
        self, img: torch.Tensor, c: torch.Tensor | None = None, alpha: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits [N, 1] float32 of img [N, img_channels, res, res] and c [N, c_dim]."""
        return self.judge(img, c, alpha).logits

    def judge(self, img: torch.Tensor, c: torch.Tensor | None = None, alpha: torch.Tensor | None = None) -> Judgement:
        """Return all that the last layer says of img [N, img_channels, res, res] and c [N, c_dim].

        Its features are the activations at 4 px, flattened, whose 4x4 convolution the logits are.

        Raises:
            ValueError: images of another size, or an `alpha`: the network does not grow.
        """
        refuse_images(img, self.resolutions[0], alpha)
        x = img
        for r in self._levels:
            x = self.get_submodule(f"b{r}")(x)
        judgement: Judgement = self.b4(self.mbstd(at_least_float32(x)).flatten(1), c)
        return judgement

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that see an image of `res` pixels: all, for the network does not grow."""
        del res, fading
        return [self]


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


# --- shared by networks without equalized learning rate ---


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
        assert groups == 1 or stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride] (with padding that does so)."""
        weight = self.weight.to(x.dtype)
        if self.groups == 1:
            return conv2d(x, weight, stride=self._stride, padding=self._padding)
        if torch.compiler.is_compiling():
            return F.conv2d(x, weight, padding=self._padding, groups=self.groups)
        return _convolve(x, weight, None, _Grouped(self._padding, self.groups))


class _Grouped(NamedTuple):
    """Geometry of a grouped convolution of stride 1, for kernels.conv2d.

    torch's own second derivative runs one convolution per group: a hundred per layer.
    """

    padding: int
    groups: int
    transposed: bool = False

    def arguments(self) -> tuple[Any, ...]:
        """Return stride, padding, dilation, transposed, output padding and groups, as torch takes them."""
        return [1, 1], [self.padding] * 2, [1, 1], self.transposed, [0, 0], self.groups

    def adjoint(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> _Grouped:
        """Return the geometry that maps y's shape back to x's with the same weight."""
        del x, y, weight
        return self._replace(transposed=not self.transposed)


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
        kernels, last_layer = options.get("mbdisc_kernels", 0), options.get("last_layer", "linear")
        if last_layer not in LAST_LAYERS:
            raise UserError(f"last_layer {last_layer!r}: expected one of {', '.join(LAST_LAYERS)}")
        self.c_dim, self.normalized = c_dim, last_layer == "normalized"
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
            direction = F.normalize(self.direction if w is None else w, dim=1)
            logits = (h * direction.detach()).sum(dim=1, keepdim=True)
            return Judgement(logits, features, class_logits, (h.detach() * direction).sum(dim=1, keepdim=True))
        logits = self.out(h) if w is None else (h * w).sum(dim=1, keepdim=True)
        return Judgement(logits, features, class_logits)


def minibatch_stddev(channels: int, options: HeadOptions) -> MinibatchStdDev:
    """Return the minibatch standard deviation that `options` ask for, by default of no channels."""
    wanted = options.get("mbstd_channels", 0)
    if wanted and channels % wanted:
        raise UserError(
            f"mbstd_channels {wanted}: expected a divisor of the {channels} channels at 4 px, or 0 for none"
        )
    return MinibatchStdDev(options.get("mbstd_group_size", 4), wanted)


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


def refuse_growth(full: int, res: int | None, alpha: torch.Tensor | None) -> None:
    """Raise ValueError where a generator of one resolution is asked for another, or for a fade."""
    if res not in (None, full):
        raise ValueError(f"res {res}: this network does not grow, its images are {full} px")
    if alpha is not None:
        raise ValueError("alpha: this network does not grow, so no level is faded in")


def refuse_images(img: torch.Tensor, full: int, alpha: torch.Tensor | None) -> None:
    """Raise ValueError where a discriminator of one resolution is given another, or a fade."""
    if img.ndim != 4 or list(img.shape[2:]) != [full, full]:
        raise ValueError(f"img of shape {list(img.shape)}: expected [N, C, {full}, {full}]")
    refuse_growth(full, None, alpha)


def _draw_(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _checked_res(res: int) -> int:
    if res < _SMALLEST_RES:
        raise UserError(f"res {res}: expected a power of two from {_SMALLEST_RES} up, such as 64 or 256")
    return res


def _checked_norm(norm: str, accepted: tuple[str, ...]) -> str:
    if norm not in accepted:
        raise UserError(f"norm {norm!r}: expected one of {', '.join(accepted)}")
    return norm
