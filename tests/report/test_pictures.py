"""Pictures of a page: within their room, whatever the run."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from made_runs import smooth_grid, write_run
from PIL import Image

from stylepipe.report import pictures
from stylepipe.report.pictures import Album, Cache, cells_of, make_albums, spread
from stylepipe.report.run import Run, read_run


def album_of(run: Run, room: int, best: set[int] | None = None, cache: Cache | None = None) -> Album:
    (album,) = make_albums([run], [best or set()], room, cache or Cache())
    assert sum(picture.embedded_bytes for picture in album.pictures()) <= room
    return album


def size_of(picture: pictures.Picture) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture.content)).size


def link_grids(folder: Path, count: int) -> None:
    """Have a run show its two grids at many moments."""
    for i in range(count):
        path = folder / f"grids/{i:06d}.000.png"
        if not path.exists():
            os.link(folder / f"grids/{i % 2:06d}.000.png", path)


def test_what_fits_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    album = album_of(read_run(folder), 4_000_000)
    assert album.grids[1000].content == (folder / "grids/000001.000.png").read_bytes()
    assert album.real is not None
    assert (album.real.mime, album.notes) == ("image/png", [])


def test_too_many_grids_are_spread_with_first_last_and_best(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", moments=(0, 1000), res=8)
    link_grids(folder, 300)
    album = album_of(read_run(folder), 50_000_000, best={77_100})
    assert len(album.grids) == pictures.MAX_MOMENTS
    assert {0, 77_000, 299_000} <= set(album.grids)
    steps = [b - a for a, b in zip(list(album.grids), list(album.grids)[1:], strict=False)]
    assert max(steps) <= 3 * min(max(steps), 300_000 / pictures.MAX_MOMENTS)
    assert album.notes == ["80 of 300 grids, spread over the run"]


@pytest.mark.parametrize(
    ("res", "room"),
    [(32, 100_000), *(pytest.param(1024, room, marks=pytest.mark.slow) for room in (150_000, 3_500_000))],
)
def test_sixty_grids_stay_within_their_room(tmp_path: Path, res: int, room: int) -> None:
    folder = write_run(tmp_path / "r", moments=(0, 1000), res=res)
    link_grids(folder, 60)
    album = album_of(read_run(folder), room, best={31_000})
    assert {0, 31_000, 59_000} <= set(album.grids)
    assert album.real is not None
    assert any("of 60 grids" in note or "wide" in note for note in album.notes)
    assert max(size_of(album.grids[0])) >= 320
    assert sum(picture.embedded_bytes for picture in album.pictures()) > room / 4, "room is made use of"


def test_no_room_at_all_is_said(tmp_path: Path) -> None:
    album = album_of(read_run(write_run(tmp_path / "r")), 100)
    assert album.pictures() == []
    assert album.notes == ["none of 4 grids"]


def test_faces_get_fewer_before_they_get_tiny(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", moments=(0, 1000), res=64))
    assert cells_of(run, (960, 512)) == (15, 8, 64)
    cache = Cache()
    picture = cache.get(run.grids[0], pictures.Treatment(2, 400, 50), 64)
    assert picture is not None
    assert size_of(picture) == (6 * 64, 6 * 64), "whole faces, at their own size"
    run.config = {}
    assert cells_of(run, (960, 512)) == (1, 1, 0)
    picture = cache.get(run.grids[0], pictures.Treatment(2, 400, 50), 0)
    assert picture is not None
    assert size_of(picture)[0] == 400


def test_damaged_grids_are_named_and_others_stand_in(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    whole = (folder / "grids/000003.000.png").read_bytes()
    (folder / "grids/000003.000.png").write_bytes(whole[: len(whole) // 2])
    (folder / "grids/000000.000.png").write_bytes(b"")
    (folder / "grids/real.png").write_text("no picture")
    album = album_of(read_run(folder), 4_000_000)
    assert list(album.grids) == [1000, 2000]
    assert album.real is None
    names = ("grids/000000.000.png", "grids/000003.000.png", "grids/real.png")
    assert album.problems == [f"{name}: is no whole picture" for name in names]


def test_several_runs_share_the_room(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, res=32)) for name in "abc"]
    albums = make_albums(runs, [set()] * 3, 250_000, Cache())
    assert sum(picture.embedded_bytes for album in albums for picture in album.pictures()) <= 250_000
    assert {len(album.grids) for album in albums} == {4}
    assert len({str(album.notes) for album in albums}) == 1


def test_the_newest_clip_if_it_fits(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r")
    (folder / "clips").mkdir()
    for kimg in ("000001.000", "000002.000"):
        smooth_grid(8, 0).save(folder / f"clips/{kimg}.gif")
    album = album_of(read_run(folder), 4_000_000)
    assert album.clip is not None
    assert (album.clip[0], album.clip[1].mime) == (2000, "image/gif")
    (folder / "clips/000002.000.gif").write_bytes(b"GIF89a" + bytes(2_000_000))
    album = album_of(read_run(folder), 4_000_000)
    assert album.clip is None
    assert "without the clip clips/000002.000.gif, of 1.9 MB" in album.notes
    (folder / "clips/000002.000.gif").write_bytes(b"no clip")
    assert "clips/000002.000.gif: is no whole picture" in album_of(read_run(folder), 4_000_000).problems


def test_a_picture_is_made_once_until_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    treated = pictures._treated
    monkeypatch.setattr(pictures, "_treated", lambda path, *rest: made.append(path) or treated(path, *rest))
    folder, cache = write_run(tmp_path / "r", moments=(0, 1000), res=32), Cache()
    album_of(read_run(folder), 100_000, cache=cache)
    assert made
    made.clear()
    album_of(read_run(folder), 100_000, cache=cache)
    assert made == []
    smooth_grid(32, 7).save(folder / "grids/000001.000.png")
    album_of(read_run(folder), 100_000, cache=cache)
    assert set(made) == {folder / "grids/000001.000.png"}


def test_spread() -> None:
    assert spread(5, 10, []) == [0, 1, 2, 3, 4]
    assert spread(101, 3, [50]) == [0, 50, 100]
    assert spread(101, 2, [50]) == [0, 50, 100]
    assert spread(1, 3, []) == [0]
    assert spread(0, 3, []) == []
    assert len(spread(1000, 40, [1, 2, 3])) == 40
