"""The pixels of the files that a dataset stores, PNG, JPEG and bare PPM, by the fastest decoder that is installed.

All of them give the same pixels and work without holding Python's lock, so that threads decode side by side.
`pip install 'stylepipe[fast]'` brings simplejpeg and imagecodecs' libspng; Pillow is always there.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
try:
    from imagecodecs import spng_decode
except ImportError:
    spng_decode = None  # type: ignore[assignment]

_JPEG, _PNG, _PPM = b"\xff\xd8", b"\x89PNG", b"P6"
_PNG_OF_RGB = slice(24, 26), b"\x08\x02"  # bits per channel and kind of colour, in a PNG's header


def decode_into(data: bytes, out: npt.NDArray[np.uint8]) -> None:
    """Decode an image file into `out`, [R, R, 3] uint8, contiguous.

    Raises:
        Exception: of any type, as decoders have it, where the data is damaged; ValueError where it is of another size.
    """
    if data.startswith(_PPM):
        out[...] = _ppm_pixels(data, len(out))
    elif simplejpeg is not None and data.startswith(_JPEG):
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, len(out))
        simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    elif spng_decode is not None and data.startswith(_PNG) and data[_PNG_OF_RGB[0]] == _PNG_OF_RGB[1]:
        _check_size(int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), len(out))
        spng_decode(data, out=out)
    else:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            _check_size(*image.size, len(out))
            out[...] = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def check_header(data: bytes, resolution: int) -> None:
    """See by its header whether a file is an image of this resolution; raise any exception where it is not."""
    if data.startswith(_PPM):
        _ppm_pixels(data, resolution)
        return
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        _check_size(*image.size, resolution)


def decoders() -> dict[str, str]:
    """Return the library that decodes each kind of file."""
    return {
        "JPEG": "Pillow" if simplejpeg is None else "simplejpeg",
        "PNG": "Pillow" if spng_decode is None else "imagecodecs",
    }


def _check_size(width: int, height: int, resolution: int) -> None:
    """Refuse another size before anything of that size is allocated."""
    if (width, height) != (resolution, resolution):
        raise ValueError(f"it is {width}x{height} pixels")


def _ppm_pixels(data: bytes, resolution: int) -> npt.NDArray[np.uint8]:
    """Return the pixels of a PPM file as Pillow writes it: [R, R, 3] uint8. Pillow would take most of the time here."""
    header = b"P6\n%d %d\n255\n" % (resolution, resolution)
    if not data.startswith(header) or len(data) != len(header) + 3 * resolution**2:
        raise ValueError(f"it is no PPM file of {resolution}x{resolution} pixels")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(resolution, resolution, 3)
