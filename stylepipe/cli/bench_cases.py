"""What `stylepipe bench ops` times: each op's operands, the form of it that people write, and the least it can move.

The least is what a perfect implementation moves to and from memory: every input read once, every output written once.
Operands that have no pixels ([C], [N, C], [N, 3, C]) count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stylepipe.kernels import (
    act_fir,
    activation_gain,
    bias_act,
    downsample2d,
    setup_filter,
    styled_act,
    styled_act_rgb,
    upfirdn2d,
    upsample2d,
)

TAPS = (1, 3, 3, 1)
CLAMP = 256.0  # as the networks have it in half precision
_SLOPE = 0.2
_GAIN = activation_gain("lrelu")
_RGB = 3

Operands = dict[str, Tensor]
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Level:
    """A level of a network: N images of C channels, res x res pixels."""

    batch_size: int
    channels: int
    res: int
    dtype: torch.dtype
    memory_format: torch.memory_format
    device: torch.device

    @property
    def real(self) -> torch.dtype:
        """The type of small operands, noise and colours."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def activation(self, res: int) -> Tensor:
        """Draw [N, C, res, res]."""
        shape = (self.batch_size, self.channels, res, res)
        return torch.randn(shape, dtype=self.dtype, device=self.device).contiguous(memory_format=self.memory_format)

    def small(self, *shape: int) -> Tensor:
        """Draw an operand."""
        return torch.randn(shape, dtype=self.real, device=self.device)

    def activations(self, *sizes: int) -> int:
        """Return the bytes of one activation of each of these resolutions."""
        return sum(self.batch_size * self.channels * size**2 for size in sizes) * self.dtype.itemsize

    def planes(self, count: int) -> int:
        """Return the bytes of [N, count, res, res] in the type of noise and colours."""
        return self.batch_size * count * self.res**2 * self.real.itemsize


class Moved(NamedTuple):
    """Bytes of a forward and of a backward pass."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Case:
    """An op as a network calls it.

    Attributes:
        name: as the table shows it.
        source: the file of kernels that it runs, in kernels/cuda.
        operands: draws them for a level; those that are neither `noise` nor `f` get gradients.
        op: ours, of the operands by name.
        plain: what it replaces, one PyTorch operation after another.
        least: bytes to be moved at the least.
    """

    name: str
    source: str
    operands: Callable[[Level], Operands]
    op: Function
    plain: Function
    least: Callable[[Level], Moved]


def differentiable(operands: Operands) -> list[Tensor]:
    """Return the operands that get gradients."""
    return [tensor for name, tensor in operands.items() if name not in ("noise", "f")]


# --- the forms that people write ---


def plain_upfirdn2d(
    x: Tensor, f: Tensor, *, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0), gain: float = 1
) -> Tensor:
    """Insert zeros, pad by (before, after) along both axes, convolve each channel with outer(f, f), decimate."""
    n, c, h, w = x.shape
    if up > 1:
        zeros = x.new_zeros(n, c, h, up, w, up)
        zeros[:, :, :, 0, :, 0] = x
        x = zeros.reshape(n, c, h * up, w * up)
    x = F.pad(x, padding * 2)
    kernel = (torch.outer(f, f) * gain).flip([0, 1]).to(x.dtype).expand(c, 1, -1, -1)
    return F.conv2d(x, kernel, groups=c)[:, :, ::down, ::down]


def plain_bias_act(x: Tensor, bias: Tensor) -> Tensor:
    """Add, activate, multiply, clamp."""
    x = F.leaky_relu(x + bias.to(x.dtype)[:, None, None], _SLOPE)
    return (x * _GAIN).clamp(-CLAMP, CLAMP)


def plain_styled_act(x: Tensor, scale: Tensor, noise: Tensor, noise_strength: Tensor, bias: Tensor) -> Tensor:
    """Demodulate, add the noise, then bias and activation."""
    x = x * scale.to(x.dtype)[:, :, None, None]
    return plain_bias_act(x + (noise * noise_strength).to(x.dtype), bias)


def _plain_styled_rgb(next_scale: Tensor, rgb_weight: Tensor, **operands: Tensor) -> tuple[Tensor, Tensor]:
    v = plain_styled_act(**operands)
    rgb = (rgb_weight.to(v.dtype) @ v.flatten(2)).unflatten(2, v.shape[2:]).to(rgb_weight.dtype)
    return v * next_scale.to(v.dtype)[:, :, None, None], rgb


def _plain_filtered_styled(x: Tensor, f: Tensor, **operands: Tensor) -> tuple[Tensor]:
    return (plain_styled_act(plain_upfirdn2d(x, f, padding=(1, 1), gain=4), **operands),)


# --- operands ---


def _filter(level: Level) -> Tensor:
    return setup_filter(TAPS, separable=True).to(level.device)


def _filtered(level: Level, res: int) -> Operands:
    return {"x": level.activation(res), "f": _filter(level)}


def _biased(level: Level) -> Operands:
    return {"x": level.activation(level.res), "bias": level.small(level.channels)}


def _of_styled(level: Level, res: int) -> Operands:
    n, c = level.batch_size, level.channels
    return {
        "x": level.activation(res),
        "scale": level.small(n, c),
        "noise": level.small(n, 1, level.res, level.res),
        "noise_strength": level.small(),
        "bias": level.small(c),
    }


def _of_styled_rgb(level: Level) -> Operands:
    n, c = level.batch_size, level.channels
    beside = {"next_scale": level.small(n, c), "rgb_weight": level.small(n, _RGB, c)}
    return _of_styled(level, level.res) | beside


# --- the least bytes; a backward pass reads dy and what it needs of the forward pass, and writes dx ---


def _least_bias_act(level: Level) -> Moved:
    res = level.res
    return Moved(level.activations(res, res), level.activations(res, res, res))


def _least_styled(level: Level, res: int, beside: int = 0) -> Moved:
    """Count x, y, the noise, and `beside` more numbers per pixel."""
    planes = level.planes(1 + beside)
    return Moved(level.activations(res, level.res) + planes, level.activations(res, level.res, res) + planes)


def _least_act_fir(level: Level) -> Moved:
    """Count x, y, and the two bits that the gradient needs of each activation."""
    moved = level.activations(level.res, level.res + 1) + level.batch_size * level.channels * level.res**2 // 4
    return Moved(moved, moved)


def _least_upfirdn2d(level: Level, res: int, out_res: int) -> Moved:
    moved = level.activations(res, out_res)
    return Moved(moved, moved)


CASES = (
    Case(
        "bias_act",
        "epilogue",
        _biased,
        lambda x, bias: (bias_act(x, bias, act="lrelu", clamp=CLAMP),),
        lambda x, bias: (plain_bias_act(x, bias),),
        _least_bias_act,
    ),
    Case(
        "styled_act",
        "epilogue",
        lambda level: _of_styled(level, level.res),
        lambda **operands: (styled_act(**operands, clamp=CLAMP),),
        lambda **operands: (plain_styled_act(**operands),),
        lambda level: _least_styled(level, level.res),
    ),
    Case(
        "styled_act_rgb",
        "epilogue",
        _of_styled_rgb,
        lambda **operands: styled_act_rgb(**operands, clamp=CLAMP),
        _plain_styled_rgb,
        lambda level: _least_styled(level, level.res, beside=_RGB),
    ),
    Case(
        "FIR + styled_act",
        "fused_fir",
        lambda level: _of_styled(level, level.res + 1) | {"f": _filter(level)},
        lambda **operands: (styled_act(**operands, clamp=CLAMP, padding=1, filter_gain=4),),
        _plain_filtered_styled,
        lambda level: _least_styled(level, level.res + 1),
    ),
    Case(
        "act_fir",
        "fused_fir",
        lambda level: _biased(level) | {"f": _filter(level)},
        lambda x, bias, f: (act_fir(x, bias, f, padding=2, clamp=CLAMP),),
        lambda x, bias, f: (plain_upfirdn2d(plain_bias_act(x, bias), f, padding=(2, 2)),),
        _least_act_fir,
    ),
    Case(
        "upfirdn2d",
        "upfirdn2d",
        lambda level: _filtered(level, level.res),
        lambda x, f: (upfirdn2d(x, f, padding=2),),
        lambda x, f: (plain_upfirdn2d(x, f, padding=(2, 2)),),
        lambda level: _least_upfirdn2d(level, level.res, level.res + 1),
    ),
    Case(
        "upfirdn2d down 2",
        "upfirdn2d",
        lambda level: _filtered(level, level.res),
        lambda x, f: (downsample2d(x, f),),
        lambda x, f: (plain_upfirdn2d(x, f, down=2, padding=(1, 1)),),
        lambda level: _least_upfirdn2d(level, level.res, level.res // 2),
    ),
    Case(
        "upfirdn2d up 2",
        "upfirdn2d",
        lambda level: _filtered(level, level.res // 2),
        lambda x, f: (upsample2d(x, f),),
        lambda x, f: (plain_upfirdn2d(x, f, up=2, padding=(2, 1), gain=4),),
        lambda level: _least_upfirdn2d(level, level.res // 2, level.res),
    ),
)
