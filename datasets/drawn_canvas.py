"""A small drawing surface: antialiased filled curves, hard or soft, at any resolution.

Points are [n, 2] float64 arrays of (x, y) in fractions of the picture's side, so that one drawing serves every
resolution. Each shape is rasterised in its own box, several times too large, and reduced by averaging; a soft shape is
rasterised small, blurred and enlarged, which makes its cost independent of the blur's radius.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Points = NDArray[np.float64]
Field = NDArray[np.float32]
Paint = tuple[float, float, float] | Image.Image

_BLUR_PIXELS = 2.0  # a soft shape is drawn at the scale at which its blur has this radius


@dataclass(frozen=True)
class Mask:
    """Covers a box of the canvas: `coverage` is an 8-bit image whose corner lies at pixel (left, top)."""

    left: int
    top: int
    coverage: Image.Image

    def within(self, other: "Mask") -> "Mask":
        """Returns this mask times `other`, which is zero outside its box."""
        left, top = self.left - other.left, self.top - other.top
        width, height = self.coverage.size
        clip = other.coverage.crop((left, top, left + width, top + height))
        return Mask(self.left, self.top, ImageChops.multiply(self.coverage, clip))


class Canvas:
    """Holds an RGB image of `size` x `size` pixels and fills shapes into it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.image = Image.new("RGB", (size, size))

    def mask(self, outline: Points, opacity: float = 1.0, blur: float = 0.0, hole: Points | None = None) -> Mask:
        """Rasterises a closed polygon, softened by a Gaussian of standard deviation `blur` (a fraction of the side).

        A `hole` is cut out of it.
        """
        step = max(1, int(blur * self.size / _BLUR_PIXELS))
        scale = self.size / step
        pixels = outline * scale
        margin = 1 + math.ceil(2.5 * blur * scale)
        low = np.maximum(np.floor(pixels.min(axis=0)).astype(int) - margin, -margin)
        high = np.minimum(np.ceil(pixels.max(axis=0)).astype(int) + margin, math.ceil(scale) + margin)
        width, height = (int(extent) for extent in high - low)
        if width <= 2 * margin or height <= 2 * margin:
            return Mask(0, 0, Image.new("L", (1, 1)))  # nothing of it lies on the canvas
        fine = 2 if step > 1 or max(width, height) > 400 else 4 if max(width, height) > 40 else 8
        coverage = Image.new("L", (width * fine, height * fine))
        draw = ImageDraw.Draw(coverage)
        draw.polygon(((pixels - low) * fine - 0.5).ravel().tolist(), fill=round(255 * opacity))
        if hole is not None:
            draw.polygon(((hole * scale - low) * fine - 0.5).ravel().tolist(), fill=0)
        coverage = coverage.reduce(fine)
        if blur:
            coverage = coverage.filter(ImageFilter.GaussianBlur(blur * scale))
        if step > 1:
            coverage = coverage.resize((width * step, height * step), Image.Resampling.BICUBIC)
        return Mask(int(low[0]) * step, int(low[1]) * step, coverage)

    def fill(
        self,
        outline: Points,
        paint: Paint,
        opacity: float = 1.0,
        blur: float = 0.0,
        *,
        within: Mask | None = None,
        hole: Points | None = None,
    ) -> Mask:
        """Paints a shape and returns its mask (at its opacity), for other shapes to stay `within`."""
        mask = self.mask(outline, opacity, blur, hole)
        if within is not None:
            mask = mask.within(within)
        self.paint(mask, paint)
        return mask

    def paint(self, mask: Mask, paint: Paint) -> None:
        """Paints a colour, or the same place of an image of the canvas's size, through a mask."""
        coverage = mask.coverage
        box = (mask.left, mask.top, mask.left + coverage.width, mask.top + coverage.height)
        if isinstance(paint, Image.Image):
            self.image.paste(paint.crop(box), box, coverage)
        else:
            red, green, blue = (round(255 * min(max(c, 0.0), 1.0)) for c in paint)
            self.image.paste((red, green, blue), box, coverage)

    def enlarged(self, field: Field) -> Image.Image:
        """Turns a coarse field [g, g, 3] or [g, g] in [0, 1] into an image of the canvas's size."""
        pixels = (np.clip(field, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
        image = Image.fromarray(pixels)
        return image if image.width == self.size else image.resize((self.size, self.size), Image.Resampling.BICUBIC)


def points(*rows: tuple[float, float]) -> Points:
    """Collects (x, y) pairs into an array [n, 2]."""
    return np.array(rows)


def shifted(path: Points, x: float, y: float) -> Points:
    """Moves a path by (x, y)."""
    return path + np.array((x, y))


def curve(knots: Points, closed: bool = True, steps: int = 7) -> Points:
    """Draws a Catmull-Rom spline through `knots`; returns `steps` points per segment."""
    ends = np.concatenate((knots[-1:], knots, knots[:2]) if closed else (knots[:1], knots, knots[-1:]))
    before, start, stop, after = ends[:-3, None], ends[1:-2, None], ends[2:-1, None], ends[3:, None]
    t = (np.arange(steps) / steps)[:, None]
    path = start + 0.5 * t * (
        stop - before + t * (2 * before - 5 * start + 4 * stop - after + t * (3 * (start - stop) + after - before))
    )
    return path.reshape(-1, 2) if closed else np.concatenate((path.reshape(-1, 2), knots[-1:]))


def mirrored(right: Points) -> Points:
    """Closes the right half of an outline (from top to bottom) with its mirror image."""
    inner = right[1:-1] if right[0, 0] == 0.0 and right[-1, 0] == 0.0 else right
    return np.concatenate((right, inner[::-1] * (-1.0, 1.0)))


def ellipse(x: float, y: float, width: float, height: float, turn: float = 0.0) -> Points:
    """Returns an ellipse of the half axes `width` and `height`, turned by `turn` radians."""
    ring = _circle() * (width, height)
    if turn:
        cos, sin = math.cos(turn), math.sin(turn)
        ring = ring @ np.array(((cos, sin), (-sin, cos)))
    return shifted(ring, x, y)


def stroke(path: Points, width: float, start: float = 0.2, stop: float = 0.2, middle: float = 0.5) -> Points:
    """Outlines a brush stroke along an open path: `width` at `middle`, tapering to shares of it at both ends."""
    along = np.gradient(path, axis=0)
    length = np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-9)
    across = np.stack((-along[:, 1], along[:, 0]), axis=1) / length[:, None]
    t = np.linspace(0.0, 1.0, len(path))
    rise = np.minimum(t / middle, (1.0 - t) / (1.0 - middle))
    share = np.where(t < middle, start, stop)
    half = 0.5 * width * (share + (1.0 - share) * np.sin(0.5 * np.pi * rise))
    return np.concatenate((path + across * half[:, None], (path - across * half[:, None])[::-1]))


@cache
def _circle() -> Points:
    angle = np.linspace(0.0, 2.0 * np.pi, 40, endpoint=False)
    return np.stack((np.cos(angle), np.sin(angle)), axis=1)
