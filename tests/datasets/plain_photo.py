"""A photograph of one colour, for tests that only count and name photographs."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def photo(path: Path, colour: str = "red", size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
