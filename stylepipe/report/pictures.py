"""Grids small enough for a page: as they are if they fit, else fewer, smaller, and of lower quality."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from stylepipe.images import grid_shape
from stylepipe.report.run import Run

T = TypeVar("T")

MAX_MOMENTS = 80
CLIP_SHARE = 1 / 3  # of the room for pictures that clips may take
MAX_PIXELS = 1 << 25  # of one picture: eight times what the largest grid has
MIN_CELL = 64  # pixels: rather than a smaller face, fewer faces
_LEAST_BYTES_PER_PIXEL = 0.02  # WebP of less is not worth looking at, nor trying
_GAIN = 0.7  # of a treatment over the one before, per pixel, at the most
_SAMPLES, _MARGIN = 4, 0.95  # pictures of a run to guess the size of all from, and how near to the room all may come
_OVERHEAD = 192  # characters around each picture, with its moment
_THREADS = 2  # training goes on beside this


@dataclass(frozen=True)
class Treatment:
    """What is done to a run's grids to save room."""

    least: int
    """Of so many moments there must be room, or else they get smaller rather than fewer. More are taken if they fit."""
    side: int
    """Pixels of the longer side at most."""
    quality: int
    """Of WebP."""


# The mildest first.
TREATMENTS = (
    Treatment(MAX_MOMENTS, 2048, 92),
    Treatment(70, 1440, 85),
    Treatment(60, 1200, 80),
    Treatment(50, 1024, 78),
    Treatment(36, 960, 75),
    Treatment(24, 800, 72),
    Treatment(16, 640, 68),
    Treatment(8, 480, 62),
    Treatment(4, 400, 55),
    Treatment(2, 320, 50),
    Treatment(2, 240, 40),
)


@dataclass(frozen=True)
class Picture:
    """An image file's bytes."""

    mime: str
    content: bytes

    @property
    def key(self) -> str:
        """A name that is the same for the same bytes only."""
        return hashlib.blake2b(self.content, digest_size=12).hexdigest()

    @property
    def embedded_bytes(self) -> int:
        """Characters that it takes in a page."""
        return 4 * math.ceil(len(self.content) / 3) + _OVERHEAD


@dataclass
class Album:
    """The pictures of one run on the page."""

    grids: dict[int, Picture] = field(default_factory=dict)
    """By images seen."""
    real: Picture | None = None
    clip: tuple[int, Picture] | None = None
    """Images seen and the animation."""
    notes: list[str] = field(default_factory=list)
    """What was done to save room."""
    problems: list[str] = field(default_factory=list)

    def pictures(self) -> list[Picture]:
        """Return all of them."""
        return [*self.grids.values(), *([self.real] if self.real else []), *([self.clip[1]] if self.clip else [])]


class Cache:
    """Keeps what was made of a file until the file changes; what one round does not ask for is dropped after it."""

    def __init__(self) -> None:
        self._old: dict[Any, Picture | None] = {}
        self._new: dict[Any, Picture | None] = {}

    def get(self, path: Path, treatment: Treatment | None, cell: int) -> Picture | None:
        """Return the treated picture of a file, or the file as it is; None if it is damaged."""
        try:
            stat = path.stat()
            side_and_quality = (treatment.side, treatment.quality) if treatment else None
            key = (path, stat.st_mtime_ns, stat.st_size, side_and_quality, cell)
            if key not in self._new:
                self._new[key] = self._old[key] if key in self._old else _treated(path, treatment, cell)
            return self._new[key]
        except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError):  # Pillow's, of damage
            return None

    def end_round(self) -> None:
        """Drop what was not asked for since the last call."""
        self._old, self._new = self._new, {}


def make_albums(runs: Sequence[Run], best: Sequence[set[int]], room: int, cache: Cache) -> list[Album]:
    """Choose and make the pictures of runs so that they take `room` characters in all at most.

    All runs get the same treatment, the mildest that fits.

    Args:
        runs: whose grids, real images and newest clips are wanted.
        best: for each run images seen of which a grid is wanted in any case, beside the first and the last.
        room: characters in the page.
        cache: keeps what was made between calls.
    """
    albums = [Album() for _ in runs]
    _add_clips(runs, albums, int(room * CLIP_SHARE), cache)
    room -= sum(picture.embedded_bytes for album in albums for picture in album.pictures())
    fitting = _Fitting(runs, best, room, cache)
    for treatment in (None, *TREATMENTS):
        made = fitting.made(treatment)
        if made is not None:
            for run, album, pictures in zip(runs, albums, made, strict=True):
                _fill(album, run, pictures, treatment)
            break
    else:
        for run, album in zip(runs, albums, strict=True):
            if run.grids:
                album.notes.append(f"none of {len(run.grids):,} grids")
    for run, album in zip(runs, albums, strict=True):
        own = sorted(path for path in fitting.damaged if path.is_relative_to(run.path))
        album.problems += [f"{path.relative_to(run.path)}: is no whole picture" for path in own]
    cache.end_round()
    return albums


class _Fitting:
    """Finds out whether the pictures of runs fit after a treatment; asked from the mildest on."""

    def __init__(self, runs: Sequence[Run], best: Sequence[set[int]], room: int, cache: Cache) -> None:
        self._runs, self._best, self._room, self._cache = runs, best, room, cache
        self._bytes_per_pixel = 0.0  # of the samples of the treatment before, which was milder
        self.damaged: set[Path] = set()

    def made(self, treatment: Treatment | None) -> list[dict[int | None, Picture]] | None:
        """Make each run's pictures by images seen, the real ones under None; return None where too few of them fit.

        Others stand in for damaged ones, where there are others.
        """
        while True:
            damaged = len(self.damaged)
            files = self._chosen(1)
            share = self._share_as_files(files) if treatment is None else self._share(files, treatment)
            if share < 1:
                files = self._chosen(share)
            if not self._enough(files, treatment):
                return None
            with ThreadPoolExecutor(_THREADS) as pool:
                made = []
                for run, own in zip(self._runs, files, strict=True):
                    pictures = pool.map(partial(self._one, run, treatment), own.values())
                    made.append({seen: one for seen, one in zip(own, pictures, strict=True) if one})
            if len(self.damaged) == damaged:
                return self._trimmed(made, treatment)

    def _chosen(self, share: float) -> list[dict[int | None, Path]]:
        """Choose which files of each run to show: a share of its moments."""
        chosen = []
        for run, best in zip(self._runs, self._best, strict=True):
            whole = {seen: path for seen, path in run.grids.items() if path not in self.damaged}
            grids = _spread_over(whole, min(len(whole), MAX_MOMENTS) * share, best)
            real = run.real if run.real not in self.damaged else None
            chosen.append(_with_real(real, grids))
        return chosen

    def _enough(self, chosen: Sequence[dict[int | None, Any]], treatment: Treatment | None) -> bool:
        least = treatment.least if treatment else MAX_MOMENTS
        return all(
            sum(seen is not None for seen in own) >= min(least, MAX_MOMENTS, len(run.grids) - self._lost(run))
            for run, own in zip(self._runs, chosen, strict=True)
        )

    def _lost(self, run: Run) -> int:
        return sum(path in self.damaged for path in run.grids.values())

    def _share_as_files(self, files: Sequence[dict[int | None, Path]]) -> float:
        size = sum(_bytes_of(path) for own in files for path in own.values()) * 4 / 3
        return 1 if size <= self._room else 0

    def _share(self, files: Sequence[dict[int | None, Path]], treatment: Treatment) -> float:
        """Guess, from a few samples of each run, what share of its pictures fits."""
        samples = [[*own.values()][:: max(len(own) // _SAMPLES, 1)] for own in files]
        pixels = sum(
            sum(_pixels(path, treatment.side) for path in some) * len(own) / max(len(some), 1)
            for own, some in zip(files, samples, strict=True)
        )
        at_least = pixels * max(self._bytes_per_pixel * _GAIN, _LEAST_BYTES_PER_PIXEL)
        if at_least * treatment.least / MAX_MOMENTS > self._room:
            return 0
        expected = 0.0
        for run, own, some in zip(self._runs, files, samples, strict=True):
            made = [picture for path in some if (picture := self._one(run, treatment, path))]
            expected += sum(picture.embedded_bytes for picture in made) * len(own) / max(len(made), 1)
        self._bytes_per_pixel = expected / max(pixels, 1)
        return min(self._room * _MARGIN / max(expected, 1), 1)

    def _trimmed(
        self, made: list[dict[int | None, Picture]], treatment: Treatment | None
    ) -> list[dict[int | None, Picture]] | None:
        """Leave out moments until all fit; None where too few are left."""
        while (size := sum(one.embedded_bytes for own in made for one in own.values())) > self._room:
            before = sum(map(len, made))
            for number, (own, best) in enumerate(zip(made, self._best, strict=True)):
                grids = {seen: picture for seen, picture in own.items() if seen is not None}
                fewer = _spread_over(grids, len(grids) * self._room / size * _MARGIN, best)
                made[number] = _with_real(own.get(None), fewer)
            if sum(map(len, made)) == before:
                return None
        return made if self._enough(made, treatment) else None

    def _one(self, run: Run, treatment: Treatment | None, path: Path) -> Picture | None:
        if path in self.damaged:
            return None
        cell = cells_of(run, size)[2] if treatment and (size := _size(path)) else 0
        picture = self._cache.get(path, treatment, cell)
        if picture is None:
            self.damaged.add(path)
        return picture


def spread(count: int, most: int, always: Iterable[int]) -> list[int]:
    """Choose at most `most` of `count` positions evenly: the first, the last and those of `always` are among them."""
    kept = {position for position in (0, count - 1, *always) if 0 <= position < count}
    free = min(most, count) - len(kept)
    others = [position for position in range(count) if position not in kept]
    if free > 0:
        kept |= {others[(2 * i + 1) * len(others) // (2 * free)] for i in range(free)}
    return sorted(kept)


def _with_real(real: T | None, grids: dict[int, T]) -> dict[int | None, T]:
    """Put what is of the real images before what is of grids."""
    both: dict[int | None, T] = {} if real is None else {None: real}
    both.update((seen, one) for seen, one in grids.items())
    return both


def _spread_over(moments: dict[int, T], most: float, best: Iterable[int]) -> dict[int, T]:
    """Choose moments evenly, with those nearest to the best ones."""
    times = list(moments)
    nearest = {min(range(len(times)), key=lambda i: abs(times[i] - seen)) for seen in best} if times else set()
    return {times[i]: moments[times[i]] for i in spread(len(times), int(most), nearest)}


def cells_of(run: Run, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return columns, rows and the pixels of a cell of a run's grid; 1, 1, 0 where that is not known."""
    res = run.config.get("res")
    if isinstance(res, int) and not isinstance(res, bool) and res > 0:
        columns, rows = grid_shape(res)
        if size[0] % columns == 0 and size[1] % rows == 0 and size[0] // columns == size[1] // rows:
            return columns, rows, size[0] // columns
    return 1, 1, 0


def _treated(path: Path, treatment: Treatment | None, cell: int) -> Picture:
    with _opened(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("no picture of a run is that large")
        image.load()  # finds damage
        if treatment is None:
            mime = Image.MIME.get(image.format or "", "image/png")
            return Picture(mime, path.read_bytes())
        shown = image.convert("RGB")
    if cell:
        columns, rows = _cells_shown(shown.size, cell, treatment.side)
        shown = shown.crop((0, 0, columns * cell, rows * cell))
    shown.thumbnail((treatment.side, treatment.side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    shown.save(content, "WEBP", quality=treatment.quality, method=2)
    return Picture("image/webp", content.getvalue())


def _opened(path: Path) -> Image.Image:
    """Open a picture of the kinds that runs write; Pillow would run programs for some others."""
    return Image.open(path, formats=("PNG", "GIF"))


def _cells_shown(size: tuple[int, int], cell: int, side: int) -> tuple[int, int]:
    """Return how many columns and rows of a grid stay so that no cell gets too small."""
    most = max(side // min(cell, MIN_CELL), 1)
    return min(size[0] // cell, most), min(size[1] // cell, most)


def _fill(album: Album, run: Run, pictures: dict[int | None, Picture], treatment: Treatment | None) -> None:
    album.real = pictures.pop(None, None)
    album.grids = {seen: picture for seen, picture in pictures.items() if seen is not None}
    sizes = {size for seen in album.grids if (size := _size(run.grids[seen]))}
    if len(album.grids) < len(run.grids):
        album.notes.append(f"{len(album.grids)} of {len(run.grids):,} grids, spread over the run")
    if not sizes:
        return
    width, height = max(sizes)
    columns, rows, cell = cells_of(run, (width, height))
    if treatment is None:
        return
    if cell and (shown := _cells_shown((width, height), cell, treatment.side)) != (columns, rows):
        album.notes.append(f"{shown[0]} × {shown[1]} of their {columns} × {rows} images")
        width, height = shown[0] * cell, shown[1] * cell
    if max(width, height) > treatment.side:
        scale = treatment.side / max(width, height)
        album.notes.append(f"{round(width * scale)} of {width:,} pixels wide")
    album.notes.append(f"as WebP of quality {treatment.quality}")


def _add_clips(runs: Sequence[Run], albums: Sequence[Album], room: int, cache: Cache) -> None:
    """Take each run's newest clip as it is, where it fits its share."""
    for run, album in zip(runs, albums, strict=True):
        if not run.clips:
            continue
        seen, path = max(run.clips.items())
        name = path.relative_to(run.path)
        if (size := _bytes_of(path)) * 4 / 3 > room / len(runs):
            album.notes.append(f"without the clip {name}, of {size / 2**20:.1f} MB")
        elif (picture := cache.get(path, None, 0)) is None:
            album.problems.append(f"{name}: is no whole picture")
        else:
            album.clip = (seen, picture)


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone since
        return 0


def _size(path: Path) -> tuple[int, int] | None:
    """Return the width and height that a picture's head tells, if it can be read."""
    try:
        with _opened(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _pixels(path: Path, side: int) -> float:
    width, height = _size(path) or (0, 0)
    scale = min(side / max(width, height, 1), 1)
    return width * height * scale**2
