"""Running the compiled epilogue kernels (cuda/epilogue.cu): their parameters, and how the work is cut into blocks.

How it is cut depends on sizes alone, never on the device, so that sums are made in the same order everywhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stylepipe.kernels._library import STRAIGHT, Traits, memory_format_of
from stylepipe.kernels._operands import RGB, SUMS, Operands, pack, pointer, real_of, structures
from stylepipe.kernels.native import Library, stream_of

_IN_FLIGHT = 4  # as in cuda/epilogue.cu
_BLOCKS_WANTED = 1024  # enough to fill any GPU
_MOST_ROUNDS = 8  # of _IN_FLIGHT vectors, before a thread has done enough
_PIXELS_ON_CPU = (16, 256)  # the fewest and the most that a block holds, with all their channels


class View(NamedTuple):
    """A tensor as N images of C channels and P pixels; `rows` where the channels of a pixel lie together."""

    images: int
    channels: int
    pixels: int
    rows: bool


class Backward(NamedTuple):
    """The gradient by x, and those sums over pixels that were asked for, [N, C] each, rgb_weight's [N, RGB, C]."""

    dx: Tensor
    sums: dict[str, Tensor]


def view_of(x: Tensor) -> View:
    """View x [N, C, H, W], contiguous or channels_last."""
    n, c, h, w = x.shape
    return View(n, c, h * w, rows=memory_format_of(x) == torch.channels_last)


def view_along(library: Library, x: Tensor, dim: int | None) -> View:
    """View x, contiguous or (`dim` being 1) channels_last, with its channels along `dim`; None for none."""
    if dim is None and library.threads > 1:
        return View(1, 1, x.numel(), rows=False)
    if memory_format_of(x) == torch.channels_last:
        return View(1, x.shape[1], x.numel() // x.shape[1], rows=True)
    assert dim is not None  # kernels for a CPU are asked for channels_last alone
    size = x.shape[dim]
    pixels = math.prod(x.shape[dim + 1 :])
    if pixels == 1:
        return View(1, size, x.numel() // size, rows=True)
    return View(math.prod(x.shape[:dim]), size, pixels, rows=False)


def makes_rgb(library: Library | Traits, x: Tensor, rgb_weight: Tensor) -> bool:
    """Tell whether the kernels make rgb beside y: channels_last, whole vectors, all channels in one block."""
    if memory_format_of(x) != torch.channels_last or rgb_weight.shape[1] != RGB:
        return False
    if library.threads == 1:
        return True
    vectors, rest = divmod(x.shape[1], _lanes(library, x.dtype))
    return rest == 0 and vectors > 1 and x.shape[1] // narrow_lanes(library, x.dtype) <= library.threads


def run_forward(library: Library, x: Tensor, view: View, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Return y like x, not empty, and rgb [N, P, RGB] if operands.rgb_weight is given, which makes_rgb must allow."""
    operands = operands.prepared(x.dtype)
    rgb = None
    if operands.rgb_weight is not None:  # by vectors only
        x = aligned(library, x)
        rgb = x.new_empty(view.images, view.pixels, RGB, dtype=real_of(x.dtype))
    y = torch.empty_like(x)
    work = _Work.of(library, view, (x, y), _lanes(library, x.dtype))
    params = structures(real_of(x.dtype)).forward(
        x.data_ptr(), y.data_ptr(), pointer(rgb), pack(operands, x.dtype), *work.place(view)
    )  # fmt: skip
    library.launch(f"epilogue_{_kind(operands, rgb)}{work.name}", work.grid, work.block, params, stream_of(x.device))
    return y, rgb


def run_backward(
    library: Library,
    dy: Tensor,
    ref: Tensor,
    view: View,
    operands: Operands,
    wanted: set[str],
    *,
    ref_is_output: bool = False,
    drgb: Tensor | None = None,
) -> Backward:
    """Return the gradients of run_forward.

    Args:
        library, view, operands: as they were there.
        dy: of the layout of `ref`.
        ref: the x of run_forward; with `ref_is_output` its y, for a straight activation of positive gain and at most
            a bias.
        wanted: names of SUMS.
        drgb: [N, P, RGB], the gradient by rgb.
    """
    operands = operands.prepared(ref.dtype)
    if ref_is_output and operands.clamp is not None:  # y was limited, then rounded: the limit is the rounded one
        rounded = torch.tensor(operands.clamp, dtype=ref.dtype, device="cpu")
        operands = operands._replace(clamp=rounded.item())
    if drgb is not None:  # by vectors only
        dy, ref = aligned(library, dy), aligned(library, ref)
    real = real_of(ref.dtype)
    dx = torch.empty_like(ref)
    lanes = narrow_lanes(library, ref.dtype) if view.rows else _lanes(library, ref.dtype)
    work = _Work.of(library, view, (dy, ref, dx), lanes)
    names = [name for name in SUMS if name in wanted and name != "rgb_weight"]
    partial = ref.new_empty(len(names), *work.partial_shape(view), dtype=real)
    sums = dict(zip(names, partial, strict=True))
    if "rgb_weight" in wanted:
        sums["rgb_weight"] = ref.new_empty(view.images, work.chunks, RGB, view.channels, dtype=real)
    params = structures(real).backward(
        dy.data_ptr(), ref.data_ptr(), dx.data_ptr(), pointer(drgb), pack(operands, ref.dtype),
        structures(real).sums(*(pointer(sums.get(name)) for name in SUMS)), *work.place(view), ref_is_output,
    )  # fmt: skip
    kernel = f"epilogue_backward_{_kind(operands, drgb)}{work.name}"
    library.launch(kernel, work.grid, work.block, params, stream_of(ref.device))
    found = dict(zip(names, partial.sum(2 if view.rows else 3), strict=True))
    if "rgb_weight" in wanted:
        found["rgb_weight"] = sums["rgb_weight"].sum(1)
    return Backward(dx, found)


class _Work(NamedTuple):
    """How a view is cut into blocks."""

    name: str  # the end of the kernel's name
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    tiles: int  # along the channels
    chunks: int  # along the pixels
    pixels_per_block: int

    @classmethod
    def of(cls, library: Library, view: View, tensors: tuple[Tensor, ...], lanes: int) -> _Work:
        inner = view.channels if view.rows else view.pixels
        vectors = inner % lanes == 0 and all(is_aligned(library, tensor) for tensor in tensors)
        lanes = lanes if vectors else 1
        name = f"{'rows' if view.rows else 'planes'}_{'vector' if vectors else 'single'}"
        if view.rows:
            return cls(name, *_cut_rows(view, inner // lanes, library.threads))
        return cls(name, *_cut_planes(view, inner // lanes, lanes, library.threads))

    def place(self, view: View) -> tuple[int, ...]:
        """Return the fields that end both structs."""
        return view.images, view.pixels, view.channels, self.tiles, self.chunks, self.pixels_per_block

    def partial_shape(self, view: View) -> tuple[int, ...]:
        """Return the shape of the blocks' shares of one sum."""
        if view.rows:
            return view.images, self.chunks, view.channels
        return view.images, view.channels, self.chunks


def _kind(operands: Operands, rgb: Tensor | None) -> str:
    if operands.act not in STRAIGHT:
        return "curved_"
    return "" if rgb is None else "rgb_"


def _cut_rows(view: View, vectors: int, threads: int) -> tuple[Any, ...]:
    """Cut along pixels, and along channels where they are more than a block's threads."""
    if threads == 1:
        fewest, most = _PIXELS_ON_CPU
        pixels_per_block = min(max(view.images * view.pixels // _BLOCKS_WANTED, fewest), most)
        chunks = -(-view.pixels // pixels_per_block)
        return (view.images * chunks, 1, 1), (1, 1, 1), 1, chunks, pixels_per_block
    tiles = -(-vectors // threads)
    across = -(-vectors // tiles)
    down = max(1, min(threads // across, view.pixels))
    pixels_per_block, chunks = _chunks(view.pixels, down, view.images * tiles)
    return (view.images * chunks * tiles, 1, 1), (across, down, 1), tiles, chunks, pixels_per_block


def _cut_planes(view: View, vectors: int, lanes: int, threads: int) -> tuple[Any, ...]:
    """Cut along pixels, several planes to a block where they are small; as wide as a power of two, for sums."""
    across = min(threads, 1 << (vectors - 1).bit_length())
    planes = view.images * view.channels
    down = min(threads // across, planes)
    groups = -(-planes // down)
    pixels_per_block, chunks = _chunks(view.pixels, across * lanes, groups)
    return (groups * chunks, 1, 1), (across, down, 1), 1, chunks, pixels_per_block


def _chunks(pixels: int, at_once: int, blocks: int) -> tuple[int, int]:
    """Return (pixels per block, blocks along the pixels), so much to a block that about _BLOCKS_WANTED are made."""
    rounds = blocks * pixels // (at_once * _IN_FLIGHT * _BLOCKS_WANTED)
    per_block = at_once * _IN_FLIGHT * min(max(rounds, 1), _MOST_ROUNDS)
    return per_block, -(-pixels // per_block)


def aligned(library: Library, tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its vectors do not lie at multiples of their size, as in some views."""
    return tensor if is_aligned(library, tensor) else tensor.clone()


def is_aligned(library: Library, tensor: Tensor) -> bool:
    """Tell whether a tensor begins at a multiple of a vector's size."""
    return tensor.data_ptr() % library.vector_bytes == 0


def narrow_lanes(library: Library | Traits, dtype: torch.dtype) -> int:
    """Return the width of vectors in kernels that keep sums, NARROW in cuda/sums.cuh."""
    return _lanes(library, dtype) if library.threads == 1 else min(4, _lanes(library, dtype))


def _lanes(library: Library | Traits, dtype: torch.dtype) -> int:
    return max(1, library.vector_bytes // dtype.itemsize)
