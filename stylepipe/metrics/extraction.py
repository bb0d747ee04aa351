"""From images to rows of numbers, shared by processes: what metrics are computed from.

Images pass once, some at a time, however many metrics look at them; only what an extractor takes of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

ImageSource = Callable[[Sequence[int]], Tensor]
"""Gives the images of these numbers, [n, R, R, 3] uint8 on the device."""

_PAIR = 2  # images 2k and 2k + 1 are looked at together, by one process

Rows = Mapping[str, Tensor]
"""Tensors [N, k] by name, one row for each image, in the order of their numbers."""


class Extractor(Protocol):
    """Takes from images what a metric is computed from."""

    def __call__(self, images: Tensor, numbers: Sequence[int]) -> Mapping[str, Tensor]:
        """Return rows [n, k] float32 by name, of [n, R, R, 3] uint8 with these numbers in their set."""
        ...


class Counts(NamedTuple):
    """How many images are looked at, real and generated ones."""

    real: int
    fake: int


class Extraction(Protocol):
    """What some metrics look at of images; those of one name share it.

    Attributes:
        name: tells it from others.
        lowest: resolution of the smallest images that it can look at.
        seeded: what it takes of an image depends on the seed.
        paths: it looks at both ends of short ways through latent space instead, [n, 2, 3, R, R] float32 in [0, 255].
    """

    name: str
    lowest: int
    seeded: bool
    paths: bool

    @property
    def facts(self) -> Mapping[str, Any]:
        """What moves its rows, besides images and seed."""
        ...

    def counts(self, available: int, asked: int | None) -> Counts:
        """Return how many images it takes.

        Args:
            available: real images that there are.
            asked: generated ones that the user wants, or None.
        """
        ...

    def extractor(self, resolution: int, seed: int, real: bool, device: torch.device) -> Extractor:
        """Make one for images of a resolution, at least `lowest`, real or generated ones."""
        ...


FEATURES_OF = 50_000  # generated images, as published
MOST_REAL = 200_000  # real ones: 1.6 GB of 2,048 features each


def counts_of_features(available: int, asked: int | None) -> Counts:
    """Return how many images features are taken of: all real ones, up to a limit."""
    return Counts(min(available, MOST_REAL), FEATURES_OF if asked is None else asked)


class Team(NamedTuple):
    """The processes that measure together, and which of them this is."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> list[int]:
        """Return which of the numbers 0 ... count - 1 this process takes; pairs are dealt out in turn."""
        return [n for n in range(count) if n // _PAIR % self.size == self.rank]

    def gathered(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows of all numbers 0 ... count - 1, in order, from each process's of its share."""
        if self.size == 1:
            return rows
        most = len(Team(0, self.size).share(count))
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        everywhere = rows.new_empty(self.size * most, *rows.shape[1:])
        dist.all_gather(list(everywhere.chunk(self.size)), padded)
        numbers = torch.arange(count, device=rows.device)
        turns, pairs = numbers // _PAIR // self.size, numbers // _PAIR % self.size
        return everywhere[pairs * most + turns * _PAIR + numbers % _PAIR]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all processes' tensors."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all(self, holds: bool, device: torch.device) -> bool:
        """Tell whether something holds on all processes."""
        return int(self.sum(torch.tensor(int(holds), device=device))) == self.size


ALONE = Team()


@dataclass(frozen=True)
class Wanted:
    """An extractor, and how many images it looks at: those numbered 0 ... count - 1."""

    extractor: Extractor
    count: int


class SharedRows(Mapping[str, Tensor]):
    """Rows of which each process keeps those of its own share, on the host; asking for some gathers them.

    All processes have to ask for the same ones in the same order.
    """

    def __init__(self, own: Mapping[str, Tensor], count: int, team: Team, device: torch.device) -> None:
        self.own, self.count = own, count
        self._team, self._device = team, device

    def __getitem__(self, name: str) -> Tensor:
        return self._team.gathered(self.own[name].to(self._device), self.count)

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


def collect(
    source: ImageSource,
    wanted: Mapping[str, Wanted],
    *,
    batch: int,
    team: Team,
    device: torch.device,
    progress: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
) -> dict[str, SharedRows]:
    """Show the images of a source to all extractors, as many as each wants.

    Args:
        source: of the images.
        wanted: extractors by name.
        batch: images at a time, even.
        team: the processes that share the work.
        device: where the images come to.
        progress: wraps the batches of this process, lists of numbers.
    """
    assert batch % _PAIR == 0
    numbers = team.share(max(w.count for w in wanted.values()))
    own: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}
    first = 0  # place of the batch in the share
    for part in progress([numbers[start : start + batch] for start in range(0, len(numbers), batch)]):
        images = source(part)
        for name, w in wanted.items():
            inside = [n for n in part if n < w.count]
            if not inside:
                continue
            for key, rows in w.extractor(images[: len(inside)], inside).items():
                if key not in own[name]:
                    own[name][key] = torch.empty(len(team.share(w.count)), *rows.shape[1:], dtype=rows.dtype)
                own[name][key][first : first + len(inside)] = rows
        first += len(part)
    return {name: SharedRows(own[name], w.count, team, device) for name, w in wanted.items()}
