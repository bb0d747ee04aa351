"""Upsample, filter with a FIR kernel and downsample, in one op.

Insert up - 1 zeros after every sample, pad (or crop, where negative), convolve with f, keep every down-th sample.
The adjoint is the same op with up and down swapped and the filter flipped, so gradients of any order come from the
op itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from stylepipe.kernels._fir import Geometry, run_upfirdn2d
from stylepipe.kernels._library import (
    ANY_DEVICE,
    LIBRARY,
    check_device,
    check_floating,
    compiled,
    in_own_type,
    memory_format_of,
    register_gradient,
)

Pair = int | Sequence[int]


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> torch.Tensor:
    """Return x upsampled by `up`, padded, filtered with `f` and downsampled by `down`.

    Args:
        x: [N, C, H, W], float16, bfloat16, float32 or float64; contiguous or channels_last. The op works in its type,
            autocast or not.
        f: [fh, fw], or [n] for the separable filter outer(f, f). A constant: it gets no gradient. Compiled kernels read
            it as float32 (float64 for float64) and round once, at the end; without them it is rounded to x's type.
        up, down: one factor, or (x, y).
        padding: zeros around the zero-inserted x: one number, (x, y) or (x0, x1, y0, y1); negative numbers crop.
        flip_filter: False convolves (as in signal processing), True correlates.
        gain: factor of the output.

    Returns:
        [N, C, (H * up + y0 + y1 - fh) // down + 1, likewise the width], of x's type and in x's memory format.

    Raises:
        ValueError: an argument has the wrong number of entries, type or device, or the output would be empty.
    """
    x0, x1, y0, y1 = expand_padding(padding)
    upx, upy = expand_pair(up, "up")
    downx, downy = expand_pair(down, "down")
    if x.ndim != 4:
        raise ValueError(f"upfirdn2d: x of shape {list(x.shape)}: expected [N, C, H, W]")
    check_floating("upfirdn2d", x)
    check_device("upfirdn2d", "f", f, x)
    if f.ndim not in (1, 2) or f.numel() == 0:
        raise ValueError(f"upfirdn2d: filter of shape {list(f.shape)}: expected [taps] or [fh, fw], not empty")
    return torch.ops.stylepipe.upfirdn2d(x, f, [upx, upy], [downx, downy], [x0, x1, y0, y1], flip_filter, float(gain))


def expand_pair(value: Pair, name: str) -> tuple[int, int]:
    """Return (x, y) of one factor for both or a sequence of two, each at least 1."""
    x, y = (value, value) if isinstance(value, int) else value
    if x < 1 or y < 1:
        raise ValueError(f"upfirdn2d: {name} {value}: expected whole numbers of at least 1")
    return x, y


def expand_padding(padding: Pair) -> tuple[int, int, int, int]:
    """Return (x0, x1, y0, y1) of one number, (x, y) or all four."""
    if isinstance(padding, (int, torch.SymInt)):
        return padding, padding, padding, padding
    if len(padding) == 2:
        x, y = padding
        return x, x, y, y
    if len(padding) != 4:
        raise ValueError(f"upfirdn2d: padding {list(padding)}: expected 1, 2 (x, y) or 4 (x0, x1, y0, y1) numbers")
    x0, x1, y0, y1 = padding
    return x0, x1, y0, y1


LIBRARY.define(
    "upfirdn2d(Tensor x, Tensor f, int[] up, int[] down, SymInt[] padding, bool flip_filter, float gain) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _output_shape(x: torch.Tensor, f: torch.Tensor, up: list[int], down: list[int], padding: list[int]) -> list[int]:
    x0, x1, y0, y1 = padding
    width = (x.shape[3] * up[0] + x0 + x1 - f.shape[-1]) // down[0] + 1
    height = (x.shape[2] * up[1] + y0 + y1 - f.shape[0]) // down[1] + 1
    if width < 1 or height < 1:
        raise ValueError(
            f"upfirdn2d: input {list(x.shape)} with up {up}, padding {padding} is smaller than the filter "
            f"{list(f.shape)}; pad more"
        )
    return [x.shape[0], x.shape[1], height, width]


@torch.library.register_fake("stylepipe::upfirdn2d", lib=LIBRARY)
def _fake(
    x: torch.Tensor,
    f: torch.Tensor,
    up: list[int],
    down: list[int],
    padding: list[int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    shape = _output_shape(x, f, up, down, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


@torch.library.impl(LIBRARY, "upfirdn2d", ANY_DEVICE)
def _forward(
    x: torch.Tensor,
    f: torch.Tensor,
    up: list[int],
    down: list[int],
    padding: list[int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    shape = _output_shape(x, f, up, down, padding)
    memory_format = memory_format_of(x)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=memory_format)
    if kernels := compiled("upfirdn2d", x):
        height, width = shape[2:]
        (upx, upy), (downx, downy), (x0, x1, y0, y1) = up, down, padding
        geometry = Geometry((upx, upy), (downx, downy), (x0, x1, y0, y1), flip_filter, gain, height, width)
        return run_upfirdn2d(kernels, x.contiguous(memory_format=memory_format), f, geometry)
    with in_own_type(x):
        y = _forward_in_torch(x, f, up, down, padding, flip_filter, gain)
    return y.contiguous(memory_format=memory_format)


def _forward_in_torch(
    x: torch.Tensor,
    f: torch.Tensor,
    up: list[int],
    down: list[int],
    padding: list[int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    f = f.to(x.dtype)
    if f.ndim == 1:
        f = torch.outer(f, f)  # two separable passes lose to one depthwise convolution
    if gain != 1:
        f = f * gain
    if up == [1, 1]:
        return _filter_down(x, f if flip_filter else f.flip([0, 1]), down, padding)
    y = _filter_up(x, f.flip([0, 1]) if flip_filter else f, up, padding)
    return y if down == [1, 1] else y[:, :, :: down[1], :: down[0]]


def _filter_down(x: torch.Tensor, f: torch.Tensor, down: list[int], padding: list[int]) -> torch.Tensor:
    """Correlate with a strided depthwise convolution; padding the same on both sides is left to it."""
    x0, x1, y0, y1 = padding
    px = x0 if x0 == x1 and x0 > 0 else 0
    py = y0 if y0 == y1 and y0 > 0 else 0
    x = _pad(x, [x0 - px, x1 - px, y0 - py, y1 - py])
    return F.conv2d(x, _depthwise(f, x), stride=(down[1], down[0]), padding=(py, px), groups=x.shape[1])


def _filter_up(x: torch.Tensor, f: torch.Tensor, up: list[int], padding: list[int]) -> torch.Tensor:
    """Convolve with a transposed depthwise convolution: no zeros are stored or multiplied.

    It yields the full convolution, of which fh - 1 - y0 rows are to be cropped at the start and fh - up - y1 at the
    end; what both ends have in common it crops itself.
    """
    x0, x1, y0, y1 = padding
    fh, fw = f.shape
    left, right, top, bottom = fw - 1 - x0, fw - up[0] - x1, fh - 1 - y0, fh - up[1] - y1
    px = max(0, min(left, right, fw - 1))
    py = max(0, min(top, bottom, fh - 1))
    y = F.conv_transpose2d(x, _depthwise(f, x), stride=(up[1], up[0]), padding=(py, px), groups=x.shape[1])
    return _pad(y, [px - left, px - right, py - top, py - bottom])


def _depthwise(f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Repeat the filter [fh, fw] for each channel of x, as [C, 1, fh, fw]."""
    return f.expand(x.shape[1], 1, *f.shape)


def _pad(x: torch.Tensor, padding: list[int]) -> torch.Tensor:
    """Pad, then crop: a crop may reach into the zeros on the other side of a small x."""
    grow, crop = [max(p, 0) for p in padding], [min(p, 0) for p in padding]
    x = F.pad(x, grow) if any(grow) else x
    return F.pad(x, crop) if any(crop) else x


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, f, ctx.up, ctx.down, ctx.padding, ctx.flip_filter, ctx.gain = inputs
    ctx.save_for_backward(f)
    ctx.height, ctx.width = x.shape[2:]


def _autograd(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    """Apply the adjoint: up and down swapped, filter flipped, padding such that the gradient has x's size."""
    if 0 in (ctx.height, ctx.width):  # of an x without pixels, which the op refuses to return
        return dy.new_zeros(*dy.shape[:2], ctx.height, ctx.width), None, None, None, None, None, None
    (f,) = ctx.saved_tensors
    x0, _, y0, _ = ctx.padding
    (upx, upy), (downx, downy) = ctx.up, ctx.down
    fh, fw = f.shape[0], f.shape[-1]
    padding = [
        fw - x0 - 1,
        ctx.width * upx - dy.shape[3] * downx + x0 - upx + 1,
        fh - y0 - 1,
        ctx.height * upy - dy.shape[2] * downy + y0 - upy + 1,
    ]
    dx = torch.ops.stylepipe.upfirdn2d(dy, f, ctx.down, ctx.up, padding, not ctx.flip_filter, ctx.gain)
    return dx, None, None, None, None, None, None


register_gradient("upfirdn2d", _setup, _autograd)
