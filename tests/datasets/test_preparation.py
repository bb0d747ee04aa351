"""What each option of a preparation does to photographs, and which values are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from plain_photo import photo

from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.manifest import Skipped
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.shards import file_sha256, open_dataset
from stylepipe.datasets.verifying import find_faults
from stylepipe.errors import UserError


def test_a_smaller_least_size_keeps_small_photographs(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "a.png", size=(9, 7))
    photo(tmp_path / "in" / "b.png", size=(64, 64))
    assert prepare(tmp_path / "in", tmp_path / "small", Preparation(32), workers=1, progress=False).count == 1
    assert prepare(tmp_path / "in", tmp_path / "all", Preparation(32, min_size=1), workers=1, progress=False).count == 2


def saved_as(path: Path, mode: str = "RGB", size: int = 32, **options: object) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path.read_bytes()


def test_kept_files_are_those_that_need_no_change(tmp_path: Path) -> None:
    source = tmp_path / "in"
    exif = Image.Exif()
    exif[0x0112] = 6
    kept = {
        "a.jpg": saved_as(source / "a.jpg", quality=60),
        "b.png": saved_as(source / "b.png"),
        "c.jpg": saved_as(source / "c.jpg", "L"),
        "misnamed.jpg": saved_as(source / "misnamed.jpg", format="PNG", compress_level=0),
    }
    changed = {
        "larger.jpg": saved_as(source / "larger.jpg", size=64),
        "turned.jpg": saved_as(source / "turned.jpg", exif=exif),
        "alpha.png": saved_as(source / "alpha.png", "RGBA"),
        "palette.png": saved_as(source / "palette.png", "P"),
        "cmyk.jpg": saved_as(source / "cmyk.jpg", "CMYK"),
        "other.webp": saved_as(source / "other.webp", lossless=True),
        "other.bmp": saved_as(source / "other.bmp"),
    }
    prepare(source, tmp_path / "keep", Preparation(32, format="keep", levels=True), workers=1, progress=False)
    prepare(source, tmp_path / "png", Preparation(32), workers=1, progress=False)
    keep, png = open_dataset(tmp_path / "keep"), open_dataset(tmp_path / "png")
    stored = []
    for row in keep._index:
        with open(keep.path / "shard-00000.tar", "rb") as file:
            file.seek(int(row["offset"]))
            stored.append(file.read(int(row["size"])))
    for name, data in kept.items():
        assert data in stored, name
    for name, data in changed.items():
        assert data not in stored, name
    kinds = Counter(data[:4] for data in stored)
    assert kinds == {b"\x89PNG": 2 + 4, b"\xff\xd8\xff\xe0": 2 + 3}
    difference = np.abs(keep.read(range(11)).astype(int) - png.read(range(11)))
    assert (difference.mean(axis=(1, 2, 3)) < 4).all(), "only what was a JPEG, and is one again, differs a little"
    assert sum(difference.mean(axis=(1, 2, 3)) == 0) == 11 - 3
    assert (keep.level(16).read(range(11)).shape) == (11, 16, 16, 3)
    assert find_faults(tmp_path / "keep", workers=1, progress=False) == []


def test_transparency_is_laid_over_the_colour_asked_for(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (16, 16), (200, 0, 0, 51)).save(tmp_path / "in" / "a.png")
    prepare(tmp_path / "in", tmp_path / "out", Preparation(16, background="#0040ff"), workers=1, progress=False)
    # By hand: a fifth of the image, four fifths of the background.
    assert open_dataset(tmp_path / "out").read([0])[0, 0, 0].tolist() == [40, 51, 204]


def test_without_a_crop_only_squares_are_taken(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "square.png", size=(40, 40))
    photo(tmp_path / "in" / "wide.png", size=(41, 40))
    manifest = prepare(tmp_path / "in", tmp_path / "out", Preparation(32, crop="none"), workers=1, progress=False)
    assert manifest.count == 1
    assert manifest.skipped == (Skipped("wide.png", "not square", "41x40"),)


@pytest.mark.parametrize("workers", [1, 3])
def test_more_bad_files_than_allowed_stop_it(photos: Path, tmp_path: Path, workers: int) -> None:
    photo(photos / "small.png", size=(5, 5))  # not bad, only small
    for index in range(3):
        (photos / f"{index}.jpg").write_text("no image")
    assert prepare(photos, tmp_path / "a", Preparation(16, max_bad=3), workers=workers, progress=False).count == 23
    with pytest.raises(UserError, match=r"--max-bad 2: .* more files that cannot be read, the last one found is \d"):
        prepare(photos, tmp_path / "b", Preparation(16, max_bad=2), workers=workers, progress=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "--min-size 0: expected 1 or more"),
        ({"background": "white"}, "--background white: expected a colour such as #ffffff"),
        ({"shard_mb": 0.0}, "--shard-mb 0: expected a number above 0"),
        ({"shard_mb": float("nan")}, "--shard-mb nan: expected a number above 0"),
        ({"shuffle_seed": -1}, "--shuffle-seed -1: expected 0 or more"),
        ({"max_bad": -1}, "--max-bad -1: expected 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(
    photos: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(photos, tmp_path / "out", Preparation(16, **options), progress=False)


def test_shards_are_of_the_size_asked_for(photos: Path, tmp_path: Path) -> None:
    manifest = prepare(photos, tmp_path / "out", Preparation(16, shard_mb=0.01), workers=1, progress=False)
    sizes = [record.bytes for record in manifest.shards]
    assert len(sizes) > 1
    assert max(sizes) <= 0.01 * 2**20
    assert min(sizes[:-1]) > 0.005 * 2**20


def test_copies_are_left_out_and_their_originals_named(tmp_path: Path) -> None:
    for index in range(12):
        face = draw_face(index, 128)
        (tmp_path / "in").mkdir(exist_ok=True)
        face.save(tmp_path / "in" / f"{index:02d}.png")
    draw_face(3, 128).save(tmp_path / "in" / "again.png")
    draw_face(5, 128).save(tmp_path / "in" / "compressed.jpg", quality=75)
    draw_face(7, 128).resize((300, 300), Image.Resampling.LANCZOS).save(tmp_path / "in" / "resized.png")
    everything = prepare(tmp_path / "in", tmp_path / "all", Preparation(128), workers=1, progress=False)
    assert everything.count == 15
    manifest = prepare(tmp_path / "in", tmp_path / "out", Preparation(128, dedupe=True), workers=2, progress=False)
    assert manifest.count == 12
    assert {skipped.reason for skipped in manifest.skipped} == {"duplicate"}
    pairs = {frozenset({s.file, s.detail.split(":")[0].removeprefix("of ")}) for s in manifest.skipped}
    assert pairs == {
        frozenset({"03.png", "again.png"}),
        frozenset({"05.png", "compressed.jpg"}),
        frozenset({"07.png", "resized.png"}),
    }
    exact = [s for s in manifest.skipped if "the same pixels" in s.detail]
    assert len(exact) == 1


def eyes_and_mouth(x: float, y: float, scale: float) -> list[list[float]]:
    face = [(-1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-0.8, 2.0), (0.8, 2.0)]
    return [[x + scale * dx, y + scale * dy] for dx, dy in face]


def test_aligned_photographs_show_the_face_at_one_place(tmp_path: Path) -> None:
    """A red and a blue dot for the eyes, wherever they are, come to the same places."""
    landmarks = {}
    for index, (x, y, scale) in enumerate([(150, 120, 20), (260, 300, 35), (200, 200, 25)]):
        picture = Image.new("RGB", (480, 520), "white")
        draw = ImageDraw.Draw(picture)
        points = eyes_and_mouth(x, y, scale)
        for (px, py), colour in zip(points, ["red", "blue", "white", "white", "white"], strict=True):
            draw.ellipse((px - scale / 4, py - scale / 4, px + scale / 4, py + scale / 4), fill=colour)
        (tmp_path / "in").mkdir(exist_ok=True)
        picture.save(tmp_path / "in" / f"{index}.png")
        landmarks[f"{index}.png"] = points
    Image.new("RGB", (480, 520)).save(tmp_path / "in" / "no face.png")
    Image.new("RGB", (480, 520)).save(tmp_path / "in" / "far.png")
    landmarks["far.png"] = eyes_and_mouth(200, 200, 2)
    (tmp_path / "faces.json").write_text(json.dumps(landmarks | {"absent.png": eyes_and_mouth(9, 9, 9)}))
    how = Preparation(64, crop="align", landmarks=str(tmp_path / "faces.json"))
    manifest = prepare(tmp_path / "in", tmp_path / "out", how, workers=2, progress=False)
    assert manifest.count == 3
    assert {s.file: s.reason for s in manifest.skipped} == {"no face.png": "no face", "far.png": "smaller than 64 px"}
    assert manifest.options["landmarks_sha256"] == file_sha256(tmp_path / "faces.json")
    assert "landmarks" not in manifest.options
    images = open_dataset(tmp_path / "out").read(range(3)).astype(int)
    for red, green, blue in ((255, 0, 0), (0, 0, 255)):
        distance = np.abs(images - np.array([red, green, blue])).sum(axis=-1)
        places = np.array([np.argwhere(d < 200).mean(axis=0) for d in distance])
        assert np.ptp(places, axis=0).max() < 1.5, places
    # By the formula: the eyes are 2 apart and the square is max(4, 3.6) * 2 sides... of 64 px, so 16 px.
    eyes = [np.argwhere(np.abs(image - np.array([255, 0, 0])).sum(axis=-1) < 200).mean(axis=0)[1] for image in images]
    assert np.mean(eyes) == pytest.approx(32 - 8, abs=1.5)


def test_landmarks_of_other_photographs_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "faces.csv").write_text("name,x1\nelse.png," + ",".join(["1,2"] * 5) + "\n")
    how = Preparation(16, crop="align", landmarks=str(tmp_path / "faces.csv"))
    with pytest.raises(UserError, match=r"names none of the photographs in .*, such as cats/000\.png"):
        prepare(photos, tmp_path / "out", how, workers=1, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "align"}, "--crop align: expected --landmarks FILE, or --detector"),
        ({"landmarks": "a.json"}, "--landmarks a.json: --crop centre makes no use of it"),
        ({"detector": "a:b", "crop": "none"}, "--detector a:b: --crop none makes no use of it"),
        ({"crop": "align", "landmarks": "a.json", "detector": "a:b"}, "--crop align: expected --landmarks FILE, or"),
        ({"crop": "align", "detector": "nowhere:f"}, "detector nowhere:f: nowhere cannot be imported"),
    ],
)
def test_alignment_needs_one_way_to_find_faces(
    photos: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(photos, tmp_path / "out", Preparation(16, **options), workers=1, progress=False)
