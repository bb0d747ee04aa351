"""Layers of style-based networks: equalized learning rate, modulated convolution, minibatch stddev.

Shapes: N images, C channels, H x W pixels, activations channels_last. Stored weights have unit variance; the
equalized learning rate (Karras et al. 2018, arXiv:1710.10196, section 4.1) multiplies by 1 / sqrt(fan_in) at run time,
wherever that factor is cheapest. Leaky ReLU being positively homogeneous, its gain of sqrt(2) joins the same factor.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from stylepipe.config import largest_divisor
from stylepipe.kernels import (
    act_fir,
    activation_gain,
    bias_act,
    conv2d,
    downsample2d,
    setup_filter,
    styled_act,
    styled_act_rgb,
    upfirdn2d,
    upsample2d,
)

RESAMPLE_TAPS = (1, 3, 3, 1)
LRELU_SLOPE = 0.2
_DEMODULATION_EPS = 1e-8
_STDDEV_EPS = 1e-8
_BLUR_PADDING = 2  # in front of a 3x3 convolution of stride 2


def resample_filter() -> torch.Tensor:
    """Return the low-pass filter of all resampling, [4], to be applied along both axes."""
    return setup_filter(RESAMPLE_TAPS, separable=True)


def to_channels_last(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x [N, C, H, W] in channels_last and in the type of the next layers; no copy where it is both already."""
    return x.to(dtype=dtype, memory_format=torch.channels_last)


def normalize_second_moment(x: torch.Tensor) -> torch.Tensor:
    """Return x [N, F] scaled so that each row's mean square is 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


class Equalized(nn.Module):
    """A layer whose scales are applied at run time, and what it thus amounts to."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _weight_gain: float
    _bias_gain: float

    def applied(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight [out, in, ...] and bias [out] that act on x: scales and activation gain are in them."""
        assert self.bias is not None
        return self.weight * self._weight_gain, self.bias * self._bias_gain

    def gains(self) -> tuple[float, float]:
        """Return by what the stored weight and bias are multiplied."""
        return self._weight_gain, self._bias_gain

    @torch.no_grad()
    def store_(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Store what makes `applied` return `weight` and `bias`."""
        assert self.bias is not None
        self.weight.copy_(weight / self._weight_gain)
        self.bias.copy_(bias / self._bias_gain)


class Linear(Equalized):
    """Fully connected layer: y [N, out] = act(x [N, in] @ W.T + b), all float32.

    The learning rate multiplier (Karras et al. 2019, arXiv:1812.04948, appendix C) divides the stored weight and
    multiplies weight and bias at run time. Scales are applied to x, which is smaller than W.
    """

    bias: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        act: Literal["linear", "lrelu"] = "linear",
        lr_multiplier: float = 1,
        bias_init: float = 0,
    ) -> None:
        super().__init__()
        self.act = act
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
        self._weight_gain = lr_multiplier / math.sqrt(in_features) * activation_gain(act)
        self._bias_gain = lr_multiplier * activation_gain(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, in_features] to [N, out_features]."""
        bias = self.bias if self._bias_gain == 1 else self.bias * self._bias_gain
        y = F.linear(x * self._weight_gain, self.weight, bias)
        return y if self.act == "linear" else F.leaky_relu_(y, LRELU_SLOPE)


class Conv2d(Equalized):
    """Convolution, bias, activation, gain and clamp, optionally between a FIR filter and a stride of 2, or up by 2.

    Weights are float32 and are cast to the type of x, which is the output's.
    """

    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        act: str = "linear",
        down: int = 1,
        gain: float = 1,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.act = act
        self.down = down
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._bias_gain = activation_gain(act) * gain
        self._weight_gain = self._bias_gain / math.sqrt(in_channels * kernel_size**2)
        self._clamp = None if conv_clamp is None else conv_clamp * gain
        if down > 1:
            self.register_buffer("resample_filter", resample_filter(), persistent=False)

    def forward(self, x: torch.Tensor, *, blur: torch.Tensor | None = None, blurred: bool = False) -> torch.Tensor:
        """Map x [N, in_channels, H, W] to [N, out_channels, H / down, W / down].

        Two layers of which the second halves a 3x3 convolution's input share the filter between them: the first is
        given it as `blur`, which joins its activation, and the second is told that x is `blurred`.
        """
        weight = (self.weight * self._weight_gain).to(x.dtype)
        bias = None if self.bias is None else self.bias * self._bias_gain
        # oneDNN adds the bias inside of the convolution; elsewhere that would be a pass of its own.
        fused = bias.to(x.dtype) if bias is not None and x.device.type == "cpu" else None
        y = self._convolve(x, weight, fused, blurred)
        rest = bias if fused is None else None
        if blur is not None:
            return act_fir(y, rest, blur, _BLUR_PADDING, act=self.act, gain=1, clamp=self._clamp)
        if self.act == "linear" and self._clamp is None and rest is None:
            return y
        return bias_act(y, rest, act=self.act, gain=1, clamp=self._clamp)

    def _convolve(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, blurred: bool
    ) -> torch.Tensor:
        if self.down == 1:
            return conv2d(x, weight, bias, padding=weight.shape[2] // 2)
        if weight.shape[2] == 1:  # the filter strides: the convolution then reads a quarter
            return conv2d(downsample2d(x, self.resample_filter), weight, bias)
        if not blurred:
            x = upfirdn2d(x, self.resample_filter, padding=_BLUR_PADDING)
        return conv2d(x, weight, bias, stride=2)


class UpsampleConv1x1(nn.Module):
    """The skip of a residual synthesis block: 1x1 convolution without bias, then upsampling by 2, times `gain`."""

    resample_filter: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, *, gain: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.register_buffer("resample_filter", resample_filter(), persistent=False)
        self._weight_gain = gain / math.sqrt(in_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, in_channels, H, W] to [N, out_channels, 2H, 2W]."""
        x = conv2d(x, (self.weight * self._weight_gain).to(x.dtype))
        return upsample2d(x, self.resample_filter)


class Modulation(NamedTuple):
    """What a style makes of a synthesis layer, in the type of its activations.

    Attributes:
        weight: [out, in, 3, 3].
        style: [N, in] float32, the input's scale.
        demodulation: [N, out] float32, the output's scale.
    """

    weight: torch.Tensor
    style: torch.Tensor
    demodulation: torch.Tensor


class SynthesisLayer(nn.Module):
    """Modulated convolution with demodulation, noise, bias, leaky ReLU, gain and clamp.

    Karras et al. 2020, arXiv:1912.04958, Eq. 1-3, in its activation form: the input is scaled by the style and the
    output by the demodulation, so that one dense convolution serves the batch and no per-sample weight exists. The
    input's scale joins the epilogue of the layer before.
    """

    noise_const: torch.Tensor
    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        w_dim: int,
        res: int,
        up: int = 1,
        gain: float = 1,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.res = res
        self.up = up
        self.affine = Linear(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("noise_const", torch.randn(res, res))
        if up > 1:
            self.register_buffer("resample_filter", resample_filter(), persistent=False)
        self._gain = activation_gain("lrelu") * gain
        self._clamp = None if conv_clamp is None else conv_clamp * gain
        self._fan_in = in_channels * 9

    def modulate(self, w: torch.Tensor, dtype: torch.dtype) -> Modulation:
        """Return what w [N, w_dim] float32 makes of this layer, for activations of `dtype`.

        Demodulation cancels any scale of weight and style: the equalized learning rate remains only in its epsilon,
        and for float16 both are first brought to at most 1 and 1 / sqrt(fan_in), which keeps all products in range.
        """
        weight: torch.Tensor = self.weight
        style = self.affine(w)
        eps = _DEMODULATION_EPS * self._fan_in
        if dtype == torch.float16:
            weight = weight / weight.abs().amax(dim=(1, 2, 3), keepdim=True)
            style = style / (style.abs().amax(dim=1, keepdim=True) * math.sqrt(self._fan_in))
            eps = _DEMODULATION_EPS
        energy = style.square() @ weight.square().sum(dim=(2, 3)).t()  # of Eq. 3
        return Modulation(weight.to(dtype), style, (energy + eps).rsqrt())

    def forward(
        self,
        x: torch.Tensor,
        modulation: Modulation,
        noise: torch.Tensor | None,
        next_style: torch.Tensor | None = None,
        rgb_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the activations [N, out_channels, res, res], and what ToRGB makes of them.

        Args:
            x: [N, in_channels, H, W], the activations times the style, channels_last; their type is the output's.
            modulation: of this layer, for the same type.
            noise: [N or 1, 1, res, res] float32 of unit variance; None for none.
            next_style: [N, out_channels], which multiplies the activations returned.
            rgb_weight: ToRGB.modulate's [N, img_channels, out_channels], None for no image.
        """
        filters: dict[str, Any] = {}
        if self.up > 1:
            # The weight is that of a correlation, used as it is in the transposed convolution; the FIR low-passes.
            x = conv2d(x, modulation.weight.transpose(0, 1), stride=2, transposed=True)
            filters = {"f": self.resample_filter, "padding": 1, "filter_gain": 4}
        else:
            x = conv2d(x, modulation.weight, padding=1)
        strength = None if noise is None else self.noise_strength
        style = (modulation.demodulation, noise, strength, self.bias, "lrelu", self._gain, self._clamp, next_style)
        if rgb_weight is None:
            return styled_act(x, *style, **filters), None
        return styled_act_rgb(x, rgb_weight, *style, **filters)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to colours, without demodulation or activation, in float32.

    The one place where per-sample weights pay: three rows of C numbers. The activations are weighted where they are
    made, by the layer before.
    """

    def __init__(self, in_channels: int, img_channels: int, *, w_dim: int, conv_clamp: float | None = None) -> None:
        super().__init__()
        self.affine = Linear(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(img_channels))
        self._weight_gain = 1 / math.sqrt(in_channels)
        self._clamp = conv_clamp

    def modulate(self, w: torch.Tensor) -> torch.Tensor:
        """Return the weights [N, img_channels, C] float32 that w [N, w_dim] makes."""
        style = self.affine(w) * self._weight_gain
        return self.weight.flatten(1) * style[:, None]

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """Add the bias to weighted sums [N, img_channels, H, W] and clamp."""
        rgb = rgb + self.bias[:, None, None]
        return rgb if self._clamp is None else rgb.clamp(-self._clamp, self._clamp)


class MinibatchStdDev(nn.Module):
    """Append the standard deviation over groups of images as further channels.

    Karras et al. 2018, arXiv:1710.10196, section 3. The statistics are float32 (float64 for float64).
    """

    def __init__(self, group_size: int, num_channels: int = 1) -> None:
        super().__init__()
        self.group_size = group_size
        self.num_channels = num_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, C, H, W] to [N, C + num_channels, H, W]; image n belongs to group n mod (N / group size).

        Groups are of the largest size up to the one asked for that divides the batch.
        """
        if self.num_channels == 0:
            return x
        n, c, h, w = x.shape
        group = largest_divisor(n, self.group_size)
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y.reshape(group, n // group, self.num_channels, c // self.num_channels, h, w)
        y = y - y.mean(dim=0)
        y = (y.square().mean(dim=0) + _STDDEV_EPS).sqrt().mean(dim=(2, 3, 4))  # [N / group, num_channels]
        y = y.to(x.dtype).repeat(group, 1)[:, :, None, None].expand(n, self.num_channels, h, w)
        return torch.cat([x, y], dim=1)
