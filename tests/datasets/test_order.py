"""The order of the data: a pure function of (seed, position)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from stylepipe.datasets import order
from stylepipe.datasets.order import GlobalOrder, Order, WindowOrder, flips, image_ids, rank_positions


def test_version_1_never_changes() -> None:
    # A run in progress depends on these numbers. If this fails, raise ORDER_VERSION and pin the new ones.
    assert order.ORDER_VERSION == 1
    assert image_ids(np.arange(20), 10, seed=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7, 5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert image_ids(np.array([25_000_003, 7, 25_000_000]), 70_000, seed=5).tolist() == [17293, 5733, 21562]
    assert flips(np.arange(16), seed=0).astype(int).tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1]


def test_version_1_of_windows_never_changes() -> None:
    images = WindowOrder([3, 2, 4, 1, 3], 2, seed=0)
    assert images.ids(np.arange(26)).tolist() == [
        *(11, 10, 12, 0, 5, 6, 2, 1, 8, 7, 3, 9, 4),
        *(2, 0, 1, 10, 4, 12, 3, 11, 8, 9, 7, 5, 6),
    ]  # fmt: skip
    far = WindowOrder([1000] * 70, 16, seed=5)
    assert far.ids(np.array([25_000_003, 7, 25_000_000])).tolist() == [32456, 6089, 56343]


COUNTS = ([5], [1, 1, 1], [3, 2, 4, 1, 3], [7] * 10, [1, 100, 2, 50])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("window_shards", [1, 2, 3, 100])
def test_windows_show_each_image_once_an_epoch(counts: list[int], window_shards: int) -> None:
    total = sum(counts)
    images = WindowOrder(counts, window_shards, seed=1)
    ids = images.ids(np.arange(3 * total)).reshape(3, total)
    assert (np.sort(ids) == np.arange(total)).all()
    # In whatever order they are asked for.
    shuffled = np.random.default_rng(0).permutation(3 * total)
    assert (WindowOrder(counts, window_shards, seed=1).ids(shuffled) == ids.ravel()[shuffled]).all()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("window_shards", [1, 2, 3])
def test_a_window_holds_no_more_than_its_shards(counts: list[int], window_shards: int) -> None:
    total = sum(counts)
    shard_of = np.repeat(np.arange(len(counts)), counts)
    images = WindowOrder(counts, window_shards, seed=1)
    positions = np.arange(2 * total)
    windows = np.array([images.window_at(int(position)) for position in positions])
    assert (np.diff(windows) >= 0).all()
    assert windows[-1] == 2 * images.num_windows - 1
    for window in range(2 * images.num_windows):
        ids = images.ids(positions[windows == window])
        ranges = images.ranges(window)
        assert 1 <= len(ranges) <= window_shards
        assert sorted(ids) == [number for r in ranges for number in r], "each image of the window once"
        assert len(set(shard_of[ids])) == len(ranges)
        for attempt in range(3):
            assert set(images.substitutes(positions[windows == window], attempt)) <= set(ids), "they are at hand"


def test_windows_and_their_images_come_in_another_order_each_epoch() -> None:
    images = WindowOrder([100] * 40, 4, seed=1)
    first, second = ([images.ranges(w)[0] for w in range(a, a + images.num_windows)] for a in (0, images.num_windows))
    assert first != second
    ids = images.ids(np.arange(8000)).reshape(2, 4000)
    assert (ids[0] == ids[1]).sum() < 12  # one on average
    assert (ids[0] == WindowOrder([100] * 40, 4, seed=2).ids(np.arange(4000))).sum() < 12
    inside = ids[0, :400]
    assert abs(np.corrcoef(np.arange(400), inside)[0, 1]) < 0.25  # five standard deviations


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("make", [lambda: GlobalOrder(70, 3), lambda: WindowOrder([13, 20, 30, 7], 2, 3)])
def test_ranks_cover_epochs_exactly_and_resume_on_any_number(world_size: int, make: Callable[[], Order]) -> None:
    """24 images a step: the third step straddles two epochs; then the run goes on with other ranks."""

    def steps(first: int, count: int, ranks: int) -> list[int]:
        seen = []
        for step in range(count):
            shares = [make().ids(rank_positions(first + 24 * step, 24, rank, ranks)) for rank in range(ranks)]
            seen += np.stack(shares, axis=1).ravel().tolist()
        return seen

    straight = steps(0, 35, 1)
    assert np.bincount(straight, minlength=70).tolist() == [12] * 70, "12 epochs"
    for other in (1, 2, 3, 8):
        assert steps(0, 20, world_size) + steps(480, 15, other) == straight


@pytest.mark.parametrize("num_images", [1, 2, 7, 1000])
def test_every_epoch_shows_each_image_once(num_images: int) -> None:
    ids = image_ids(np.arange(3 * num_images), num_images, seed=1).reshape(3, num_images)
    assert (np.sort(ids) == np.arange(num_images)).all()


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    ids = image_ids(np.arange(2000), 1000, seed=1).reshape(2, 1000)
    other = image_ids(np.arange(1000), 1000, seed=2)
    # Two independent permutations agree in one place on average; more than 10 has a chance below 1e-8.
    assert (ids[0] == ids[1]).sum() < 10
    assert (ids[0] == other).sum() < 10
    assert (ids[0] == np.arange(1000)).sum() < 10


def test_any_cut_of_the_positions_gives_the_same_images() -> None:
    whole = image_ids(np.arange(100), 7, seed=3)
    for cut in (1, 6, 7, 50):
        parts = [image_ids(np.arange(100)[a : a + cut], 7, seed=3) for a in range(0, 100, cut)]
        assert (np.concatenate(parts) == whole).all()
    shuffled = np.random.default_rng(0).permutation(100)
    assert (image_ids(shuffled, 7, seed=3) == whole[shuffled]).all()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_a_batch_without_gap_or_overlap(world_size: int) -> None:
    shares = [rank_positions(1000, 16, rank, world_size) for rank in range(world_size)]
    assert (np.stack(shares, axis=1).ravel() == np.arange(1000, 1016)).all()


def test_flips_are_fair_coins_of_the_position_alone() -> None:
    coins = flips(np.arange(100_000), seed=0)
    # The standard deviation of the mean of n coins is 0.5 / sqrt(n): five of them.
    assert abs(coins.mean() - 0.5) < 5 * 0.5 / np.sqrt(100_000)
    assert abs((coins[1:] == coins[:-1]).mean() - 0.5) < 5 * 0.5 / np.sqrt(100_000)
    assert abs((coins == flips(np.arange(100_000), seed=1)).mean() - 0.5) < 5 * 0.5 / np.sqrt(100_000)
    assert (flips(np.array([5, 99_999, 0]), seed=0) == coins[[5, 99_999, 0]]).all()


def test_an_image_is_mirrored_in_some_epochs_and_not_in_others() -> None:
    epochs = flips(np.arange(64) * 1000 + 3, seed=0)
    assert 10 < epochs.sum() < 54


def test_negative_and_huge_seeds_are_seeds() -> None:
    for seed in (-1, 2**64 - 2, 2**80):
        assert sorted(image_ids(np.arange(10), 10, seed)) == list(range(10))
        assert flips(np.arange(10), seed).shape == (10,)
