"""Alignment by landmarks: where the formula puts a face, what fills the borders, and what is said of bad landmarks."""

from __future__ import annotations

import cmath
import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stylepipe.datasets.align import align, load_detector, quad, read_landmarks, side
from stylepipe.datasets.photos import SkippedPhotoError
from stylepipe.errors import UserError

FACE = np.array([[-30.0, -20.0], [30.0, -20.0], [0.0, 10.0], [-22.0, 42.0], [22.0, 42.0]])
"""Five points around (0, 0): eyes 60 apart, the mouth 62 below."""

COLOURS = [(255, 0, 0), (0, 255, 0), (255, 255, 0), (0, 0, 255), (255, 0, 255)]


def placed(angle: float = 0, scale: float = 1, shift: tuple[float, float] = (200, 200)) -> np.ndarray:
    """Turn, scale and shift the face; degrees clockwise."""
    c, s = scale * np.cos(np.radians(angle)), scale * np.sin(np.radians(angle))
    return FACE @ np.array([[c, s], [-s, c]]) + shift


def sixty_eight(five: np.ndarray) -> np.ndarray:
    """Put 68 points around five: contours of the eyes around their centres, everything that does not count far away."""
    points = np.full((68, 2), 1e4)
    ring = np.array([[np.cos(a), np.sin(a)] for a in np.arange(6) * np.pi / 3]) * [7, 3]
    points[36:42], points[42:48] = five[0] + ring, five[1] + ring
    points[30], points[48], points[54] = five[2:]
    return points


def with_dots(points: np.ndarray, size: tuple[int, int] = (400, 400), radius: float = 4) -> Image.Image:
    """Draw a soft dot of its own colour at each point, exact to a fraction of a pixel."""
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.full((size[1], size[0], 3), 128.0)
    for (px, py), colour in zip(points, COLOURS, strict=True):
        weight = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius**2))[..., None]
        pixels += weight * (np.array(colour) - pixels)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def dot(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Find the centre (x, y) of the dot of a colour."""
    likeness = (np.asarray(image).astype(float) - 128) @ (np.array(colour) - 128.0) / (3 * 127.5**2)
    weight = np.maximum(likeness - 0.7, 0)
    y, x = np.mgrid[: image.height, : image.width]
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


def expected_quad(points: np.ndarray) -> list[complex]:
    """Calculate FFHQ's square in complex numbers, where a quarter turn clockwise on the screen is times i."""
    left, right, _, *mouth = (complex(*point) for point in points)
    eyes, middle = right - left, (left + right) / 2
    down = sum(mouth) / 2 - middle
    x = eyes - 1j * down
    x *= max(2.0 * abs(eyes), 1.8 * abs(down)) / abs(x)
    centre = middle + 0.1 * down
    return [centre + x * corner for corner in (-1 - 1j, -1 + 1j, 1 + 1j, 1 - 1j)]


SKEWED = placed(17, 1.3) + np.random.default_rng(3).normal(0, 4, (5, 2))


@pytest.mark.parametrize("points", [placed(), placed(30), placed(-120, 0.4), SKEWED, placed() * [0.5, 1.5]])
def test_the_formula(points: np.ndarray) -> None:
    expected = expected_quad(points)
    np.testing.assert_allclose(quad(points), [[z.real, z.imag] for z in expected], atol=1e-9)
    assert side(points) == pytest.approx(abs(expected[1] - expected[0]))


def test_the_formula_by_hand() -> None:
    # Eyes 60 apart, mouth 62 below: half a side is max(120, 111.6); the centre 6.2 below the eyes' middle at y = 180.
    assert side(placed()) == 240
    np.testing.assert_allclose(quad(placed()), [[80, 66.2], [80, 306.2], [320, 306.2], [320, 66.2]])


@pytest.mark.parametrize("resolution", [64, 128, 256])
@pytest.mark.parametrize(
    ("angle", "scale", "shift"),
    [(0, 1, (200, 200)), (25, 1, (180.3, 190.6)), (-90, 0.8, (210, 170)), (160, 1.2, (200, 205)), (3, 1.6, (200, 200))],
)
def test_dots_land_where_the_formula_says(
    resolution: int, angle: float, scale: float, shift: tuple[float, float]
) -> None:
    points = placed(angle, scale, shift)
    # A dot of 2 px or more in the result, so that its colour stays.
    aligned = align(with_dots(points, radius=max(4, 2 * side(points) / resolution)), points, resolution)
    assert (aligned.mode, aligned.size) == ("RGB", (resolution, resolution))
    for point, colour in zip(points, COLOURS, strict=True):
        # The face's own axes do not turn: the same place for every angle, scale and shift.
        at = (np.array(point) - shift) / scale
        at = complex(*at) * cmath.exp(-1j * np.radians(angle))
        expected = (np.array([at.real, at.imag]) - [-120, -133.8]) / 240 * resolution - 0.5
        error = dot(aligned, colour) - expected
        # Less than the pixel that was asked for: half a pixel would be another convention.
        assert np.abs(error).max() < 0.25, (colour, error)


def test_a_large_photograph_is_reduced_first_and_lands_there_too() -> None:
    points = placed(10, 4, (803, 797))
    aligned = align(with_dots(points, (1600, 1600), radius=35), points, 64)
    for number, colour in enumerate(COLOURS):
        expected = (FACE[number] - [-120, -133.8]) / 240 * 64 - 0.5
        assert np.abs(dot(aligned, colour) - expected).max() < 0.25


@pytest.mark.parametrize("angle", [0, 40])
def test_five_points_equal_the_68_they_are_made_of(angle: float) -> None:
    five = placed(angle)
    np.testing.assert_allclose(quad(sixty_eight(five)), quad(five), atol=1e-9)
    assert side(sixty_eight(five)) == pytest.approx(side(five))


def test_detail_is_kept_and_nothing_aliases() -> None:
    # A grating of 8 px in the result, from a photograph of four times that scale: nearly its full contrast is left.
    points = placed(0, 4, (600, 600))
    x = np.arange(1200)
    for period, low, high in [(32, 100, 128), (5, 0, 4)]:  # 8 px; 1.25 px, which cannot be shown
        wave = np.rint(127.5 + 127 * np.sin(2 * np.pi * x / period)).astype(np.uint8)
        image = Image.fromarray(np.broadcast_to(wave[None, :, None], (1200, 1200, 3)).copy())
        # 960 px of the photograph become 240.
        contrast = np.ptp(np.asarray(align(image, points, 240))[100:140, 20:-20].astype(float)) / 2
        assert low <= contrast <= high


@pytest.mark.parametrize("shift", [(60, 70), (345, 200), (200, 350), (10, 390)])
@pytest.mark.parametrize("angle", [0, 35])
def test_over_the_border_nothing_is_black(shift: tuple[float, float], angle: float) -> None:
    image = Image.new("RGB", (400, 400), (200, 120, 90))
    points = placed(angle, 1, shift)
    assert quad(points).min() < 0 or quad(points).max() > 400
    assert (np.asarray(align(image, points, 128)) == (200, 120, 90)).all()


def test_the_border_mirrors_and_blurs_only_what_is_outside() -> None:
    # Upright, 240 px to 240 px: a plain crop, whose left 60 columns lie outside. y by whole pixels: 33.8 to 34.
    points = placed(0, 1, (59.5, 199.3))
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    aligned = np.asarray(align(Image.fromarray(noise), points, 240)).astype(float)
    assert np.abs(aligned[:, 60:] - noise[66:306, :180]).max() <= 1
    mirrored = noise[66:306, :60][:, ::-1].astype(float)
    assert np.corrcoef(aligned[:, 58:60].ravel(), mirrored[:, 58:60].ravel())[0, 1] > 0.9
    assert aligned[:, :40].std() < 0.3 * mirrored[:, :40].std()  # blurred
    ramp = np.broadcast_to(np.arange(400)[None, :, None] // 2, (400, 400, 3)).astype(np.uint8)
    aligned = np.asarray(align(Image.fromarray(ramp), points, 240)).astype(float)
    assert np.abs(aligned[:, 10:50] - ramp[:240, 10:50][:, ::-1]).max() <= 1  # column 10 shows 49


def test_a_small_photograph_that_its_face_fills() -> None:
    # The square is 1.6 times the photograph: mirrored at all four sides.
    points = placed(8, 0.5, (37, 37))
    image = Image.fromarray(np.random.default_rng(0).integers(100, 256, (75, 75, 3), dtype=np.uint8))
    assert np.asarray(align(image, points, 64)).min() > 60


SWAPPED = placed()[[1, 0, 2, 4, 3]]


@pytest.mark.parametrize(
    ("points", "detail"),
    [
        (placed(0, 4), "a square of 960 px around it in a photograph of 400x400 px"),
        (placed(0, 1e6), "a square of"),
        (placed(0, 1, (-50, 200)), "its centre is at (-50, 186) in a photograph of 400x400 px"),
        (placed(0, 1, (200, 1e7)), "its centre is at"),
        (np.full((5, 2), 200.0), "all at one place"),
        (SWAPPED, "left and right are exchanged"),
        (np.full((5, 2), np.nan), "no places in a photograph"),
        (placed(0, 1e200), "no places in a photograph"),
    ],
)
def test_absurd_landmarks_skip_the_photograph_without_allocating(points: np.ndarray, detail: str) -> None:
    image = Image.new("RGB", (400, 400))
    tracemalloc.start()
    try:
        with pytest.raises(SkippedPhotoError) as skipped:
            align(image, points, 1024)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert skipped.value.reason == "no usable face"
    assert detail in skipped.value.detail


def test_a_profile_is_a_face() -> None:
    # Both eyes nearly at one place: the mouth gives the direction.
    profile = placed()
    profile[:2] = [[199, 180], [201, 180]]
    assert align(Image.new("RGB", (400, 400), "red"), profile, 64).getpixel((5, 5)) == (255, 0, 0)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def csv_row(name: str, points: np.ndarray) -> str:
    return ",".join([name, *(repr(float(value)) for value in points.ravel())])


def test_json_and_csv_say_the_same(tmp_path: Path) -> None:
    faces = {"a.png": placed(), "sub/b, c.png": sixty_eight(placed(20))}
    as_json = read_landmarks(write(tmp_path / "a.json", {name: face.tolist() for name, face in faces.items()}))
    rows = [csv_row("a.png", faces["a.png"]), csv_row('"sub/b, c.png"', faces["sub/b, c.png"])]
    for header in ("", "name,x1,y1\n", "\ufeffname,x1,y1\n"):
        as_csv = read_landmarks(write(tmp_path / "a.CSV", header + "\n".join(rows) + "\n\n"))
        for landmarks in (as_json, as_csv):
            assert list(landmarks.of_file) == list(faces)
            for name, face in faces.items():
                assert landmarks.of_file[name].dtype == np.float64
                assert (landmarks.of_file[name] == face).all()
    assert as_json.path == tmp_path / "a.json"


def test_of_several_faces_the_first_counts_and_none_is_none(tmp_path: Path) -> None:
    first, second = placed(), placed(10)
    content = {"a.png": [first.tolist(), second.tolist()], "b.png": []}
    for path in (
        write(tmp_path / "a.json", content),
        write(tmp_path / "a.csv", csv_row("a.png", first) + "\n" + csv_row("a.png", second)),
    ):
        landmarks = read_landmarks(path)
        assert list(landmarks.of_file) == ["a.png"]
        assert (landmarks.of_file["a.png"] == first).all()


GOOD = placed().tolist()


@pytest.mark.parametrize(
    "entry",
    [
        GOOD[:4],
        [*GOOD[:4], [1]],
        [*GOOD[:4], [1, 2, 3]],
        [*GOOD[:4], [1, float("nan")]],
        [*GOOD[:4], [1, float("inf")]],
        [*GOOD[:4], [1, "2"]],
        [*GOOD[:4], [1, None]],
        [*GOOD[:4], [1, 10**400]],
        [GOOD, GOOD[:4]],
        [[]],
        7,
        None,
        {"x": 1},
        "abc",
    ],
)
def test_a_malformed_json_entry_is_named(tmp_path: Path, entry: object) -> None:
    path = write(tmp_path / "marks.json", {"good.png": GOOD, "bad.png": entry})
    with pytest.raises(UserError, match=r"marks\.json: the points of 'bad\.png' are .*expected .*5 or 68 points"):
        read_landmarks(path)


@pytest.mark.parametrize("row", ["bad.png", "bad.png,1,2", "bad.png" + ",1" * 11, "bad.png" + ",x" * 10])
@pytest.mark.parametrize("value", ["", ",nan", ",inf"])
def test_a_malformed_csv_row_is_named(tmp_path: Path, row: str, value: str) -> None:
    row = "bad.png" + ",1" * 9 + value if value else row
    path = write(tmp_path / "marks.csv", csv_row("good.png", placed()) + "\n" + row)
    with pytest.raises(UserError, match=r"marks\.csv, line 2: the points of 'bad\.png' are .*5 or 68 points"):
        read_landmarks(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a file of type \.txt; expected \.json or \.csv"),
        ("a", b"", "a file of type none; expected"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"\xff", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b"[]", "is a JSON list; expected"),
        ("a.json", b"{}", "holds no face"),
        ("a.json", b'{"a.png": []}', "holds no face"),
        ("a.csv", b"", "holds no face"),
        ("a.csv", b"\xff,1", "is not CSV in UTF-8"),
        ("a.csv", b'"' + b"a" * 200_000, "is not CSV in UTF-8"),
    ],
)
def test_files_that_are_no_landmarks(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_landmarks(tmp_path / name)


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(No such file"):
        read_landmarks(tmp_path / name)


PLUGIN = f"""
import numpy as np
FACE = {GOOD!r}
number = 3
def one(rgb):
    assert rgb.dtype == np.uint8
    return [FACE]
def two(rgb): return np.array([FACE, FACE], dtype=np.float32)
def none(rgb): return []
def none_array(rgb): return np.empty((0, 68, 2))
def flat(rgb): return FACE
def nan(rgb): return [FACE[:4] + [[1, float("nan")]]]
def ragged(rgb): return [FACE, FACE[:4]]
def nothing(rgb): pass
def text(rgb): return "face"
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module of detectors, and one that cannot be imported; give the spec of a function."""
    (tmp_path / "face_plugin_for_tests.py").write_text(PLUGIN)
    (tmp_path / "broken_plugin_for_tests.py").write_text("raise RuntimeError('no\\nlicence')")
    monkeypatch.syspath_prepend(tmp_path)
    return "face_plugin_for_tests:{}".format


@pytest.mark.parametrize(("name", "count"), [("one", 1), ("two", 2), ("none", 0), ("none_array", 0)])
def test_a_detector_finds_faces_here_and_in_a_worker(plugin: Callable[[str], str], name: str, count: int) -> None:
    detector = load_detector(plugin(name))
    for each in (detector, pickle.loads(pickle.dumps(detector))):
        faces = each(np.zeros((20, 30, 3), np.uint8))
        assert faces.dtype == np.float64
        assert faces.shape == (count, 5, 2)
        np.testing.assert_allclose(faces, [GOOD] * count if count else faces, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("flat", r"float64 \[5, 2\]"),
        ("nan", r"float64 \[1, 5, 2\]"),
        ("ragged", "list"),
        ("nothing", "NoneType"),
        ("text", "str"),
    ],
)
def test_what_a_detector_returns_is_checked(plugin: Callable[[str], str], name: str, found: str) -> None:
    with pytest.raises(UserError, match=f"face_plugin_for_tests:{name}: returned {found}; expected finite numbers"):
        load_detector(plugin(name))(np.zeros((20, 30, 3), np.uint8))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("face_plugin_for_tests", "expected package.module:function"),
        (":one", "expected package.module:function"),
        ("face_plugin_for_tests:", "expected package.module:function"),
        (".face:one", "cannot be imported"),
        ("no_such_module_for_tests:one", r"cannot be imported \(No module named .*PYTHONPATH"),
        ("broken_plugin_for_tests:one", r"cannot be imported \(no licence\)"),
        ("face_plugin_for_tests:absent", "has no absent"),
        ("face_plugin_for_tests:number", "has a number that is no function"),
    ],
)
def test_errors_in_the_spec(plugin: Callable[[str], str], spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_detector(spec)
