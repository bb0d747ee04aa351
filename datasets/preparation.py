"""How photographs become the images of a dataset: every option of `stylepipe prepare`, once."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stylepipe.config import MAX_RES, MAX_SEED, MIN_RES
from stylepipe.errors import UserError

ImageFormat = Literal["png", "jpeg", "keep"]
Crop = Literal["centre", "none", "align"]

MAX_SHARD_MB = 1 << 20


@dataclass(frozen=True)
class Preparation:
    """What is done to each photograph, and how the result is stored. The dataset is a function of it and the source."""

    res: int
    """Resolution in pixels, a power of two from 8 to 1024."""
    format: ImageFormat = "png"
    """png is lossless; jpeg (quality 95, 4:4:4) takes a quarter of the room and is read three times as fast; keep
    leaves the bytes of files that need no change, and stores others as JPEG where they were, else as PNG."""
    crop: Crop = "centre"
    """centre takes the central square; none takes square photographs only and skips others; align puts eyes and mouth
    of a face at one place, as FFHQ does, by --landmarks or --detector."""
    landmarks: str | None = None
    """With align: a file of where each face is, in pixels of the upright photograph. JSON: {"sub/0001.png": [[x, y],
    ...], ...}; CSV: rows of name,x1,y1,x2,y2,... 5 points (left eye, right eye, nose, left and right corner of the
    mouth) or 68; of several faces of a photograph the first is taken."""
    detector: str | None = None
    """With align: package.module:function that finds the faces. It is given [H, W, 3] uint8 and returns
    [n, 5 or 68, 2], the first of which is taken."""
    min_size: int | None = None
    """Skip photographs whose crop has fewer pixels a side; below --res, smaller ones are enlarged. Default: --res."""
    background: str = "#ffffff"
    """Colour that transparency is laid over, as #rrggbb."""
    labels: bool = False
    """Label the images: from dataset.json in SOURCE, {"labels": [["sub/0001.png", 3 or [0.1, -0.7]], ...]}; without
    that file, from the .cls or .json of each sample of WebDataset shards; else the class of an image is the top-level
    sub-folder it lies in."""
    levels: bool = False
    """Store the images also at every power of two from 4 px to half of --res, for presets that grow; with png
    half as much room again. Training makes them in the cache where they are missing."""
    shuffle_seed: int = 0
    """Seed of the one order in which all images are stored."""
    shard_mb: float = 256
    """Size of a shard in MiB."""
    dedupe: bool = False
    """Leave out copies of an image that is stored already: the same pixels, or recompressed, resized or a little
    brighter. The manifest names the original of each."""
    max_bad: int | None = None
    """Give up when more files than this cannot be read. Default: no limit."""

    @property
    def smallest(self) -> int:
        """Pixels a side that a photograph must have after the crop."""
        return self.res if self.min_size is None else self.min_size

    @property
    def shard_bytes(self) -> int:
        """Size at which the next shard is begun, in bytes."""
        return int(self.shard_mb * 2**20)

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The background's red, green and blue, from 0 to 255."""
        red, green, blue = bytes.fromhex(self.background[1:])
        return red, green, blue

    def check(self) -> None:
        """Refuse values that no preparation could use.

        Raises:
            UserError: names the option, the value found and what is accepted.
        """
        check_resolution(self.res)
        if self.crop == "align" and (self.landmarks is None) == (self.detector is None):
            raise UserError("--crop align: expected --landmarks FILE, or --detector package.module:function")
        if self.crop != "align" and (given := self.landmarks or self.detector) is not None:
            option = "--landmarks" if given == self.landmarks else "--detector"
            raise UserError(f"{option} {given}: --crop {self.crop} makes no use of it; add --crop align")
        if self.min_size is not None and self.min_size < 1:
            raise UserError(f"--min-size {self.min_size}: expected 1 or more")
        if not re.fullmatch("#[0-9a-fA-F]{6}", self.background):
            raise UserError(f"--background {self.background}: expected a colour such as #ffffff or #7f7f7f")
        if not (math.isfinite(self.shard_mb) and 0 < self.shard_mb <= MAX_SHARD_MB):
            raise UserError(f"--shard-mb {self.shard_mb:g}: expected a number above 0, up to {MAX_SHARD_MB}")
        if not 0 <= self.shuffle_seed < MAX_SEED:
            raise UserError(f"--shuffle-seed {self.shuffle_seed}: expected 0 or more, below 2^63")
        if self.max_bad is not None and self.max_bad < 0:
            raise UserError(f"--max-bad {self.max_bad}: expected 0 or more")

    def recorded(self) -> dict[str, Any]:
        """Return what the manifest keeps: all that decides the bytes but what it says elsewhere, and no path."""
        elsewhere = ("res", "format", "landmarks", "levels", "max_bad")
        return {name: value for name, value in asdict(self).items() if name not in elsewhere}


def check_resolution(resolution: int) -> None:
    """Raise UserError unless it is a power of two from 8 to 1024."""
    if not MIN_RES <= resolution <= MAX_RES or resolution & (resolution - 1):
        raise UserError(f"--res {resolution}: expected a power of two from {MIN_RES} to {MAX_RES}")
