"""Bytes, grids and image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stylepipe.errors import UserError
from stylepipe.images import grid_shape, make_grid, parse_grid, save_image, to_uint8


def test_bytes_survive_the_way_to_floats_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    img = (levels.float() / 127.5 - 1).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    back = to_uint8(img)
    assert back.shape == (2, 16, 16, 3)
    assert back.is_contiguous()
    assert torch.equal(back[1, :, :, 2].reshape(-1), levels)


def test_values_are_rounded_to_the_nearest_and_clipped() -> None:
    step = 2 / 255  # one byte's width
    img = torch.tensor([-5.0, -1 + 0.49 * step, -1 + 0.51 * step, 1 - 0.49 * step, 7.0]).view(1, 1, 1, 5)
    assert to_uint8(img).flatten().tolist() == [0, 0, 1, 255, 255]
    assert to_uint8(img.bfloat16()).flatten().tolist()[::4] == [0, 255]


def test_a_grid_reads_from_the_left_and_the_top_and_ends_black() -> None:
    images = np.stack([np.full((2, 3, 3), value, dtype=np.uint8) for value in (10, 20, 30, 40, 50)])
    images[1, 0, 2] = 99  # top right corner of the second image
    grid = make_grid(images, columns=3)
    assert grid.shape == (4, 9, 3)
    assert grid[::2, ::3, 0].tolist() == [[10, 20, 30], [40, 50, 0]]
    assert grid[0, 5].tolist() == [99, 99, 99]
    assert not grid[2:, 6:].any()


@pytest.mark.parametrize("res", [8, 16, 32, 64, 128, 256, 512, 1024])
def test_a_grid_fits_a_screen(res: int) -> None:
    columns, rows = grid_shape(res)
    assert 2 <= columns <= 15
    assert 2 <= rows <= 8
    assert columns * res <= max(1920, 2 * res)
    assert rows * res <= max(1080, 2 * res)


def test_parse_grid() -> None:
    assert parse_grid("4x3") == (4, 3)
    for wrong in ("4", "x3", "0x3", "4x-1", "4 by 3", "1.5x2", ""):
        with pytest.raises(UserError, match="expected COLUMNSxROWS"):
            parse_grid(wrong)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_hold_every_bit(tmp_path: Path, suffix: str, channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (13, 17, channels), dtype=np.uint8)
    path = tmp_path / "new" / f"a{suffix}"
    save_image(path, image)
    read = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(read, np.broadcast_to(image, (13, 17, 3)))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=r"\.jpg found, expected \.png or \.webp"):
        save_image(tmp_path / "a.jpg", image)
    with pytest.raises(UserError, match="no suffix found"):
        save_image(tmp_path / "a", image)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        save_image(tmp_path / "file" / "a.png", image)
    with pytest.raises(UserError, match="20000 x 1 pixels, and WebP takes 16383"):
        save_image(tmp_path / "wide.webp", np.zeros((1, 20000, 3), dtype=np.uint8))


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_image(path, np.full((4, 4, 3), 7, dtype=np.uint8))
    before = path.read_bytes()

    def fill_up(self: Image.Image, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_up)
    with pytest.raises(UserError, match="No space left on device"):
        save_image(path, np.zeros((4, 4, 3), dtype=np.uint8))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
