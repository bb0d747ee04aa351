"""Crop photographs around the face as FFHQ does: eyes and mouth at one place, upright, at one scale.

    eyes = right eye - left eye                 left and right as one sees them in the picture
    down = mouth - middle of the eyes
    x    = eyes - perp(down), of length max(2.0 |eyes|, 1.8 |down|)          perp(v) = (-v_y, v_x)
    y    = perp(x)
    quad = middle of the eyes + 0.1 down -+ x -+ y

after Karras et al. 2018, arXiv:1710.10196, appendix C (CelebA-HQ; FFHQ is aligned so too). Of 68 points, the eyes
are the means of points 36-41 and 42-47, the tip of the nose is 30, and the corners of the mouth are 48 and 54: five
points are enough.

Coordinates are pixels of the upright photograph (EXIF orientation applied), x to the right and y down; (0, 0) is the
centre of the top left pixel, as face detectors have it.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from stylepipe.datasets.photos import SkippedPhotoError
from stylepipe.errors import UserError
from stylepipe.parsing import one_line, parse_json

Points = npt.NDArray[np.float64]
"""[5, 2] (left eye, right eye, nose, left and right corner of the mouth) or [68, 2], (x, y) in pixels."""

_COUNTS = (5, 68)
_JSON_FORM = '{"sub/0001.png": [[x, y], ...], ...} with 5 or 68 points each'
_CSV_FORM = "rows of name,x1,y1,x2,y2,... with 5 or 68 points each"

_LARGEST = 2.0  # side of the quad, in sides of a square of the photograph's area; a face that fills its picture has 1.6
_SMALLEST = 2.0  # pixels
_BLUR = 0.02  # radius outside the photograph, in sides of the quad
_FADE = 0.05  # width over which it sets in
_MARGIN = 3  # pixels that interpolation reaches for
_FARTHEST = 1e9  # pixels: no photograph is that large, and nothing overflows


@dataclass(frozen=True)
class Landmarks:
    """The points of the first face of each photograph.

    Attributes:
        path: the file they come from.
        of_file: by the photograph's name relative to the source; those without a face are left out.
    """

    path: Path
    of_file: Mapping[str, Points]


def read_landmarks(path: str | Path) -> Landmarks:
    """Read the points of faces from a JSON or CSV file.

        {"sub/0001.png": [[x, y], ...], "sub/0002.png": [[[x, y], ...], [[x, y], ...]]}

        name,x1,y1,x2,y2,...
        sub/0001.png,331.5,402,...

    Each face has 5 or 68 points (see `Points`). Where a photograph has several, as a list in JSON or as further rows in
    CSV, the first counts; an empty list in JSON is a photograph without a face. The header may be missing.

    Raises:
        UserError: the file cannot be read, is of neither format or empty, or an entry is not as above.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Points]]]] = {".json": _from_json, ".csv": _from_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: landmarks in a file of type {path.suffix or 'none'}; expected .json or .csv")
    of_file: dict[str, Points] = {}
    try:
        for name, points in readers[path.suffix.lower()](path):
            of_file.setdefault(name, points)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a file of landmarks") from error
    if not of_file:
        raise UserError(f"{path}: holds no face; expected {_CSV_FORM if path.suffix.lower() == '.csv' else _JSON_FORM}")
    return Landmarks(path, of_file)


def quad(points: Points) -> npt.NDArray[np.float64]:
    """Return the square around a face: [4, 2] float64, its corners upper left, lower left, lower right, upper right.

    NaN for points that are all one.
    """
    eyes, down, middle = _eyes_down_middle(points)
    x = eyes - _perp(down)
    with np.errstate(invalid="ignore", divide="ignore"):
        x *= side(points) / 2 / np.hypot(*x)
    y = _perp(x)
    centre = middle + 0.1 * down
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def side(points: Points) -> float:
    """Return the side of the square around a face in pixels of the photograph."""
    eyes, down, _ = _eyes_down_middle(points)
    return 2 * max(2.0 * float(np.hypot(*eyes)), 1.8 * float(np.hypot(*down)))


def align(image: Image.Image, points: Points, resolution: int) -> Image.Image:
    """Return the square around a face, turned upright.

    What lies outside of the photograph is its mirror image, blurred; no pixel of the photograph itself is.

    Args:
        image: the photograph, upright, RGB.
        points: of the face (see `Points`).
        resolution: pixels a side of what is returned, RGB.

    Raises:
        SkippedPhotoError: the points are not those of a face in this photograph. Nothing large was allocated.
    """
    _check_face(image, points)
    corners = quad(points) + 0.5  # Pillow's (0, 0) is the corner of the top left pixel
    # Averaging to between 2 and 4 times the resolution first costs no sharpness, and bounds what follows.
    factor = max(int(side(points) / (2 * resolution)), 1)
    corners /= factor
    length = side(points) / factor
    left, top = (int(low) - _MARGIN for low in np.floor(corners.min(axis=0)))
    right, bottom = (int(high) + _MARGIN for high in np.ceil(corners.max(axis=0)))
    crop = _mirrored_crop(image, factor, (left, top, right, bottom), length)

    size = resolution * math.ceil(length / resolution)
    data = tuple(map(float, (corners - (left, top)).ravel()))
    turned = crop.transform((size, size), Image.Transform.QUAD, data, Image.Resampling.BICUBIC)
    return turned.resize((resolution, resolution), Image.Resampling.LANCZOS)


class Detector:
    """A function that finds faces, by its name; worker processes that are given it import it themselves."""

    def __init__(self, spec: str, function: Callable[[npt.NDArray[np.uint8]], Any]) -> None:
        self.spec = spec
        self._function = function

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Return the faces of a photograph [H, W, 3] uint8 RGB: [n, 5 or 68, 2] float64 (see `Points`), n may be 0.

        Raise UserError where the function returns something else.
        """
        returned = self._function(pixels)
        try:
            faces = np.asarray(returned)
        except ValueError:  # lists of different lengths
            faces = np.asarray(None)
        if faces.shape[:1] == (0,):
            return np.empty((0, _COUNTS[0], 2))
        if not _are_points(faces, dimensions=3):
            found = f"{faces.dtype} {list(faces.shape)}" if faces.ndim else type(returned).__name__
            raise UserError(
                f"detector {self.spec}: returned {found}; expected finite numbers [faces, 5 or 68, 2], x and y"
            )
        return faces.astype(np.float64)

    def __reduce__(self) -> tuple[Callable[[str], Detector], tuple[str]]:
        return load_detector, (self.spec,)


def load_detector(spec: str) -> Detector:
    """Import `package.module:function`, which finds faces: [H, W, 3] uint8 RGB to [n, 5 or 68, 2] (see `Detector`).

    Raise UserError where there is no such function, or its module cannot be imported.
    """
    module_name, colon, function_name = spec.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(f"detector {spec!r}: expected package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"detector {spec}: {module_name} cannot be imported ({why}); install it, or name its folder in PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = f"has no {function_name}" if function is None else f"has a {function_name} that is no function"
        raise UserError(f"detector {spec}: {module_name} {found}; expected package.module:function")
    return Detector(spec, function)


def _from_json(path: Path) -> Iterator[tuple[str, Points]]:
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({one_line(error)}); expected {_JSON_FORM}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is a JSON {type(content).__name__}; expected {_JSON_FORM}")
    for name, entry in content.items():
        if entry == []:
            continue
        several = isinstance(entry, list) and isinstance(entry[0], list) and entry[0] and isinstance(entry[0][0], list)
        faces = entry if several else [entry]
        for points, face in zip(map(_points, faces), faces, strict=True):
            if points is None:
                found = f"{path}: the points of {one_line(repr(name))} are {_short(face)}"
                raise UserError(f"{found}; expected {_JSON_FORM}, all finite")
            yield name, points


def _from_csv(path: Path) -> Iterator[tuple[str, Points]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            for row in rows:
                if not row or (rows.line_num == 1 and row[0].strip().lower() == "name"):
                    continue
                try:
                    numbers = [float(field) for field in row[1:]]
                except ValueError:
                    numbers = []
                points = _points([[x, y] for x, y in zip(numbers[::2], numbers[1::2], strict=False)])
                if points is None or len(numbers) % 2:
                    raise UserError(
                        f"{path}, line {rows.line_num}: the points of {one_line(repr(row[0]))} are {_short(row[1:])}; "
                        f"expected {_CSV_FORM}, all finite"
                    )
                yield row[0], points
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not CSV in UTF-8 ({one_line(error)}); expected {_CSV_FORM}") from error


def _points(face: Any) -> Points | None:
    """Return the points of one face as read, or None if they are none."""
    try:
        array = np.asarray(face)
    except (ValueError, OverflowError):  # lists of different lengths
        return None
    return array.astype(np.float64) if _are_points(array, dimensions=2) else None


def _are_points(array: npt.NDArray[Any], dimensions: int) -> bool:
    """Tell whether an array is finite numbers [..., 5 or 68, 2]."""
    return (
        array.ndim == dimensions
        and array.shape[-2] in _COUNTS
        and array.shape[-1] == 2
        and array.dtype.kind in "iuf"
        and bool(np.isfinite(array).all())
    )


def _eyes_down_middle(points: Points) -> tuple[npt.NDArray[np.float64], ...]:
    """Return from eye to eye, from their middle to the mouth's, and the middle of the eyes: [2] float64 each."""
    if len(points) == _COUNTS[0]:
        left, right, _, *mouth = points
    else:
        left, right, mouth = points[36:42].mean(axis=0), points[42:48].mean(axis=0), [points[48], points[54]]
    middle = (left + right) / 2
    return right - left, (mouth[0] + mouth[1]) / 2 - middle, middle


def _perp(v: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.array([-v[1], v[0]])


def _check_face(image: Image.Image, points: Points) -> None:
    """Raise SkippedPhotoError unless the square around these points can be cropped."""
    if not (np.abs(points) <= _FARTHEST).all():  # NaN too
        raise SkippedPhotoError("no usable face", "landmarks that are no places in a photograph")
    eyes, down, middle = _eyes_down_middle(points)
    length = side(points)
    size = f"a photograph of {image.width}x{image.height} px"
    if length < _SMALLEST:
        raise SkippedPhotoError("no usable face", "its landmarks are all at one place")
    # The two halves of x cancel in a mirrored face, and leave its direction to chance.
    if np.hypot(*(eyes - _perp(down))) < max(np.hypot(*eyes), np.hypot(*down)) / 2:
        raise SkippedPhotoError("no usable face", "left and right are exchanged: left is the left of the picture")
    if length > _LARGEST * math.sqrt(image.width * image.height):
        raise SkippedPhotoError("no usable face", f"a square of {length:,.0f} px around it in {size}")
    x, y = middle + 0.1 * down
    if not (0 <= x < image.width and 0 <= y < image.height):
        raise SkippedPhotoError("no usable face", f"its centre is at ({x:,.0f}, {y:,.0f}) in {size}")


def _mirrored_crop(image: Image.Image, factor: int, box: tuple[int, int, int, int], length: float) -> Image.Image:
    """Return a box of an image reduced by `factor`, mirrored and blurred where it lies outside.

    `box` (left, top, right, bottom) and `length`, the side of the face's square, are in pixels of the reduced image.
    """
    left, top, right, bottom = box
    inner = (
        max(left, 0) * factor,
        max(top, 0) * factor,
        min(right * factor, image.width),
        min(bottom * factor, image.height),
    )
    part = image.reduce(factor, box=inner)
    columns = np.arange(left, right) - max(left, 0)
    rows = np.arange(top, bottom) - max(top, 0)
    outside = np.maximum.outer(_distance(rows, part.height), _distance(columns, part.width))
    if not outside.any():
        return part
    pixels = np.asarray(part)[_mirrored(rows, part.height)[:, None], _mirrored(columns, part.width)]
    padded = Image.fromarray(pixels)
    blurred = padded.filter(ImageFilter.GaussianBlur(_BLUR * length))
    share = np.minimum(outside / (_FADE * length), 1)
    return Image.composite(blurred, padded, Image.fromarray(np.rint(255 * share).astype(np.uint8)))


def _distance(places: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Return how far places are outside of 0 ... size - 1."""
    return np.maximum(np.maximum(-places, places - (size - 1)), 0)


def _mirrored(places: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Return the places within 0 ... size - 1 that one sees at `places` in mirrors at both edges."""
    within = places % (2 * size)
    return np.minimum(within, 2 * size - 1 - within)


def _short(value: Any) -> str:
    return one_line(json.dumps(value), 60)
