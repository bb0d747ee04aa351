"""Resampling under affine transforms: against a padded reference, its identities and its derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from stylepipe.augment.warp import Warp, reflected, sample
from stylepipe.augment.wavelets import SYM6, SYM6_CENTRE

SIZES = (8, 16, 32)


def inverse(matrix: list[list[float]], n: int = 2) -> Tensor:
    return torch.tensor(matrix)[None].expand(n, 2, 3)


def turned(degrees: float, scale: float = 1, x: float = 0, y: float = 0) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    cos, sin = float(angle.cos()) * scale, float(angle.sin()) * scale
    return inverse([[cos, -sin, x], [sin, cos, y]])


def warped_by_definition(img: Tensor, inverse: Tensor, repeats: int) -> Tensor:
    """Reflect `repeats` times to all sides, upsample and downsample with zeros inserted, interpolate pixel by pixel."""
    res = img.shape[3]
    taps = torch.tensor(SYM6)
    margin = repeats * (res - 1)
    index = torch.tensor(reflected(np.arange(-margin, res + margin), res))
    padded = img[:, :, index][:, :, :, index]
    up = padded.new_zeros(*img.shape[:2], 2 * padded.shape[2], 2 * padded.shape[2])
    up[:, :, ::2, ::2] = padded
    kernel = torch.outer(taps, taps).expand(img.shape[1], 1, 12, 12)
    # up[n] = sum of 2 taps[t] x[n + centre - t]: a correlation with the flipped taps.
    before, after = 11 - SYM6_CENTRE, SYM6_CENTRE
    up = F.conv2d(F.pad(up, (before, after) * 2), 4 * kernel.flip(2, 3), groups=img.shape[1])
    out = []
    for one, matrix in zip(up, inverse, strict=True):
        at = (torch.arange(2 * res + 10, dtype=img.dtype) - SYM6_CENTRE) / 2 - (res - 1) / 2
        source = torch.stack((*torch.meshgrid(at, at, indexing="xy"), torch.ones(len(at), len(at)).to(img)))
        x, y = (torch.einsum("ik,khw->ihw", matrix, source) + (res - 1) / 2 + margin) * 2
        left, top = x.floor().long(), y.floor().long()
        assert min(left.min(), top.min()) >= 12  # where the zeros beyond are not felt
        assert max(left.max(), top.max()) < up.shape[3] - 12
        dx, dy = x - left, y - top
        rows = [one[:, top + k, left] * (1 - dx) + one[:, top + k, left + 1] * dx for k in (0, 1)]
        out.append(rows[0] * (1 - dy) + rows[1] * dy)
    return F.conv2d(torch.stack(out), kernel, stride=2, groups=img.shape[1])


@pytest.mark.parametrize("res", SIZES)
@pytest.mark.parametrize(
    "matrix",
    [turned(0), turned(35), turned(120, 1.7, 3.3, -2.1), turned(-80, 0.4), turned(45, 2.4, 7, 9)],
    ids=["identity", "turned", "smaller", "larger", "far outside"],
)
def test_one_period_holds_all_padding_there_is(res: int, matrix: Tensor) -> None:
    img = torch.randn(2, 1, res, res, dtype=torch.float64)
    result = Warp(res)(img.float(), matrix)
    # float32 coordinates of up to 4 res samples: 1e-6 of a sample, times the contrast of white noise
    torch.testing.assert_close(
        result.double(), warped_by_definition(img, matrix.double(), 7 if res == 8 else 4), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("res", SIZES)
def test_matrices_and_ops_resample_alike(res: int) -> None:
    warp, img, large = Warp(res), torch.randn(2, 3, res, res), torch.randn(2, 3, 2 * res + 10, 2 * res + 10)
    torch.testing.assert_close(warp.up @ img @ warp.up.t(), warp.upsample(img), rtol=0, atol=1e-5)
    torch.testing.assert_close(warp.down @ large @ warp.down.t(), warp.downsample(large), rtol=0, atol=1e-5)


@pytest.mark.parametrize("res", SIZES)
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-2, 5), (0, -40)])
def test_whole_pixels_move_without_loss(res: int, shift: tuple[int, int]) -> None:
    """Even shifts of a wavelet are orthogonal: up and down again is the identity. What moves in is reflected."""
    img, (x, y) = torch.randn(2, 3, res, res), shift
    columns, rows = (torch.tensor(reflected(np.arange(res) + by, res)) for by in shift)
    result = Warp(res)(img, inverse([[1, 0, x], [0, 1, y]]))
    torch.testing.assert_close(result, img[:, :, rows][:, :, :, columns], rtol=0, atol=1e-4)


def test_a_constant_stays_constant() -> None:
    result = Warp(16)(torch.full((2, 1, 16, 16), 0.7), turned(33, 1.4, 2.2, -9.1))
    torch.testing.assert_close(result, torch.full_like(result, 0.7), rtol=0, atol=1e-5)


def test_the_period_is_folded_at_pixel_centres() -> None:
    assert reflected(np.arange(-5, 10), 4).tolist() == [1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3]


def test_a_sample_does_not_depend_on_its_companions() -> None:
    warp, img = Warp(16), torch.randn(4, 3, 16, 16)
    matrices = torch.cat([turned(20), turned(77, 1.9, 4)])
    torch.testing.assert_close(warp(img[2:3], matrices[2:3]), warp(img, matrices)[2:3], rtol=0, atol=1e-6)


# --- derivatives ---


def test_sampling_is_differentiable_to_second_order() -> None:
    grid = torch.rand(2, 5, 6, 2, dtype=torch.float64) * 2.4 - 1.2  # beyond the edges too
    img = torch.randn(2, 2, 4, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: sample(x, grid).sin(), img)
    assert gradgradcheck(lambda x: sample(x, grid).sin(), img)


def test_sampling_is_pytorchs() -> None:
    img, grid = torch.randn(2, 2, 4, 7), torch.rand(2, 5, 6, 2) * 2.4 - 1.2
    torch.testing.assert_close(sample(img, grid), F.grid_sample(img, grid, align_corners=False), rtol=0, atol=0)


def test_the_gradient_is_the_adjoint() -> None:
    grid = torch.rand(2, 9, 9, 2, dtype=torch.float64) * 2 - 1
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    result = sample(x, grid)
    (spread,) = torch.autograd.grad(result, x, y)
    assert float((result.detach() * y).sum()) == pytest.approx(float((x.detach() * spread).sum()))
