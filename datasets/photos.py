"""From any image file to a square of 8-bit sRGB pixels.

What is done, in this order: first frame; EXIF orientation; crop; colours to 8-bit sRGB (16-bit values scaled, not
clipped; the embedded ICC profile applied; transparency laid over a colour); Lanczos to the resolution.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from stylepipe.datasets.preparation import Preparation

Image.init()  # all formats, so that `formats` below can name them
# PostScript is a program, which Pillow would have Ghostscript run.
_FORMATS = tuple(name for name in Image.OPEN if name != "EPS")
_ENCODER_OPTIONS: dict[str, dict[str, Any]] = {
    # Level 2 takes a third of the default's time for a tenth more bytes (1024 px photographs); decoding is as fast.
    "png": {"format": "PNG", "compress_level": 2},
    # 4:2:0, the default, costs 4.5 dB of PSNR.
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "ppm": {"format": "PPM"},
}
_SIXTEEN_BIT = 65535
_ORIENTATION = 0x0112  # of EXIF
_PNG_BITS = 24  # where the header of a PNG says how many bits a channel has


class SkippedPhotoError(Exception):
    """A file that gives no training image: a short `reason`, the same for all its kind, and the `detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Square(NamedTuple):
    """A photograph as it is stored.

    Attributes:
        image: RGB, of the resolution.
        unchanged: nothing was done to its pixels, and the file is one that training reads.
        lossy: the file was a JPEG.
    """

    image: Image.Image
    unchanged: bool
    lossy: bool


def read_square(data: bytes, how: Preparation, cut: Callable[[Image.Image], Image.Image] | None = None) -> Square:
    """Return a photograph as a square.

    Args:
        data: the file.
        how: resolution, crop, smallest side and background.
        cut: makes the square of the upright photograph, of that resolution, in place of the central one.

    Raises:
        SkippedPhotoError: it cannot be read, is too small, or is no square where one is expected.
    """
    try:
        # Pillow's warnings (odd metadata, many pixels) say nothing about whether the pixels are good.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if cut is not None:
                    square = cut(to_srgb(_oriented(image), how.background_rgb))
                    return Square(square, unchanged=False, lossy=image.format == "JPEG")
                if min(image.size) < how.smallest:
                    raise SkippedPhotoError(f"smaller than {how.smallest} px", f"{image.width}x{image.height}")
                if how.crop == "none" and image.width != image.height:
                    raise SkippedPhotoError("not square", f"{image.width}x{image.height}")
                unchanged, lossy = _needs_no_change(image, data, how.res), image.format == "JPEG"
                square = to_srgb(_centre_square(_oriented(image)), how.background_rgb)
    except (SkippedPhotoError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise SkippedPhotoError("unreadable", "not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise SkippedPhotoError("unreadable", "too many pixels (a decompression bomb?)") from error
    except Exception as error:  # decoders raise anything at all on broken files
        raise SkippedPhotoError("unreadable", " ".join(str(error).split()) or type(error).__name__) from error
    if square.width != how.res:
        square = square.resize((how.res, how.res), Image.Resampling.LANCZOS)
    return Square(square, unchanged, lossy)


def is_image(data: bytes) -> bool:
    """Tell by its header whether a file is an image of a format that `read_square` takes."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=_FORMATS):
            return True
    return False


def printable(name: str) -> str:
    """Return a file name as text; bytes that are not UTF-8 become `\\xNN`, and half characters of JSON `\\uNNNN`."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode()


def encode(image: Image.Image, image_format: str) -> bytes:
    """Return an RGB image as the bytes of a `png` (lossless), `jpeg` (quality 95, 4:4:4) or `ppm` (bare) file."""
    buffer = io.BytesIO()
    image.save(buffer, **_ENCODER_OPTIONS[image_format])
    return buffer.getvalue()


def to_srgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB in sRGB, transparency composited over `background`.

    Raise SkippedPhotoError for numbers without a defined range (32-bit integers, floats outside [0, 1]).
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _eight_bit_grey(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")  # P, PA, RGBA, YCbCr, HSV, RGBX
    colours = _managed(image, profile)
    if alpha is None:
        return colours
    return Image.composite(colours, Image.new("RGB", image.size, background), alpha)


def _needs_no_change(image: Image.Image, data: bytes, resolution: int) -> bool:
    """Tell whether training can take a file as it is: see `Square.unchanged`."""
    profile = image.info.get("icc_profile")
    return (
        image.format in ("JPEG", "PNG")
        and image.mode in ("RGB", "L")
        and image.size == (resolution, resolution)
        and (image.format == "JPEG" or data[_PNG_BITS] == 8)
        and getattr(image, "n_frames", 1) == 1
        and not image.has_transparency_data
        and (not profile or _srgb_transform(profile, image.mode) is None)
        and image.getexif().get(_ORIENTATION, 1) == 1
    )


def _oriented(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(Exception):  # broken metadata raises anything; the pixels are good, and stay as they are stored
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _centre_square(image: Image.Image) -> Image.Image:
    """Crop to the centred square; where a side is odd, the spare pixel goes right or below."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey (`I;16*`, or `I` from some files) or floats in [0, 1] to 8-bit grey, with alpha if any."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # NaN fails too
            raise SkippedPhotoError("unreadable", "floating-point pixels outside [0, 1]")
        full = 1.0
    else:
        if values.min() < 0 or values.max() > _SIXTEEN_BIT:
            raise SkippedPhotoError("unreadable", "32-bit integer pixels, whose range is not known")
        full = float(_SIXTEEN_BIT)
    grey = Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))
    transparent = image.info.get("transparency")  # a PNG may name one grey value as transparent
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _managed(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert L, RGB, CMYK or LAB to RGB, through the embedded profile where it is sound and not sRGB already."""
    if profile:
        transform = _srgb_transform(profile, image.mode)
        if transform is not None:
            return transform.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB, or None where it is sRGB, broken or of another colour space."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in (source.profile.profile_description or ""):
            return None  # the identity, but for rounding
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
