"""Running the compiled FIR kernels (cuda/upfirdn2d.cu, cuda/fused_fir.cu): which one fits, parameters and blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stylepipe.kernels._epilogue import Backward, aligned, is_aligned, narrow_lanes
from stylepipe.kernels._library import Traits, memory_format_of
from stylepipe.kernels._operands import SUMS, Operands, pack, pointer, real_number, real_of, structure, structures
from stylepipe.kernels.native import Library, stream_of

FUSED_TAPS = 4
"""Taps of the filters that are joined with an epilogue."""

_TILED_TAPS = (4, 12)  # a filter of fewer is filled up with zeros
_TILED_FACTORS = ((1, 1), (2, 1), (1, 2))  # (up, down), the same along both axes
_LINES_PER_STRIP = (32, 16, 8, 4)  # the first that leaves enough threads; a strip reads up to 3 rows of its neighbours
_THREADS_WANTED = 2**17  # fills any GPU
_GENERAL_BLOCKS = 2**16
_MOST_BLOCKS_YZ = 65535  # of a grid
_TILE_HEIGHT = 16


class Geometry(NamedTuple):
    """What defines an upfirdn2d beside its tensors: (x, y) factors, (x0, x1, y0, y1) padding, the output's size."""

    up: tuple[int, int]
    down: tuple[int, int]
    padding: tuple[int, int, int, int]
    flip_filter: bool
    gain: float
    out_h: int
    out_w: int


def plain_geometry(x: Tensor, f: Tensor, padding: int, gain: float = 1) -> Geometry:
    """Return the geometry of a filter f [taps] without resampling, padded alike on all sides of x."""
    height, width = (size + 2 * padding + 1 - f.numel() for size in x.shape[2:])
    return Geometry((1, 1), (1, 1), (padding,) * 4, False, gain, height, width)


def transposed_padding(f: Tensor, padding: int) -> int:
    """Return the padding of the transposed filter, which takes the gradient back to x."""
    return f.shape[-1] - 1 - padding


def run_upfirdn2d(library: Library, x: Tensor, f: Tensor, geometry: Geometry) -> Tensor:
    """Return upfirdn2d of x [N, C, H, W], contiguous or channels_last, in its format; f is [taps] or [fh, fw]."""
    n, c, _, _ = x.shape
    memory_format = memory_format_of(x)
    shape = (n, c, geometry.out_h, geometry.out_w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    f = f.to(dtype=real_of(x.dtype), device=x.device).contiguous()
    taps = _tiled_taps(f, geometry)
    rows = memory_format == torch.channels_last
    too_many = n > _MOST_BLOCKS_YZ if rows else n * c * _tiles(y) >= 2**31
    if taps is None or too_many:
        kernel, grid, block, params = _general(library, x, y, f, geometry, rows)
    elif rows:
        kernel, grid, block, params = _rows(library, x, y, f, geometry, taps)
    else:
        kernel, grid, block, params = _planes(library, x, y, f, geometry, taps)
    library.launch(kernel, grid, block, params, stream_of(x.device))
    return y


def fits_fused(library: Library | Traits, x: Tensor, f: Tensor) -> bool:
    """Tell whether the fused kernels take x and f: channels_last, whole vectors, a separable filter of 4 taps."""
    return (
        f.ndim == 1
        and f.numel() == FUSED_TAPS
        and x.ndim == 4
        and memory_format_of(x) == torch.channels_last
        and 0 < x.shape[0] <= _MOST_BLOCKS_YZ
        and x.shape[1] % narrow_lanes(library, x.dtype) == 0
    )


def run_fir_epilogue(library: Library, x: Tensor, f: Tensor, geometry: Geometry, operands: Operands) -> Tensor:
    """Return epilogue(FIR(x)); x must pass fits_fused."""
    y = _empty_rows(x, geometry)
    _run_fused(library, "fir_epilogue", x, y, f, geometry, operands)
    return y


def run_fir_epilogue_backward(
    library: Library, dy: Tensor, x: Tensor, f: Tensor, geometry: Geometry, operands: Operands, wanted: set[str]
) -> Backward:
    """Return the gradient by FIR(x), which is to be filtered on to x, and the sums wanted."""
    dz = torch.empty_like(dy)
    sums = _run_fused(library, "fir_epilogue_backward", x, dz, f, geometry, operands, wanted=wanted, dy=dy)
    return Backward(dz, sums)


def run_act_fir(
    library: Library, x: Tensor, f: Tensor, geometry: Geometry, operands: Operands
) -> tuple[Tensor, Tensor]:
    """Return FIR(act(x + b)) and the codes [N, H, W, C / 4] uint8 (C / 2 for float64) that the gradient needs."""
    y = _empty_rows(x, geometry)
    n, c, h, w = x.shape
    codes = torch.empty(n, h, w, c // narrow_lanes(library, x.dtype), dtype=torch.uint8, device=x.device)
    _run_fused(library, "act_fir", x, y, f, geometry, operands, codes=codes)
    return y, codes


def run_act_fir_backward(
    library: Library, dy: Tensor, codes: Tensor, f: Tensor, geometry: Geometry, operands: Operands, with_db: bool
) -> Backward:
    """Return the gradients of act_fir; `geometry` is that of the transposed filter, from dy to x."""
    dx = _empty_rows(dy, geometry)
    wanted = {"bias"} if with_db else set()
    sums = _run_fused(library, "act_fir_backward", dy, dx, f, geometry, operands, wanted=wanted, codes=codes)
    return Backward(dx, sums)


def _tiled_taps(f: Tensor, geometry: Geometry) -> int | None:
    """Return the length of the tiled kernel that fits, or None for none."""
    (upx, upy), (downx, downy) = geometry.up, geometry.down
    if f.ndim != 1 or upx != upy or downx != downy or (upx, downx) not in _TILED_FACTORS:
        return None
    return next((taps for taps in _TILED_TAPS if f.numel() <= taps), None)


def _empty_rows(x: Tensor, geometry: Geometry) -> Tensor:
    shape = (*x.shape[:2], geometry.out_h, geometry.out_w)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# --- kernels for channels_last ---


class _Rows(NamedTuple):
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: ctypes.Structure


def _cut(library: Library, x: Tensor, y: Tensor, f: Tensor, geometry: Geometry, lanes: int) -> _Rows:
    """Cut into strips of rows, and blocks of channels by pairs of columns."""
    n, c, h, w = x.shape
    up, (x0, _, y0, _) = geometry.up[0], geometry.padding
    first_x, pairs = _pairs(x0, geometry.out_w, up)
    # Lines are output rows, or with up = 2 pairs of them, as the columns always go in pairs.
    first_y, lines = _pairs(y0, geometry.out_h, up) if up == 2 else (0, geometry.out_h)
    vectors = c // lanes
    tiles = -(-vectors // library.threads)
    across = -(-vectors // tiles)
    columns = max(1, min(library.threads // across, pairs))
    groups = -(-pairs // columns)
    threads_per_line = n * pairs * vectors
    strip = next((s for s in _LINES_PER_STRIP if threads_per_line * lines >= s * _THREADS_WANTED), _LINES_PER_STRIP[-1])
    strip = max(strip, -(-lines // _MOST_BLOCKS_YZ))
    params = _fir_structures(real_of(x.dtype)).rows(
        x.data_ptr(), y.data_ptr(), f.data_ptr(), geometry.gain, c, h, w, geometry.out_h, geometry.out_w,
        f.numel(), geometry.flip_filter, x0, y0, first_x, first_y, lines, strip, tiles,
    )  # fmt: skip
    return _Rows((groups * tiles, -(-lines // strip), n), (across, columns, 1), params)


def _pairs(pad: int, size: int, up: int) -> tuple[int, int]:
    """Return (the first pair m, how many): outputs 2m - 1 + pad and 2m + pad with up = 2, else 2m and 2m + 1."""
    if up == 1:
        return 0, -(-size // 2)
    first = -(pad // 2)
    return first, (size - pad) // 2 - first + 1


def _rows(library: Library, x: Tensor, y: Tensor, f: Tensor, geometry: Geometry, taps: int) -> tuple[Any, ...]:
    lanes = library.vector_bytes // x.dtype.itemsize
    vectors = taps == _TILED_TAPS[0] and x.shape[1] % lanes == 0 and is_aligned(library, x) and is_aligned(library, y)
    grid, block, params = _cut(library, x, y, f, geometry, lanes if vectors else 1)
    kernel = f"upfirdn2d_rows_{'vector' if vectors else 'single'}_{geometry.up[0]}_{geometry.down[0]}_{taps}"
    return kernel, grid, block, params


def _run_fused(
    library: Library,
    kernel: str,
    x: Tensor,
    y: Tensor,
    f: Tensor,
    geometry: Geometry,
    operands: Operands,
    wanted: Collection[str] = (),
    dy: Tensor | None = None,
    codes: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run a kernel of cuda/fused_fir.cu and return the sums wanted, [N, C] each."""
    x, dy = aligned(library, x), None if dy is None else aligned(library, dy)
    real = real_of(x.dtype)
    f = f.to(dtype=real, device=x.device).contiguous()
    operands = operands.prepared(x.dtype)
    grid, block, params = _cut(library, x, y, f, geometry, narrow_lanes(library, x.dtype))
    n, c = x.shape[:2]
    tiles = params.tiles
    shape = (n, grid[1] * grid[0] // tiles, c)
    names = [name for name in SUMS if name in wanted]
    partial = x.new_empty(len(names), *shape, dtype=real)
    sums = dict(zip(names, partial, strict=True))
    whole = _fir_structures(real).fused(
        params, pack(operands, x.dtype), structures(real).sums(*(pointer(sums.get(name)) for name in SUMS)),
        pointer(dy), pointer(codes),
    )  # fmt: skip
    library.launch(kernel, grid, block, whole, stream_of(x.device))
    return dict(zip(names, partial.sum(2), strict=True))


# --- kernels for contiguous tensors, and for everything else ---


def _tile_width(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float64 else 64  # TILE_W in the source


def _tiles(y: Tensor) -> int:
    return -(-y.shape[3] // _tile_width(y.dtype)) * -(-y.shape[2] // _TILE_HEIGHT)


def _planes(library: Library, x: Tensor, y: Tensor, f: Tensor, geometry: Geometry, taps: int) -> tuple[Any, ...]:
    n, c, h, w = x.shape
    x0, _, y0, _ = geometry.padding
    tiles_x = -(-geometry.out_w // _tile_width(x.dtype))
    whole_rows = is_aligned(library, x) and w * x.dtype.itemsize % library.vector_bytes == 0
    params = _fir_structures(real_of(x.dtype)).planes(
        x.data_ptr(), y.data_ptr(), f.data_ptr(), geometry.gain, h, w, geometry.out_h, geometry.out_w,
        f.numel(), geometry.flip_filter, x0, y0, tiles_x, _tiles(y) // tiles_x, whole_rows,
    )  # fmt: skip
    kernel = f"upfirdn2d_planes_{geometry.up[0]}_{geometry.down[0]}_{taps}"
    return kernel, (_tiles(y) * n * c, 1, 1), (library.threads, 1, 1), params


def _general(library: Library, x: Tensor, y: Tensor, f: Tensor, geometry: Geometry, rows: bool) -> tuple[Any, ...]:
    _, c, h, w = x.shape
    x0, _, y0, _ = geometry.padding
    params = _fir_structures(real_of(x.dtype)).general(
        x.data_ptr(), y.data_ptr(), f.data_ptr(), geometry.gain, y.numel(), c, h, w, geometry.out_h, geometry.out_w,
        f.shape[0], f.shape[-1], f.ndim == 1, geometry.flip_filter, *geometry.up, *geometry.down, x0, y0, rows,
    )  # fmt: skip
    blocks = min(-(-y.numel() // library.threads), _GENERAL_BLOCKS)
    return "upfirdn2d_general", (blocks, 1, 1), (library.threads, 1, 1), params


class _FirStructures(NamedTuple):
    rows: type[ctypes.Structure]
    planes: type[ctypes.Structure]
    general: type[ctypes.Structure]
    fused: type[ctypes.Structure]


@cache
def _fir_structures(real: torch.dtype) -> _FirStructures:
    """Return the structs of cuda/fir_rows.cuh, cuda/upfirdn2d.cu and cuda/fused_fir.cu, field by field."""
    address, int64, number = ctypes.c_void_p, ctypes.c_int64, real_number(real)

    def ints(names: str) -> dict[str, Any]:
        return dict.fromkeys(names.split(), ctypes.c_int)

    tensors = {"x": address, "y": address, "f": address, "gain": number}
    sizes = ints("in_h in_w out_h out_w")
    rows = structure(
        "FirParams", **tensors, channels=ctypes.c_int, **sizes,
        **ints("taps flip_filter pad_x pad_y first_pair_x first_pair_y lines lines_per_strip tiles"),
    )  # fmt: skip
    planes = structure(
        "FirPlanesParams", **tensors, **sizes, **ints("taps flip_filter pad_x pad_y tiles_x tiles_y aligned")
    )
    general = structure(
        "FirGeneralParams", **tensors, outputs=int64, channels=ctypes.c_int, **sizes,
        **ints("fh fw separable flip_filter up_x up_y down_x down_y pad_x pad_y channels_last"),
    )  # fmt: skip
    epilogue = structures(real)
    fused = structure(
        "FusedFirParams", fir=rows, operands=epilogue.operands, sums=epilogue.sums, dy=address, codes=address
    )
    return _FirStructures(rows, planes, general, fused)
