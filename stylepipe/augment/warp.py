"""Affine transforms of images between a wavelet's up- and downsampling.

Karras et al. 2020, arXiv:2006.06676, appendix B.1: pad by reflection, upsample by 2, sample bilinearly, downsample
by 2. Reflections of an image repeat every P = 2 (R - 1) pixels, so one period, upsampled, holds all padding there is: a
coordinate is folded into it, and no margin depends on the transforms. (Code that pads by a margin instead is limited to
R - 1 pixels and shows zeros beyond, where reflections here go on.)

Sampling is linear in the image. Its derivative is therefore the adjoint, whose derivative is sampling again, and
gradients of any order need these two alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from stylepipe.augment.wavelets import SYM6, SYM6_CENTRE
from stylepipe.kernels import upfirdn2d

_HALO = (3, 2)  # pixels that SYM6 reaches beyond the period, at its start and end
_BILINEAR, _ZEROS = 0, 0  # PyTorch's numbers of modes of interpolation and padding


class Warp(nn.Module):
    """Moves the pixels of square images as one affine transform per image says.

    On a CPU both filters are dense matrices: with them a transform and its gradient take 0.3 of the time that depthwise
    convolution takes at 64 pixels, and 0.6 at 256. Elsewhere they are upfirdn2d. (On a GPU sampling's gradient adds
    atomically, so that it varies with the order of additions.)

    Args:
        res: R, side of the images in pixels.
    """

    axis: Tensor
    taps: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, res: int) -> None:
        super().__init__()
        self.res = res
        down = _down_matrix(res)
        # Pixels that the downsampling reads, half a pixel apart and from the image's centre.
        axis = (np.arange(down.shape[1]) - SYM6_CENTRE - (res - 1)) / 2
        arrays = {"axis": axis, "taps": np.outer(SYM6, SYM6), "up": _up_matrix(res), "down": down}
        for name, array in arrays.items():
            self.register_buffer(name, torch.tensor(array, dtype=torch.float32), persistent=False)

    def forward(self, img: Tensor, inverse: Tensor) -> Tensor:
        """Return the transformed images.

        Args:
            img: [N, C, R, R].
            inverse: [N, 2, 3] of the same type, without gradient: from a pixel of the result to the one of `img` that
                is shown there, both in pixels from the image's centre.

        Returns:
            [N, C, R, R], contiguous.
        """
        grid = self.grid(inverse)
        if img.device.type == "cpu":
            sampled = sample(self.up @ (img @ self.up.t()), grid)
            return self.down @ (sampled @ self.down.t())
        sampled = sample(self.upsample(img), grid)
        return self.downsample(sampled)

    @torch.no_grad()
    def grid(self, inverse: Tensor) -> Tensor:
        """Return where to sample one upsampled period, [N, S, S, 2] (x, y) in [-1, 1], S = 2R + 10."""
        period = 2 * (self.res - 1)
        x, y, shift = (inverse / period).unsqueeze(3).unbind(2)  # [N, 2, 1] each
        shift = shift + (self.res - 1) / 2 / period  # from the first pixel's centre, where the period has its own
        periods = (x * self.axis).unsqueeze(2) + (y * self.axis + shift).unsqueeze(3)
        folded = periods - periods.round()
        # The period's outermost samples are pixels' centres, 2 * period apart; -1 and 1 lie half a sample beyond.
        return (folded * (4 * period / (2 * period + 1))).permute(0, 2, 3, 1)

    def upsample(self, img: Tensor) -> Tensor:
        """Return one period of the reflected img [N, C, R, R], [N, C, 4R - 3, 4R - 3], its centre the first pixel."""
        x = F.pad(img, (self.res - 1, 0) * 2, mode="reflect")
        x = F.pad(x, _HALO * 2, mode="reflect")
        return upfirdn2d(x, self.taps, up=2, gain=4)

    def downsample(self, x: Tensor) -> Tensor:
        """Return every second pixel of the low-passed x [N, C, S, S], [N, C, R, R]."""
        return upfirdn2d(x, self.taps, down=2, flip_filter=True)


def sample(img: Tensor, grid: Tensor) -> Tensor:
    """Return img [N, C, H, W] at the coordinates `grid` [N, h, w, 2] (x, y), bilinearly, as [N, C, h, w].

    -1 and 1 are the outer edges of the outermost pixels, and all is zero beyond. Differentiable in img to any order.
    """
    return _Sample.apply(img, grid)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(img: Tensor, grid: Tensor) -> Tensor:
        return torch.ops.aten.grid_sampler_2d(img, grid, _BILINEAR, _ZEROS, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        img, grid = inputs
        ctx.save_for_backward(grid)
        ctx.size = img.shape[2:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _Spread.apply(dy, grid, *ctx.size), None


class _Spread(torch.autograd.Function):
    """The adjoint: add each of dy [N, C, h, w] to the pixels [N, C, height, width] that it was interpolated from."""

    @staticmethod
    def forward(dy: Tensor, grid: Tensor, height: int, width: int) -> Tensor:
        img = dy.new_empty(1).expand(*dy.shape[:2], height, width)  # read for its shape only
        spread, _ = torch.ops.aten.grid_sampler_2d_backward(dy, img, grid, _BILINEAR, _ZEROS, False, (True, False))
        return spread

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:
        (grid,) = ctx.saved_tensors
        return _Sample.apply(dx, grid), None, None, None


def reflected(index: NDArray[np.int64], res: int) -> NDArray[np.int64]:
    """Return the pixel in 0..res - 1 that stands at `index` of the endlessly reflected row."""
    period = 2 * (res - 1)
    index = index % period
    return np.minimum(index, period - index)


def _up_matrix(res: int) -> NDArray[np.float64]:
    """Return [4R - 3, R]: one period of a reflected row, upsampled by 2 with twice the taps."""
    matrix = np.zeros((4 * res - 3, res))
    row = np.arange(4 * res - 3)
    place = row - 2 * (res - 1)  # in half pixels, from the first pixel
    for tap, value in enumerate(SYM6):
        at = place + SYM6_CENTRE - tap
        on_pixel = at % 2 == 0
        np.add.at(matrix, (row[on_pixel], reflected(at[on_pixel] // 2, res)), 2 * value)
    return matrix


def _down_matrix(res: int) -> NDArray[np.float64]:
    """Return [R, 2R + 10]: correlation with the taps at every second place."""
    matrix = np.zeros((res, 2 * res + len(SYM6) - 2))
    row = np.arange(res)
    for tap, value in enumerate(SYM6):
        matrix[row, 2 * row + tap] = value
    return matrix
