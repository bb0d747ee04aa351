"""Duplicates: copies are found, distinct faces stay, and the index finds what comparing with all would."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stylepipe.datasets.dedupe import Duplicate, Duplicates, Fingerprint, fingerprint
from stylepipe.datasets.drawn import draw_face


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def half_and_back(image: Image.Image) -> Image.Image:
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    return half.resize(image.size, Image.Resampling.BICUBIC)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "quality 75": lambda image: jpeg(image, 75),
    "quality 50": lambda image: jpeg(image, 50),
    "half and back": half_and_back,
    "2 % brighter": lambda image: image.point(lambda level: min(round(level * 1.02), 255)),
}


def of(image: Image.Image) -> Fingerprint:
    return fingerprint(np.asarray(image))


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    return [draw_face(index, 128) for index in range(60)]


def test_a_fingerprint_by_its_definition() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = fingerprint(pixels)
    assert found.digest == hashlib.sha256(pixels.tobytes()).digest()
    means = pixels.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(found.thumbnail - means).max() <= 1.5  # rounded three times on its way, by a half each
    # The cosine transform in floating point, of the box averages before rounding.
    luma = pixels.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)) @ [0.299, 0.587, 0.114]
    cosines = np.cos(np.pi / 32 * np.outer(np.arange(1, 17), np.arange(32) + 0.5))
    spectrum = cosines @ luma @ cosines.T
    for band in range(16):
        for u in range(16):
            value = spectrum[u, (u + band) % 16]
            if abs(value) > 30:  # what rounding of 1,024 averages cannot turn
                assert bool(found.hash[band] >> u & 1) == (value > 0)


@pytest.mark.parametrize("resolution", [8, 16, 32, 64])
def test_every_resolution_has_a_fingerprint(resolution: int) -> None:
    found = of(draw_face(0, resolution))
    assert (found.hash.dtype, found.hash.shape) == (np.uint16, (16,))
    assert (found.thumbnail.dtype, found.thumbnail.shape) == (np.uint8, (16, 16, 3))


def test_exact_copies_name_the_first(drawn: list[Image.Image]) -> None:
    duplicates = Duplicates()
    assert [duplicates.find(of(image), name) for name, image in zip("abc", drawn, strict=False)] == [None] * 3
    assert duplicates.find(of(drawn[1].copy()), "d") == Duplicate("b", exact=True, levels=0)
    assert duplicates.find(of(drawn[1].copy()), "e") == Duplicate("b", exact=True, levels=0)
    assert len(duplicates) == 3


def test_one_pixel_makes_a_near_copy(drawn: list[Image.Image]) -> None:
    duplicates = Duplicates()
    duplicates.find(of(drawn[0]), "a")
    changed = drawn[0].copy()
    changed.putpixel((3, 3), tuple(255 - level for level in changed.getpixel((3, 3))))
    found = duplicates.find(of(changed), "b")
    assert found is not None
    assert (found.of, found.exact) == ("a", False)


@pytest.mark.parametrize("copy", COPIES)
def test_drawn_faces_stay_and_their_copies_are_found(drawn: list[Image.Image], copy: str) -> None:
    duplicates = Duplicates()
    assert [duplicates.find(of(image), str(i)) for i, image in enumerate(drawn)] == [None] * len(drawn)
    for i, image in enumerate(drawn):
        found = duplicates.find(of(COPIES[copy](image)), "copy")
        assert found is not None, i
        assert (found.of, found.exact) == (str(i), False)
        assert 0 < found.levels <= 10


def test_of_two_that_are_alike_the_nearer_is_named(drawn: list[Image.Image]) -> None:
    # 8 and 16 levels brighter: the one between is near to both.
    duplicates = Duplicates()
    grey = Image.blend(drawn[0], Image.new("RGB", drawn[0].size, (100, 100, 100)), 0.5)
    for name, more in (("a", 0), ("b", 16)):
        assert duplicates.find(of(grey.point(lambda level, more=more: level + more)), name) is None
    for more, name in ((6, "a"), (10, "b")):
        found = duplicates.find(of(grey.point(lambda level, more=more: level + more)), "c")
        assert found is not None
        assert found.of == name
        assert found.levels == pytest.approx(6, abs=0.01)


def test_a_smile_is_no_copy(drawn: list[Image.Image]) -> None:
    # A change within a fortieth of the picture, far less in the mean of all differences than a brighter copy.
    changed = drawn[0].copy()
    region = (50, 88, 78, 100)
    changed.paste(Image.eval(drawn[0].crop(region), lambda level: level + 40 if level < 128 else level - 40), region)
    difference = np.asarray(changed).astype(int) - np.asarray(drawn[0])
    assert np.abs(difference).mean() < 1
    duplicates = Duplicates()
    assert duplicates.find(of(drawn[0]), "a") is None
    assert duplicates.find(of(changed), "b") is None


def test_detail_that_leaves_the_mean_colour_is_no_copy(drawn: list[Image.Image]) -> None:
    # One tile of the thumbnail, in a checkerboard whose mean is 0; the hash is left alike.
    one = of(Image.blend(drawn[0], Image.new("RGB", drawn[0].size, (128, 128, 128)), 0.5))
    for contrast, kept in ((8, False), (12, True)):
        thumbnail = one.thumbnail.copy()
        thumbnail[8:10, 6:8] += np.array([[contrast, -contrast], [-contrast, contrast]]).astype(np.uint8)[..., None]
        duplicates = Duplicates()
        assert duplicates.find(one, "a") is None
        assert (duplicates.find(Fingerprint(bytes(32), one.hash, thumbnail), "b") is None) == kept


def test_another_colour_of_equal_luma_is_no_copy(drawn: list[Image.Image]) -> None:
    # 0.299 R + 0.587 G + 0.114 B stays: 39 of red for 20 of green.
    recoloured = np.asarray(Image.blend(drawn[0], Image.new("RGB", drawn[0].size, (128, 128, 128)), 0.5)).astype(int)
    duplicates = Duplicates()
    assert duplicates.find(fingerprint(recoloured.astype(np.uint8)), "a") is None
    recoloured[..., 0] += 39
    recoloured[..., 1] -= 20
    assert duplicates.find(fingerprint(recoloured.astype(np.uint8)), "b") is None


def test_plain_pictures_are_told_apart_by_colour() -> None:
    duplicates = Duplicates()
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200)), ("black", (0, 0, 0))):
        assert duplicates.find(of(Image.new("RGB", (64, 64), colour)), name) is None
    found = duplicates.find(of(Image.new("RGB", (64, 64), (201, 0, 0))), "b")
    assert found is not None
    assert found.of == "red"


def random_fingerprints(count: int, seed: int) -> list[Fingerprint]:
    """Make families of hashes that differ in few bits or some, all with one grey thumbnail: the hash decides."""
    rng = np.random.default_rng(seed)
    thumbnail = np.full((16, 16, 3), 100, np.uint8)
    parents = rng.integers(0, 1 << 16, (40, 16), dtype=np.uint16)
    made = []
    for number in range(count):
        bits = np.unpackbits(parents[rng.integers(40)].view(np.uint8))
        bits[rng.choice(256, rng.integers(25), replace=False)] ^= 1
        made.append(Fingerprint(number.to_bytes(32, "big"), np.packbits(bits).view(np.uint16), thumbnail))
    return made


def test_the_index_finds_what_comparing_with_all_finds() -> None:
    duplicates, kept = Duplicates(), []
    for number, one in enumerate(random_fingerprints(1500, seed=0)):
        near = [name for name, other in kept if np.bitwise_count(one.hash ^ other.hash).sum() <= 15]
        found = duplicates.find(one, str(number))
        assert (found is None) == (not near)
        if found is None:
            kept.append((str(number), one))
        else:
            assert found.of == near[0]  # all are equally near, and the first goes before
    assert 100 < len(kept) == len(duplicates) < 1400


@pytest.mark.parametrize("cuts", [[], [700], [0, 10, 1100]])
def test_a_state_goes_on_as_if_never_stopped(cuts: list[int]) -> None:
    # More than 1,024 are kept, where the arrays grow.
    rng = np.random.default_rng(1)
    first, second = (
        [fingerprint(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)] for count in (1200, 20)
    )
    whole, states, since = Duplicates(), [], 0
    for number, one in enumerate(first):
        if number in cuts:
            states.append(whole.state(since))
            since = len(whole)
        assert whole.find(one, str(number)) is None
    states.append(whole.state(since))
    assert sum(len(state["names"]) for state in states) == 1200
    restored = Duplicates.from_state(*states)
    for number, one in enumerate(first + second + second):
        assert restored.find(one, f"new {number}") == whole.find(one, f"new {number}")
    for key, value in whole.state().items():
        assert np.array_equal(restored.state()[key], value)


def test_a_state_does_not_change_with_what_comes_later(drawn: list[Image.Image]) -> None:
    duplicates = Duplicates()
    empty = duplicates.state()
    duplicates.find(of(drawn[0]), "a")
    state = duplicates.state()
    duplicates.find(of(drawn[1]), "b")
    assert (len(Duplicates.from_state(empty)), len(Duplicates.from_state(state))) == (0, 1)
    assert state["names"] == ["a"]


def test_a_damaged_state_is_refused(drawn: list[Image.Image]) -> None:
    duplicates = Duplicates()
    duplicates.find(of(drawn[0]), "a")
    good = duplicates.state()
    for key, value, message in [
        ("names", ["a", "b"], r"digests of duplicates: uint8 \(1, 32\), expected uint8 \(2, 32\)"),
        ("hashes", good["hashes"].astype(np.int64), "hashes of duplicates: int64"),
        ("thumbnails", good["thumbnails"][:, :8], "thumbnails of duplicates"),
    ]:
        with pytest.raises(ValueError, match=message):
            Duplicates.from_state({**good, key: value})
    with pytest.raises(ValueError, match="without digests"):
        Duplicates.from_state({key: value for key, value in good.items() if key != "digests"})


def photographs(folder: Path) -> dict[str, Image.Image]:
    return {path.name: Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))}


@pytest.mark.parametrize(("folder", "count"), [("faces256", 945), ("faces1024", 92)])
def test_no_real_face_is_lost(shared: Path, folder: str, count: int) -> None:
    # A neutral and a smiling portrait of one person, or two people before one background, are no copies.
    duplicates = Duplicates()
    for name, image in photographs(shared / "faces" / folder).items():
        assert duplicates.find(of(image), name) is None, name
    assert len(duplicates) == count


@pytest.mark.parametrize(("folder", "step"), [("faces256", 8), ("faces1024", 10)])
def test_copies_of_real_faces_are_found(shared: Path, folder: str, step: int) -> None:
    duplicates = Duplicates()
    images = dict(list(photographs(shared / "faces" / folder).items())[::step])
    for name, image in images.items():
        duplicates.find(of(image), name)
    for name, image in images.items():
        for kind, copied in COPIES.items():
            found = duplicates.find(of(copied(image)), "copy")
            assert found is not None, (name, kind)
            assert found.of == name
