"""Every decoder gives the same pixels, and refuses what is not whole."""

from __future__ import annotations

import io
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stylepipe.datasets import decoding
from stylepipe.datasets.decoding import decode_into
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.photos import encode

FAST = [name for name in ("simplejpeg", "spng_decode") if getattr(decoding, name) is not None]
SIDE = 48


def face(mode: str = "RGB") -> Image.Image:
    return draw_face(7, SIDE).convert(mode)


def saved(mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    face(mode).save(buffer, **options)
    return buffer.getvalue()


FILES = {
    "png": encode(face(), "png"),
    "jpeg": encode(face(), "jpeg"),
    "ppm": encode(face(), "ppm"),
    "kept 4:2:0": saved("RGB", format="JPEG", quality=50, subsampling=2),
    "kept 4:2:2, progressive": saved("RGB", format="JPEG", quality=80, subsampling=1, progressive=True),
    "grey jpeg": saved("L", format="JPEG"),
    "grey png": saved("L", format="PNG"),
    "interlaced by no one, uncompressed": saved("RGB", format="PNG", compress_level=0),
}


def decoded(data: bytes, side: int = SIDE) -> np.ndarray:
    batch = np.zeros((3, side, side, 3), np.uint8)
    decode_into(data, batch[1])
    assert not batch[0].any()
    assert not batch[2].any()
    return batch[1]


@pytest.mark.parametrize("kind", FILES)
def test_pixels_are_those_of_pillow(kind: str) -> None:
    with Image.open(io.BytesIO(FILES[kind])) as image:
        assert (decoded(FILES[kind]) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.skipif(len(FAST) < 2, reason="simplejpeg and imagecodecs are not installed")
def test_the_fast_decoders_are_taken_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "Image", types.SimpleNamespace(open=None))
        for kind in FILES.keys() - {"grey png"}:
            decoded(FILES[kind])
    for name in FAST:
        monkeypatch.setattr(decoding, name, None)
    for kind, data in FILES.items():
        with Image.open(io.BytesIO(data)) as image:
            assert (decoded(data) == np.asarray(image.convert("RGB"))).all(), kind


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", FILES)
def test_what_is_not_whole_or_of_another_size_is_refused(
    kind: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        for name in ("simplejpeg", "spng_decode"):
            monkeypatch.setattr(decoding, name, None)
    data = FILES[kind]
    with pytest.raises(ValueError, match=f"{SIDE}x{SIDE} pixels|no PPM file of 32x32"):
        decoded(data, 32)
    for cut in (2, 30, len(data) // 2, 3 * len(data) // 4):
        with pytest.raises(Exception):  # noqa: B017, PT011 - decoders raise what they like
            decoded(data[:cut])


def test_real_photographs(shared: Path) -> None:
    for path in sorted((shared / "faces" / "faces1024").iterdir())[:6]:
        with Image.open(path) as image:
            if image.size == (1024, 1024) and image.mode == "RGB":
                assert (decoded(path.read_bytes(), 1024) == np.asarray(image)).all(), path
