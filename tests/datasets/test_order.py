"""The order of the data: a pure function of (seed, position)."""

from __future__ import annotations

import numpy as np
import pytest

from stylepipe.datasets import order
from stylepipe.datasets.order import flips, image_ids, rank_positions


def test_version_1_never_changes() -> None:
    # A run in progress depends on these numbers. If this fails, raise ORDER_VERSION and pin the new ones.
    assert order.ORDER_VERSION == 1
    assert image_ids(np.arange(20), 10, seed=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7, 5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert image_ids(np.array([25_000_003, 7, 25_000_000]), 70_000, seed=5).tolist() == [17293, 5733, 21562]
    assert flips(np.arange(16), seed=0).astype(int).tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1]


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
