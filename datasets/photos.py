"""From any image file to a square of 8-bit sRGB pixels.

What is done, in this order: first frame; EXIF orientation; centre crop; colours to 8-bit sRGB (16-bit values scaled,
not clipped; the embedded ICC profile applied; transparency laid over white); Lanczos to the resolution.
"""

from __future__ import annotations

import io
import os
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

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


class SkippedPhotoError(Exception):
    """A file that gives no training image: a short `reason`, the same for all its kind, and the `detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def read_square(path: Path, resolution: int, upscale: bool = False) -> Image.Image:
    """Return the photograph as a square RGB image of `resolution` pixels.

    Raise SkippedPhotoError where it cannot be read, or where its shorter side is below `resolution` and not `upscale`.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below; opened apart to tell a bad file from bad pixels)
    except OSError as error:
        raise SkippedPhotoError("unreadable", error.strerror or str(error)) from error
    try:
        # Pillow's warnings (odd metadata, many pixels) say nothing about whether the pixels are good.
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_FORMATS) as image:
                if min(image.size) < resolution and not upscale:
                    raise SkippedPhotoError(f"smaller than {resolution} px", f"{image.width}x{image.height}")
                square = to_srgb(_centre_square(_oriented(image)))
    except (SkippedPhotoError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise SkippedPhotoError("unreadable", "not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise SkippedPhotoError("unreadable", "too many pixels (a decompression bomb?)") from error
    except Exception as error:  # decoders raise anything at all on broken files
        raise SkippedPhotoError("unreadable", " ".join(str(error).split()) or type(error).__name__) from error
    if square.width == resolution:
        return square
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)


def is_image(path: Path) -> bool:
    """Tell by its header whether a file is an image of a format that `read_square` takes."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=_FORMATS):
            return True
    return False


def printable(name: str) -> str:
    """Return a file name as text; bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def encode(image: Image.Image, image_format: str) -> bytes:
    """Return an RGB image as the bytes of a `png` (lossless), `jpeg` (quality 95, 4:4:4) or `ppm` (bare) file."""
    buffer = io.BytesIO()
    image.save(buffer, **_ENCODER_OPTIONS[image_format])
    return buffer.getvalue()


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB in sRGB, transparency composited over white.

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
    return Image.composite(colours, Image.new("RGB", image.size, "white"), alpha)


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
