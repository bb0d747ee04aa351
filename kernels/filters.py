"""FIR filters and the usual ways to resample with them: thin callers of upfirdn2d that choose the padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stylepipe.kernels.upfirdn2d import Pair, expand_padding, expand_pair, upfirdn2d


def setup_filter(
    taps: torch.Tensor | Sequence[float] | Sequence[Sequence[float]] | float,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """Return a filter for upfirdn2d, float32: [n], which stands for its outer product with itself, or [fh, fw].

    Args:
        taps: a number, [n] taps of a separable filter, or [fh, fw].
        normalize: scale to a sum of 1 (unit gain at DC).
        flip_filter: reverse the taps.
        gain: factor of the filtered image (a separable filter takes its root, for it is applied twice).
        separable: True keeps [n] taps as they are, which kernels are fastest with; False gives their outer product,
            [n, n]. None: True where there are [n].

    Raises:
        ValueError: taps of another shape, or a gain below 0 of a separable filter.
    """
    f = torch.as_tensor(taps, dtype=torch.float32)
    if f.ndim == 0:
        f = f[None]
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"setup_filter: taps of shape {list(f.shape)}: expected a number, [n] or [fh, fw], not empty")
    if separable and f.ndim == 2:
        raise ValueError(f"setup_filter: separable=True needs [n] taps, found {list(f.shape)}")
    if f.ndim == 1 and separable is False:
        f = torch.outer(f, f)
    if f.ndim == 1 and gain < 0:
        raise ValueError(f"setup_filter: gain {gain}: expected 0 or more, or separable=False: a root is taken of it")
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return f * gain ** (f.ndim / 2)


def upsample2d(
    x: torch.Tensor, f: torch.Tensor, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1
) -> torch.Tensor:
    """Return x [N, C, H, W] enlarged by `up`, its mean kept; `padding` is added to what aligns input and output."""
    upx, upy = expand_pair(up, "up")
    x0, x1, y0, y1 = expand_padding(padding)
    fh, fw = f.shape[0], f.shape[-1]
    pads = [x0 + (fw + upx - 1) // 2, x1 + (fw - upx) // 2, y0 + (fh + upy - 1) // 2, y1 + (fh - upy) // 2]
    return upfirdn2d(x, f, up=up, padding=pads, flip_filter=flip_filter, gain=gain * upx * upy)


def downsample2d(
    x: torch.Tensor, f: torch.Tensor, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1
) -> torch.Tensor:
    """Return x [N, C, H, W] reduced by `down`; `padding` is added to what aligns input and output."""
    downx, downy = expand_pair(down, "down")
    x0, x1, y0, y1 = expand_padding(padding)
    fh, fw = f.shape[0], f.shape[-1]
    pads = [x0 + (fw - downx + 1) // 2, x1 + (fw - downx) // 2, y0 + (fh - downy + 1) // 2, y1 + (fh - downy) // 2]
    return upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter, gain=gain)


def filter2d(
    x: torch.Tensor, f: torch.Tensor, padding: Pair = 0, flip_filter: bool = False, gain: float = 1
) -> torch.Tensor:
    """Return x [N, C, H, W] filtered at the same size; `padding` is added to what keeps the size."""
    x0, x1, y0, y1 = expand_padding(padding)
    fh, fw = f.shape[0], f.shape[-1]
    pads = [x0 + fw // 2, x1 + (fw - 1) // 2, y0 + fh // 2, y1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain)
