"""The order of the data: a pure function of (seed, position).

Position p counts the images drawn since the start of training, for ever. In epoch e = p // N the images
come in a random permutation that depends on (seed, e) only, and image p is mirrored or not by (seed, p).
So neither ranks nor workers nor a restart can change what image number p is, and resuming at any
position costs one permutation.

Only NumPy's raw Philox words are used, never `Generator.permutation`: NumPy guarantees the stream of its
bit generators for ever, but not that of its distributions (NEP 19), and a run may outlive a NumPy.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Any change that gives some (seed, position) another image or flip must raise this number: it is kept
# with a run, so that a run is never resumed with another order without a word.
ORDER_VERSION = 1

_WORD = 2**64


def image_ids(positions: Int64Array, num_images: int, seed: int) -> Int64Array:
    """Return which image of the dataset stands at each position.

    positions: [n] int64, >= 0, in any order; they may straddle epochs. Returns [n] int64 in [0, num_images).
    """
    assert num_images > 0
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_images)
    ids = np.empty_like(places)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        ids[inside] = _permutation(num_images, int(epoch), seed)[places[inside]]
    return ids


def substitutes(positions: Int64Array, attempt: int, num_images: int, seed: int) -> Int64Array:
    """Return which image stands in where that of a position cannot be read, [n] int64; another for each attempt."""
    key = _finalize(np.array([(seed + 1 + attempt) % _WORD], dtype=np.uint64))
    words = _finalize(_finalize(np.asarray(positions, dtype=np.int64).astype(np.uint64)) ^ key)
    return (words % np.uint64(num_images)).astype(np.int64)


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
    words = np.random.Philox(key=np.array([seed % _WORD, epoch], dtype=np.uint64)).random_raw(num_images)
    order = np.argsort(words, kind="stable").astype(np.uint32)
    order.flags.writeable = False
    return order


def _finalize(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64-bit words (SplitMix64: golden-ratio increment, then two xor-shift-multiply rounds)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
