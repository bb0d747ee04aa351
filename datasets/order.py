"""The order of the data: a pure function of (seed, position).

Position p counts the images drawn since the start of training, for ever. In epoch e = p // N the images
come in a random permutation that depends on (seed, e) only, and image p is mirrored or not by (seed, p).
So neither ranks nor workers nor a restart can change what image number p is, and resuming at any
position costs one permutation.

Only NumPy's raw Philox words are used, never `Generator.permutation`: NumPy guarantees the stream of its
bit generators for ever, but not that of its distributions (NEP 19), and a run may outlive a NumPy.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Any change that gives some (seed, position) another image or flip must raise this number: it is kept
# with a run, so that a run is never resumed with another order without a word.
ORDER_VERSION = 1

_WORD = 2**64
# The highest word of Philox's counter tells permutations of one (seed, epoch) apart.
_OF_IMAGES, _OF_SHARDS, _OF_WINDOW = range(3)

_one_at_a_time = threading.Lock()  # of ten million images a permutation takes seconds, and 200 MB meanwhile


class Order(Protocol):
    """Which image stands at each position.

    Attributes:
        seed: of the order, and of the mirroring.
    """

    @property
    def seed(self) -> int: ...

    def ids(self, positions: Int64Array) -> Int64Array:
        """Return which image of the dataset stands at each position.

        positions: [n] int64, >= 0, in any order; they may straddle epochs. Returns [n] int64.
        """
        ...

    def substitutes(self, positions: Int64Array, attempt: int) -> Int64Array:
        """Return which image stands in where that of a position cannot be read, [n] int64; another for each attempt."""
        ...


class GlobalOrder(NamedTuple):
    """Each epoch is a permutation of all images: for data that any image can be read of at any time."""

    num_images: int
    seed: int

    def ids(self, positions: Int64Array) -> Int64Array:
        """See `Order.ids`."""
        return image_ids(positions, self.num_images, self.seed)

    def substitutes(self, positions: Int64Array, attempt: int) -> Int64Array:
        """See `Order.substitutes`."""
        return (_choices(positions, attempt, self.seed) % np.uint64(self.num_images)).astype(np.int64)


class WindowOrder:
    """Each epoch is a permutation of the shards, cut into windows, and in each window a permutation of its images.

    For data of which only some shards are at hand at a time. Shards hold images that preparing has shuffled, so what
    a window of them holds is a random sample.

    Args:
        counts: images of each shard, 1 or more; shard s holds those that follow the images of shards 0..s - 1.
        window_shards: the most shards of a window; windows of an epoch differ by one shard at the most.
        seed: of the order, and of the mirroring.

    Attributes:
        num_windows: of an epoch.
    """

    def __init__(self, counts: Sequence[int], window_shards: int, seed: int) -> None:
        assert window_shards > 0
        self.seed = seed
        self.num_windows = -(-len(counts) // window_shards)
        self._firsts = np.array([0, *accumulate(counts)], dtype=np.int64)  # of each shard, and their end
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)  # a batch may straddle two
        self._window_ids = lru_cache(maxsize=2)(self._make_window_ids)

    def ids(self, positions: Int64Array) -> Int64Array:
        """See `Order.ids`."""
        windows, places = self._locate(positions)
        ids = np.empty_like(places)
        for window in np.unique(windows):
            inside = windows == window
            ids[inside] = self._window_ids(int(window))[places[inside]]
        return ids

    def substitutes(self, positions: Int64Array, attempt: int) -> Int64Array:
        """See `Order.substitutes`; they are of the same window, so their shards are at hand."""
        windows, _ = self._locate(positions)
        words = _choices(positions, attempt, self.seed)
        chosen = [self._window_ids(int(window)) for window in windows]
        return np.array([ids[int(word) % len(ids)] for ids, word in zip(chosen, words, strict=True)], dtype=np.int64)

    def window_at(self, position: int) -> int:
        """Return the number of the window that a position is in, counted from the start of training, for ever."""
        return int(self._locate(np.array([position]))[0][0])

    def ranges(self, window: int) -> list[range]:
        """Return the images of a window as a range of ids for each of its shards, in the order of the ids."""
        epoch, number = divmod(window, self.num_windows)
        shards, _ = self._epoch(epoch)
        return [range(self._firsts[s], self._firsts[s + 1]) for s in sorted(shards[self._cut(number)])]

    def _locate(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the window of each position and its place within, [n] int64 each."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self._firsts[-1])
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            _, starts = self._epoch(int(epoch))
            numbers = np.searchsorted(starts, places[inside], side="right") - 1
            places[inside] -= starts[numbers]
            windows[inside] = epoch * self.num_windows + numbers
        return windows, places

    def _cut(self, number: int) -> slice:
        """Return which of an epoch's shards, in their order, are in one of its windows."""
        num_shards = len(self._firsts) - 1
        return slice(num_shards * number // self.num_windows, num_shards * (number + 1) // self.num_windows)

    def _make_epoch(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """Return the order of an epoch's shards, and the places at which its windows start."""
        shards = np.argsort(_words(len(self._firsts) - 1, self.seed, epoch, _OF_SHARDS), kind="stable")
        sizes = np.diff(self._firsts)[shards]
        return shards, np.cumsum([0, *(sizes[self._cut(w)].sum() for w in range(self.num_windows - 1))])

    def _make_window_ids(self, window: int) -> Int64Array:
        ids = np.concatenate([np.arange(r.start, r.stop) for r in self.ranges(window)])
        epoch, number = divmod(window, self.num_windows)
        return ids[np.argsort(_words(len(ids), self.seed, epoch, _OF_WINDOW, number), kind="stable")]


def image_ids(positions: Int64Array, num_images: int, seed: int) -> Int64Array:
    """Return which of `num_images` stands at each position in a `GlobalOrder`, [n] int64."""
    assert num_images > 0
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_images)
    ids = np.empty_like(places)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        with _one_at_a_time:
            permutation = _permutation(num_images, int(epoch), seed)
        ids[inside] = permutation[places[inside]]
    return ids


def flips(positions: Int64Array, seed: int) -> BoolArray:
    """Return whether the image at each position is mirrored, [n] bool; each is a fair coin.

    The coin is the top bit of SplitMix64's finalizer (Steele et al. 2014, doi:10.1145/2660193.2660195)
    applied to the position, keyed by the finalized seed.
    """
    key = _finalize(np.array([seed % _WORD], dtype=np.uint64))
    return (_finalize(np.asarray(positions, dtype=np.int64).astype(np.uint64) ^ key) >> np.uint64(63)).astype(np.bool_)


def rank_positions(first: int, batch_size: int, rank: int, world_size: int) -> Int64Array:
    """Return the positions of one rank in the global batch that begins at position `first`.

    Rank r of W takes first + r, first + r + W, ...: [batch_size / W] int64.
    """
    assert 0 <= rank < world_size
    assert batch_size % world_size == 0
    return np.arange(first + rank, first + batch_size, world_size, dtype=np.int64)


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(num_images: int, epoch: int, seed: int) -> npt.NDArray[np.uint32]:
    """Return the permutation of one epoch: the ranks of random 64-bit words, ties in order of index."""
    order = np.argsort(_words(num_images, seed, epoch, _OF_IMAGES), kind="stable").astype(np.uint32)
    order.flags.writeable = False
    return order


def _words(count: int, seed: int, epoch: int, purpose: int, number: int = 0) -> npt.NDArray[np.uint64]:
    """Return random 64-bit words, [count] uint64."""
    key = np.array([seed % _WORD, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, number, purpose], dtype=np.uint64)).random_raw(count)


def _choices(positions: Int64Array, attempt: int, seed: int) -> npt.NDArray[np.uint64]:
    """Return a random word for each position, [n] uint64; others for each attempt."""
    key = _finalize(np.array([(seed + 1 + attempt) % _WORD], dtype=np.uint64))
    return _finalize(_finalize(np.asarray(positions, dtype=np.int64).astype(np.uint64)) ^ key)


def _finalize(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64-bit words (SplitMix64: golden-ratio increment, then two xor-shift-multiply rounds)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
