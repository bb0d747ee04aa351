"""From any image file to a square of sRGB: geometry and colours, each against its own reference."""

from __future__ import annotations

import csv
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from stylepipe.datasets.photos import SkippedPhotoError, encode, read_square, to_srgb
from stylepipe.datasets.preparation import Preparation

RED, WHITE = (255, 0, 0), (255, 255, 255)


def square(path: Path, resolution: int = 8, **how: object) -> np.ndarray:
    image = read_square(path.read_bytes(), Preparation(resolution, **how)).image
    assert image.mode == "RGB"
    return np.asarray(image)


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: object) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize(("size", "box"), [((20, 8), (6, 0, 14, 8)), ((8, 21), (0, 6, 8, 14)), ((8, 8), (0, 0, 8, 8))])
def test_the_centre_is_cropped(tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    assert (square(saved(tmp_path, image)) == np.asarray(image.crop(box))).all()


def test_lanczos_and_nothing_outside_the_crop(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8))
    reference = image.crop((16, 0, 48, 32)).resize((8, 8), Image.Resampling.LANCZOS)
    assert (square(saved(tmp_path, image)) == np.asarray(reference)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((8, 8, 3), dtype=np.uint8)
    upright[:4, :4], upright[:4, 4:], upright[4:, :4] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # What a camera stores so that the tag turns it upright (EXIF 2.32, tag 274).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert (square(path) == upright).all()


def test_broken_exif_does_not_lose_the_photograph(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (8, 8), RED), "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert (square(path) == RED).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    rgba = Image.new("RGBA", (4, 1), (100, 100, 100, 255))
    for x, alpha in enumerate((0, 51, 128, 255)):
        rgba.putpixel((x, 0), (100, 100, 100, alpha))
    image = rgba.convert("P").convert("PA") if mode == "PA" else rgba.convert(mode)
    if mode == "PA":
        image.putalpha(rgba.getchannel("A"))
    expected = [round(255 + (100 - 255) * alpha / 255) for alpha in (0, 51, 128, 255)]
    # One level for rounding, and the web palette's 102 for 100.
    tolerance = 3 if mode == "PA" else 1
    assert np.abs(np.asarray(to_srgb(image))[0, :, 0].astype(int) - expected).max() <= tolerance


def test_a_transparent_palette_entry_is_white_not_its_hidden_colour(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    for name in ("a.png", "a.gif"):
        pixels = square(saved(tmp_path, image, name, transparency=1))
        assert tuple(pixels[0, 0]) == RED
        assert tuple(pixels[4, 4]) == WHITE


def test_palette_indices_are_not_grey_levels(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (square(saved(tmp_path, image)) == RED).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = square(saved(tmp_path, Image.fromarray(values), name))
    assert (pixels == np.rint(values / 257).astype(np.uint8)[:, :, None]).all()


def test_sixteen_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    values = np.full((8, 8), 1000, dtype=np.uint16)
    values[0] = 30_000
    pixels = square(saved(tmp_path, Image.fromarray(values), transparency=1000))
    assert (pixels[1:] == 255).all()
    assert (pixels[0] == round(30_000 / 257)).all()


def test_bilevel(tmp_path: Path) -> None:
    bits = np.indices((8, 8)).sum(0) % 2 == 0
    assert (square(saved(tmp_path, Image.fromarray(bits))) == bits[:, :, None] * 255).all()


def test_floats_in_the_unit_range_are_scaled_and_others_refused(tmp_path: Path) -> None:
    assert (square(saved(tmp_path, Image.new("F", (8, 8), 0.2), "a.tif")) == 51).all()
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(SkippedPhotoError, match="floating-point pixels outside"):
            square(saved(tmp_path, Image.new("F", (8, 8), value), "a.tif"))


def test_thirty_two_bit_integers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SkippedPhotoError, match="32-bit integer pixels"):
        square(saved(tmp_path, Image.new("I", (8, 8), 1 << 20), "a.tif"))


@pytest.mark.parametrize(
    ("mode", "colour"), [("CMYK", (0, 255, 255, 0)), ("YCbCr", (76, 85, 255)), ("HSV", (0, 255, 255))]
)
def test_other_colour_spaces(mode: str, colour: tuple[int, ...]) -> None:
    assert np.abs(np.asarray(to_srgb(Image.new(mode, (2, 2), colour))).astype(int) - RED).max() <= 2


def test_cmyk_jpeg_is_not_inverted(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", quality=95)
    assert np.abs(square(path).astype(int) - RED).max() <= 4


def test_lab() -> None:
    lab = Image.new("LAB", (2, 2), (255, 128, 128))  # L* = 100, a* = b* = 0
    assert np.abs(np.asarray(to_srgb(lab)).astype(int) - WHITE).max() <= 1


def test_the_embedded_profile_is_applied(tmp_path: Path) -> None:
    # Light of 0.2159 of white is 128 of 255 in sRGB (IEC 61966-2-1).
    profile = linear_grey_profile()
    path = saved(tmp_path, Image.new("L", (8, 8), round(0.2159 * 255)), icc_profile=profile)
    assert np.abs(square(path).astype(int) - 128).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_srgb_profile_changes_nothing_and_a_broken_one_is_ignored(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).convert(mode)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile", srgb[:200]):
        path = saved(tmp_path, image, icc_profile=profile)
        assert (square(path) == np.asarray(image.convert("RGB"))).all()


def test_alpha_and_profile_together(tmp_path: Path) -> None:
    image = Image.new("LA", (8, 8), (round(0.2159 * 255), 0))
    image.putpixel((0, 0), (round(0.2159 * 255), 255))
    pixels = square(saved(tmp_path, image, icc_profile=linear_grey_profile()))
    assert abs(int(pixels[0, 0, 0]) - 128) <= 2
    assert tuple(pixels[4, 4]) == WHITE


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_the_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert (square(tmp_path / name) == RED).all()


def test_the_format_is_read_from_the_content(tmp_path: Path) -> None:
    for name in ("a.jpg", "a", "a.txt"):
        Image.new("RGB", (8, 8), RED).save(tmp_path / name, format="PNG")
        assert (square(tmp_path / name) == RED).all()


def test_small_photographs_are_skipped_unless_upscaled(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (7, 20), RED))
    with pytest.raises(SkippedPhotoError) as skipped:
        square(path)
    assert (skipped.value.reason, skipped.value.detail) == ("smaller than 8 px", "7x20")
    assert (square(path, min_size=1) == RED).all()


def bad_files(folder: Path) -> dict[str, Path]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files = {name: folder / name for name in ("text.jpg", "zero.png", "cut.png", "cut.jpg", "bomb.png", "page.eps")}
    files["text.jpg"].write_text("no image")
    files["zero.png"].write_bytes(b"")
    for suffix in ("png", "jpg"):
        path = saved(folder, noise, f"cut.{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    header = bytearray(saved(folder, noise, "bomb.png").read_bytes())
    header[16:24] = (30_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    files["bomb.png"].write_bytes(header)
    noise.save(files["page.eps"])
    return files


def test_what_cannot_be_read_is_skipped_with_its_reason(tmp_path: Path) -> None:
    details = {}
    for name, path in bad_files(tmp_path).items():
        with pytest.raises(SkippedPhotoError) as skipped:
            square(path, min_size=1)
        assert skipped.value.reason == "unreadable"
        details[name] = skipped.value.detail
    unknown = "not an image of a known format"
    assert details["text.jpg"] == details["zero.png"] == details["page.eps"] == unknown
    assert "truncated" in details["cut.png"]
    assert "truncated" in details["cut.jpg"]
    assert "decompression bomb" in details["bomb.png"]


def test_every_awkward_file_is_read_or_skipped_as_pillow_can(shared: Path) -> None:
    faces = shared / "faces"
    with open(faces / "MANIFEST.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["path"].startswith("awkward/")]
    assert len(rows) == 58
    for row in rows:
        expected = row["pillow_13.0.0_result"].startswith("ok")
        try:
            image = read_square((faces / row["path"]).read_bytes(), Preparation(8, min_size=1)).image
        except SkippedPhotoError:
            assert not expected, row["path"]
        else:
            assert expected, row["path"]
            assert (image.size, image.mode) == ((8, 8), "RGB")


def test_the_same_portrait_in_every_mode_looks_the_same(shared: Path) -> None:
    folder = shared / "faces" / "awkward" / "derived"
    colour = [
        square(folder / name, 64).astype(float) for name in ("rgb16.png", "cmyk.jpg", "png_named.jpg", "palette64.png")
    ]
    grey = [square(folder / name, 64).astype(float) for name in ("grey.jpg", "grey16.png")]
    luma = colour[0] @ [0.299, 0.587, 0.114]
    for image in colour[1:]:
        assert np.abs(image - colour[0]).mean() < 6  # palettes and JPEG's CMYK cost a few levels
    for image in grey:
        assert np.abs(image[..., 0] - luma).mean() < 3


def test_encoding(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    (tmp_path / "a").write_bytes(encode(image, "png"))
    assert (np.asarray(Image.open(tmp_path / "a")) == np.asarray(image)).all()
    (tmp_path / "b").write_bytes(encode(image, "jpeg"))
    with Image.open(tmp_path / "b") as jpeg:
        assert jpeg.format == "JPEG"
        assert {component[1:3] for component in jpeg.layer} == {(1, 1)}  # 4:4:4: no component is subsampled


def linear_grey_profile() -> bytes:
    """Make a minimal ICC v2 profile of grey with gamma 1 (ICC.1:2001-04, sections 6.1 and 6.3.1.1)."""
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + (0x0100).to_bytes(2, "big") + bytes(2)
    white = b"XYZ " + bytes(4) + b"".join(round(v * 65536).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    text = b"desc" + bytes(4) + (7).to_bytes(4, "big") + b"linear\0" + bytes(78 + 3)
    tags, body = [(b"kTRC", curve), (b"wtpt", white), (b"desc", text)], b""
    start = 128 + 4 + 12 * len(tags)
    table = len(tags).to_bytes(4, "big")
    for name, data in tags:
        table += name + (start + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data + bytes(-len(data) % 4)
    header = bytearray(128)
    header[0:4] = (start + len(body)).to_bytes(4, "big")
    header[8:12], header[12:24], header[36:40] = b"\x02\x10\0\0", b"mntrGRAYXYZ ", b"acsp"
    header[68:80] = white[8:]
    return bytes(header) + table + body
