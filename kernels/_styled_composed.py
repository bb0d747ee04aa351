"""styled_act composed of other ops, and its gradient likewise: what runs without kernels, and the second derivative."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stylepipe.kernels._activations import activation_alpha, activation_gain, keeps_sign
from stylepipe.kernels._fir import transposed_padding
from stylepipe.kernels._library import in_own_type
from stylepipe.kernels.bias_act import bias_act
from stylepipe.kernels.upfirdn2d import upfirdn2d


class StyledTensors(NamedTuple):
    """The tensors of styled_act, with the shapes that it tells; None where absent. All but f have gradients."""

    x: Tensor
    scale: Tensor | None
    noise: Tensor | None
    noise_strength: Tensor | None
    bias: Tensor | None
    next_scale: Tensor | None
    rgb_weight: Tensor | None
    f: Tensor | None


class StyledOptions(NamedTuple):
    """The numbers of styled_act, defaults filled in."""

    padding: int
    filter_gain: float
    act: str
    alpha: float
    gain: float
    clamp: float | None

    @classmethod
    def of(cls, act: str, gain: float | None, clamp: float | None, padding: int, filter_gain: float) -> StyledOptions:
        """Fill in an activation's defaults."""
        gain = activation_gain(act) if gain is None else gain
        clamp = None if clamp is None else float(clamp)
        return cls(padding, float(filter_gain), act, activation_alpha(act), float(gain), clamp)

    def activation(self) -> dict[str, Any]:
        """Return bias_act's."""
        return {"act": self.act, "alpha": self.alpha, "gain": self.gain, "clamp": self.clamp}


def per_pixel_dot(v: Tensor, weight: Tensor) -> Tensor:
    """Return [N, K, H, W], channels_last: v [N, C, H, W] weighted by [N, K, C] and summed, in the weight's type."""
    pixels = v.to(weight.dtype).permute(0, 2, 3, 1).flatten(1, 2)  # [N, HW, C], a view where channels_last
    with in_own_type(v):
        return (pixels @ weight.transpose(1, 2)).unflatten(1, v.shape[2:]).permute(0, 3, 1, 2)


def composed(of: StyledTensors, options: StyledOptions) -> tuple[Tensor, Tensor | None]:
    """Return y, and rgb if there is a weight for it."""
    z = filtered(of, options)
    v = bias_act(_styled(z, of), of.bias, **options.activation())
    return modulated(v, of.next_scale), None if of.rgb_weight is None else per_pixel_dot(v, of.rgb_weight)


def filtered(of: StyledTensors, options: StyledOptions) -> Tensor:
    """Return x behind the filter, if there is one."""
    if of.f is None:
        return of.x
    return upfirdn2d(of.x, of.f, padding=options.padding, gain=options.filter_gain)


def _styled(z: Tensor, of: StyledTensors) -> Tensor:
    """Return z * scale + noise * noise_strength."""
    addend = None
    if of.noise is not None and of.noise_strength is not None:
        addend = (of.noise * of.noise_strength).to(z.dtype)
    if of.scale is None:
        return z if addend is None else z + addend
    z = modulated(z, of.scale)
    return z if addend is None else z.add_(addend)


def modulated(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return x [N, C, H, W] times scale [N, C]."""
    return x if scale is None else x * scale.to(x.dtype)[:, :, None, None]


def gradient_of(
    dy: Tensor, drgb: Tensor | None, of: StyledTensors, options: StyledOptions, names: set[str]
) -> dict[str, Tensor]:
    """Return the gradients by the tensors named, made of differentiable ops."""
    z = filtered(of, options)
    zs = _styled(z, of)
    v = bias_act(zs, of.bias, **options.activation())
    found: dict[str, Tensor] = {}
    dv = modulated(dy, of.next_scale)
    if drgb is not None and of.rgb_weight is not None:
        pixels = drgb.permute(0, 2, 3, 1).flatten(1, 2)  # [N, HW, K]
        with in_own_type(v):
            dv = dv + (pixels @ of.rgb_weight).unflatten(1, v.shape[2:]).permute(0, 3, 1, 2).to(v.dtype)
            if "rgb_weight" in names:
                found["rgb_weight"] = pixels.transpose(1, 2) @ v.to(drgb.dtype).permute(0, 2, 3, 1).flatten(1, 2)
    if of.next_scale is not None and "next_scale" in names:
        found["next_scale"] = (dy * v).to(of.next_scale.dtype).sum((2, 3))
    act = (options.act, options.alpha, options.gain, options.clamp)
    ref = v if keeps_sign(*act[:3]) else zs
    with_bias = of.bias is not None and "bias" in names
    du, dbias = torch.ops.stylepipe.bias_act_backward(dv, ref, of.bias, 1, *act, with_bias)
    if with_bias:
        found["bias"] = dbias
    if of.scale is not None and "scale" in names:
        found["scale"] = (du * z).to(of.scale.dtype).sum((2, 3))
    if of.noise is not None and of.noise_strength is not None and names & {"noise", "noise_strength"}:
        per_pixel = du.to(of.noise.dtype).sum(1, keepdim=True)
        found["noise"] = (per_pixel * of.noise_strength).sum_to_size(of.noise.shape)
        found["noise_strength"] = (per_pixel * of.noise).sum()
    if "x" in names:
        dz = modulated(du, of.scale)
        found["x"] = dz if of.f is None else transposed_filter(dz, of, options)
    return found


def transposed_filter(dz: Tensor, of: StyledTensors, options: StyledOptions) -> Tensor:
    """Return the gradient by x of that by the filter's output."""
    assert of.f is not None
    padding = transposed_padding(of.f, options.padding)
    return upfirdn2d(dz, of.f, padding=padding, flip_filter=True, gain=options.filter_gain)
