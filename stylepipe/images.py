"""Images between networks and files: bytes, grids, PNG and WebP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from stylepipe.errors import UserError
from stylepipe.files import atomic_path

GRID_WIDTH, GRID_HEIGHT = 1920, 1080  # pixels: a grid is looked at on one screen
MAX_COLUMNS, MAX_ROWS = 15, 8
MAX_WEBP_SIDE = 16383  # the format's own limit

# PNG is always without loss; WebP can be, and pictures shall show what the network made.
SAVE_OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True}),
}


def to_uint8(img: Tensor) -> Tensor:
    """Turn images into bytes, rounded to the nearest; -1 becomes 0, 1 becomes 255, what lies outside is clipped.

    Args:
        img: [N, C, H, W] of any floating type, in [-1, 1].

    Returns:
        [N, H, W, C] uint8, contiguous, on the same device.
    """
    scaled = (img.float() * 127.5 + 128).clamp_(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def shrunk(images: Tensor, side: int) -> Tensor:
    """Return images [N, r, r, C] uint8 of at most `side` pixels, by box averages, of [N, R, R, C] uint8.

    R and `side` are powers of two.
    """
    factor = max(1, images.shape[1] // side)
    if factor == 1:
        return images
    means = avg_pool2d(images.permute(0, 3, 1, 2).float(), factor)
    return means.round_().to(torch.uint8).permute(0, 2, 3, 1)


def make_grid(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Lay images out in rows, from the left and the top; places left over in the last row are black.

    Args:
        images: [N, H, W, C] uint8, N at least 1.
        columns: images in a row, at least 1.

    Returns:
        [rows * H, columns * W, C] uint8, rows = ceil(N / columns).
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    cells[:count] = images
    cells = cells.reshape(rows, columns, height, width, channels)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def grid_shape(res: int) -> tuple[int, int]:
    """Choose (columns, rows) of a grid of images of `res` pixels that fits a screen; at least 2 x 2, at most 15 x 8."""
    columns = min(max(GRID_WIDTH // res, 2), MAX_COLUMNS)
    rows = min(max(GRID_HEIGHT // res, 2), MAX_ROWS)
    return columns, rows


def parse_grid(text: str) -> tuple[int, int]:
    """Read "COLUMNSxROWS" such as "4x3".

    Raises:
        UserError: it is something else.
    """
    match = re.fullmatch(r"([1-9][0-9]*)[xX×]([1-9][0-9]*)", text.strip())
    if match is None:
        raise UserError(f"--grid {text}: expected COLUMNSxROWS of whole numbers from 1 on, such as 4x3")
    return int(match[1]), int(match[2])


def check_suffix(path: str | Path) -> None:
    """Raise a UserError unless `path` ends in .png or .webp."""
    if Path(path).suffix.lower() not in SAVE_OPTIONS:
        found = Path(path).suffix or "no suffix"
        raise UserError(f"cannot save an image as {path}: {found} found, expected {' or '.join(SAVE_OPTIONS)}")


def save_clip(path: Path, frames: Sequence[NDArray[np.uint8]], frame_ms: int) -> None:
    """Write frames [H, W, 3] uint8 as an animated GIF that goes on for ever; missing folders are made.

    Raises:
        UserError: the file cannot be written.
    """
    first, *others = [Image.fromarray(frame) for frame in frames]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            first.save(temporary, format="GIF", save_all=True, append_images=others, duration=frame_ms, loop=0)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place or make room") from error


def save_image(path: str | Path, image: NDArray[np.uint8]) -> None:
    """Write an image without loss, as PNG or WebP by the suffix; missing folders are made.

    Args:
        path: ends in .png or .webp.
        image: [H, W, C] uint8 with C = 1 (grey) or 3 (RGB).

    Raises:
        UserError: another suffix, too many pixels for WebP, or the file cannot be written.
    """
    path = Path(path)
    check_suffix(path)
    kind, options = SAVE_OPTIONS[path.suffix.lower()]
    if kind == "WEBP" and max(image.shape[:2]) > MAX_WEBP_SIDE:
        size = f"{image.shape[1]} x {image.shape[0]}"
        raise UserError(
            f"cannot save {path}: {size} pixels, and WebP takes {MAX_WEBP_SIDE} a side; save a .png instead"
        )
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            picture.save(temporary, format=kind, **options)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place or make room") from error
