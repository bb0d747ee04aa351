"""Running the compiled epilogue kernels (cuda/epilogue.cu): their parameters, and how the work is cut into blocks.

How it is cut depends on sizes alone, never on the device, so that sums are made in the same order everywhere.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stylepipe.kernels._library import memory_format_of
from stylepipe.kernels.native import Library, stream_of

ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")
"""In the order of the enum in cuda/common.cuh."""

RGB = 3
"""Colours that the kernels make beside an activation, as in cuda/channel.cuh."""

SUMS = ("scale", "bias", "next_scale", "noise_strength", "rgb_weight")
"""The operands whose gradients are sums over pixels."""

_IN_FLIGHT = 4  # as in cuda/epilogue.cu
_BLOCKS_WANTED = 2048  # enough to fill any GPU
_MOST_ROUNDS = 8  # of _IN_FLIGHT vectors, before a thread has done enough
_PIXELS_ON_CPU = (16, 256)  # the fewest and the most that a block holds, with all their channels


class Operands(NamedTuple):
    """What an epilogue joins to an activation of N images, C channels and P pixels; None where absent.

    Attributes:
        scale, next_scale: [N, C].
        bias: [C].
        noise: [N or 1, P], the pixels of an image next to one another.
        noise_strength: [].
        rgb_weight: [N, RGB, C].
    """

    scale: Tensor | None = None
    bias: Tensor | None = None
    next_scale: Tensor | None = None
    noise: Tensor | None = None
    noise_strength: Tensor | None = None
    rgb_weight: Tensor | None = None
    act: str = "linear"
    alpha: float = 0
    gain: float = 1
    clamp: float | None = None

    def prepared(self, dtype: torch.dtype) -> Operands:
        """Return them as kernels for activations of this type read them."""
        real = real_of(dtype)

        def packed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(real).contiguous()

        noise = None if self.noise is None else self.noise.to(real)
        if noise is not None and noise.stride(1) != 1:
            noise = noise.contiguous()
        small = {name: packed(getattr(self, name)) for name in SUMS}
        return self._replace(noise=noise, **small)


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


def slope_below(act: str, alpha: float) -> float:
    """Return the slope below 0 of a straight activation."""
    return {"linear": 1.0, "relu": 0.0}.get(act, alpha)


def real_of(dtype: torch.dtype) -> torch.dtype:
    """Return the type that kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def view_of(x: Tensor) -> View:
    """View x [N, C, H, W], contiguous or channels_last."""
    n, c, h, w = x.shape
    return View(n, c, h * w, rows=memory_format_of(x) == torch.channels_last)


def view_along(x: Tensor, dim: int | None) -> View:
    """View x, contiguous or (`dim` being 1) channels_last, with its channels along `dim`; None for none."""
    if memory_format_of(x) == torch.channels_last:
        return View(1, x.shape[1], x.numel() // x.shape[1], rows=True)
    if dim is None:
        return View(1, 1, x.numel(), rows=False)
    size = x.shape[dim]
    pixels = math.prod(x.shape[dim + 1 :])
    if pixels == 1:
        return View(1, size, x.numel() // size, rows=True)
    return View(math.prod(x.shape[:dim]), size, pixels, rows=False)


def makes_rgb(library: Library, x: Tensor, rgb_weight: Tensor) -> bool:
    """Tell whether the kernels make rgb beside y: channels_last, whole vectors, all channels in one block."""
    if memory_format_of(x) != torch.channels_last or rgb_weight.shape[1] != RGB:
        return False
    if library.threads == 1:
        return True
    vectors, rest = divmod(x.shape[1], _lanes(library, x.dtype))
    fits = rest == 0 and 1 < vectors and x.shape[1] // narrow_lanes(library, x.dtype) <= library.threads
    return fits and x.data_ptr() % library.vector_bytes == 0


def run_forward(library: Library, x: Tensor, view: View, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """Return y like x, and rgb [N, P, RGB] if operands.rgb_weight is given, which makes_rgb must allow."""
    operands = operands.prepared(x.dtype)
    y = torch.empty_like(x)
    with_rgb = operands.rgb_weight is not None
    rgb = x.new_empty(view.images, view.pixels, RGB, dtype=real_of(x.dtype)) if with_rgb else None
    if x.numel() == 0:
        return y, rgb
    work = _Work.of(library, view, (x, y), _lanes(library, x.dtype), sums=False)
    params = _structures(real_of(x.dtype)).forward(
        x.data_ptr(), y.data_ptr(), _pointer(rgb), _operands(operands, x.dtype), *work.place(view)
    )  # fmt: skip
    kernel = f"epilogue_{'rgb_' if with_rgb else ''}{work.name}"
    library.launch(kernel, work.grid, work.block, params, stream_of(x.device))
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
    real = real_of(ref.dtype)
    dx = torch.empty_like(ref)
    lanes = narrow_lanes(library, ref.dtype) if view.rows else _lanes(library, ref.dtype)
    work = _Work.of(library, view, (dy, ref, dx), lanes, sums=True)
    shapes = {name: work.partial_shape(view, name) for name in SUMS if name in wanted}
    partial = {name: torch.empty(shape, dtype=real, device=ref.device) for name, shape in shapes.items()}
    if ref.numel() > 0:
        params = _structures(real).backward(
            dy.data_ptr(), ref.data_ptr(), dx.data_ptr(), _pointer(drgb), _operands(operands, ref.dtype),
            _structures(real).sums(*(_pointer(partial.get(name)) for name in SUMS)),
            *work.place(view), ref_is_output,
        )  # fmt: skip
        kernel = f"epilogue_backward_{'rgb_' if drgb is not None else ''}{work.name}"
        library.launch(kernel, work.grid, work.block, params, stream_of(ref.device))
    return Backward(dx, {name: tensor.sum(1 if view.rows else 2) for name, tensor in partial.items()})


class _Work(NamedTuple):
    """How a view is cut into blocks."""

    name: str  # the end of the kernel's name
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    tiles: int  # along the channels
    chunks: int  # along the pixels
    pixels_per_block: int

    @classmethod
    def of(cls, library: Library, view: View, tensors: tuple[Tensor, ...], lanes: int, *, sums: bool) -> _Work:
        inner = view.channels if view.rows else view.pixels
        aligned = all(tensor.data_ptr() % library.vector_bytes == 0 for tensor in tensors)
        vectors = inner % lanes == 0 and aligned
        cut = _cut_rows if view.rows else _cut_planes
        name = f"{'rows' if view.rows else 'planes'}_{'vector' if vectors else 'single'}"
        return cls(name, *cut(view, inner // lanes if vectors else inner, lanes if vectors else 1, library.threads))

    def place(self, view: View) -> tuple[int, ...]:
        """Return the fields that end both structs."""
        return view.images, view.pixels, view.channels, self.tiles, self.chunks, self.pixels_per_block

    def partial_shape(self, view: View, name: str) -> tuple[int, ...]:
        if not view.rows:
            return view.images, view.channels, self.chunks
        colours = (RGB,) if name == "rgb_weight" else ()
        return view.images, self.chunks, *colours, view.channels


def _cut_rows(view: View, vectors: int, lanes: int, threads: int) -> tuple[Any, ...]:
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


def narrow_lanes(library: Library, dtype: torch.dtype) -> int:
    """Return the width of vectors in kernels that keep sums, NARROW in cuda/sums.cuh."""
    return _lanes(library, dtype) if library.threads == 1 else min(4, _lanes(library, dtype))


def _lanes(library: Library, dtype: torch.dtype) -> int:
    return max(1, library.vector_bytes // dtype.itemsize)


class _Structures(NamedTuple):
    operands: type[ctypes.Structure]
    sums: type[ctypes.Structure]
    forward: type[ctypes.Structure]
    backward: type[ctypes.Structure]


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """Return the ctypes form of a struct of the source."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


@cache
def _structures(real: torch.dtype) -> _Structures:
    """Return the structs of cuda/channel.cuh and cuda/epilogue.cu, field by field."""
    pointer, int64, number = ctypes.c_void_p, ctypes.c_int64, real_number(real)
    operands = structure(
        "Operands",
        **dict.fromkeys(("scale", "bias", "next_scale", "noise", "noise_strength", "rgb_weight"), pointer),
        noise_stride=int64, alpha=number, gain=number, clamp=number, act=ctypes.c_int,
    )  # fmt: skip
    sums = structure("Sums", **dict.fromkeys(SUMS, pointer))
    place = {"images": int64, "pixels": int64, **dict.fromkeys(("channels", "tiles", "chunks", "pixels_per_block"), ctypes.c_int)}
    forward = structure("EpilogueParams", x=pointer, y=pointer, rgb=pointer, operands=operands, **place)
    backward = structure(
        "EpilogueBackwardParams",
        dy=pointer, ref=pointer, dx=pointer, drgb=pointer, operands=operands, sums=sums, **place,
        ref_is_output=ctypes.c_int,
    )  # fmt: skip
    return _Structures(operands, sums, forward, backward)


def real_number(real: torch.dtype) -> Any:
    """Return the ctypes form of `Real`."""
    return ctypes.c_double if real == torch.float64 else ctypes.c_float


def _operands(of: Operands, dtype: torch.dtype) -> ctypes.Structure:
    shared = of.noise is None or of.noise.shape[0] == 1
    return _structures(real_of(dtype)).operands(
        _pointer(of.scale), _pointer(of.bias), _pointer(of.next_scale), _pointer(of.noise),
        _pointer(of.noise_strength), _pointer(of.rgb_weight),
        0 if shared or of.noise is None else of.noise.stride(0), slope_below(of.act, of.alpha), of.gain,
        math.nan if of.clamp is None else of.clamp, ACTIVATIONS.index(of.act),
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
