"""Alarms: when they begin, when they end, and what they say."""

from __future__ import annotations

import pytest
import torch

from stylepipe.metrics.diversity import diversity, thumbnails
from stylepipe.training.alarms import COLLAPSED, DIVERSE, PATIENCE_KIMG, Alarms, divergence_in


def tick(kimg: float, share: float | None = None, **more: float) -> dict[str, float]:
    measured = {} if share is None else {"Diversity/pairwise": share, "Diversity/nearest": share}
    return {"Progress/kimg": kimg, **measured, **more}


def raised(alarms: Alarms, shares: list[float]) -> list[int]:
    """Return at which of the ticks, one per kimg, mode collapse was raised."""
    return [index for index, share in enumerate(shares) if "mode_collapse" in alarms.look(tick(index, share))]


def test_collapse_is_raised_once_when_it_begins_and_again_after_it_was_over() -> None:
    shares = [0.9, 0.5, 0.1, 0.05, 0.2, 0.1, 0.9, 0.1]
    assert raised(Alarms(), shares) == [2, 7]


def test_a_generator_that_has_not_begun_yet_is_no_collapse() -> None:
    """DCGAN's first images are all alike: shares measured on faces."""
    assert raised(Alarms(), [0.01, 0.05, 0.24, 0.43, 0.48, 0.74, 0.88]) == []


def test_a_generator_that_never_begins_is() -> None:
    kimg = PATIENCE_KIMG
    assert raised(Alarms(), [0.05] * (kimg + 3)) == [kimg + 1]


def test_between_the_marks_nothing_begins_or_ends() -> None:
    between = (DIVERSE + COLLAPSED) / 2
    assert raised(Alarms(), [0.9, between, between]) == []
    assert raised(Alarms(), [0.9, 0.01, between, 0.01]) == [1]


def test_alike_images_far_from_all_others_are_a_collapse_too() -> None:
    """Few images, each many times, which lie far apart: their mean distance says nothing."""
    stats = {"Progress/kimg": 2.0, "Diversity/pairwise": 0.9, "Diversity/nearest": 0.01}
    alarms = Alarms({"diverse": True})
    assert "0.01" in alarms.look(stats)["mode_collapse"]


def test_ticks_without_a_measure_change_nothing() -> None:
    alarms = Alarms({"diverse": True, "collapsed": True})
    assert alarms.look(tick(1)) == {}
    assert alarms.state == {"diverse": True, "collapsed": True, "skipping": False}


def test_alarms_go_on_from_their_state() -> None:
    shares = [0.9, 0.5, 0.1, 0.05, 0.9, 0.1]
    for cut in range(len(shares) + 1):
        first = Alarms()
        before = raised(first, shares[:cut])
        after = [cut + index for index in raised(Alarms(first.state), shares[cut:])]
        assert before + after == [2, 5]


def test_skipped_updates_are_told_when_they_begin() -> None:
    alarms = Alarms()
    bad = {"Gradient/G/main/not_finite": 0.25, "Gradient/D/main/not_finite": 0.0}
    text = alarms.look(tick(1, **bad))["not_finite"]
    assert text.startswith("updates with inf or NaN gradients were skipped: 25.0% of G/main since the last log line;")
    assert alarms.look(tick(2, **bad)) == {}
    assert alarms.look(tick(3)) == {}
    assert "not_finite" in alarms.look(tick(4, **bad))


def test_a_lazy_phase_that_fails_is_told_once_though_it_does_not_run_in_every_tick() -> None:
    alarms = Alarms()
    failed = {"Gradient/D/r1/not_finite": 1.0, "Gradient/D/r1/skipped_in_a_row": 1.0}
    assert "not_finite" in alarms.look(tick(1, **failed))
    assert alarms.look(tick(2, **{"Gradient/D/r1/skipped_in_a_row": 1.0})) == {}
    assert alarms.look(tick(3, **failed | {"Gradient/D/r1/skipped_in_a_row": 2.0})) == {}
    assert alarms.look(tick(4, **{"Gradient/D/r1/not_finite": 0.0, "Gradient/D/r1/skipped_in_a_row": 0.0})) == {}
    assert "not_finite" in alarms.look(tick(5, **failed))


def test_noise_is_no_diversity_that_could_be_lost() -> None:
    """StyleGAN2's first images are more diverse than any data."""
    assert raised(Alarms(), [1.9, 1.5, 0.2, 0.2, 0.5, 0.9]) == []
    assert raised(Alarms(), [1.9, 1.1, 0.2]) == [2]


def test_a_divergence_is_so_many_skipped_updates_of_one_phase_in_a_row() -> None:
    stats = {"Gradient/G/main/skipped_in_a_row": 19.0, "Gradient/D/r1/skipped_in_a_row": 3.0}
    assert divergence_in(stats, 20) == ""
    assert "the last 19 updates of G/main" in divergence_in(stats, 19)
    assert "D/r1" in divergence_in({"Gradient/D/r1/skipped_in_a_row": 3.0}, 3)


def test_diversity_is_the_distance_of_images() -> None:
    black, white = torch.full((1, 3, 4, 4), -1.0), torch.full((1, 3, 4, 4), 1.0)
    assert diversity(torch.cat([black, white])) == pytest.approx((2.0, 2.0))
    # Two modes, each twice: pairs are 2 apart or equal, and every image has an equal one.
    assert diversity(torch.cat([black, white, black, white])) == pytest.approx((2 * 8 / 12, 0.0))
    assert diversity(black.repeat(5, 1, 1, 1)) == (0.0, 0.0)


def test_diversity_of_noise_is_its_deviation() -> None:
    """The root mean square of a difference of two standard normals is sqrt(2), to about 1 / sqrt(2 * 3072)."""
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert diversity(noise).pairwise == pytest.approx(2**0.5, rel=0.01)


def test_thumbnails_are_box_averages_and_small_images_stay() -> None:
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    expected = (
        images.double().unflatten(2, (32, 2)).unflatten(1, (32, 2)).mean(dim=(2, 4)).permute(0, 3, 1, 2) / 127.5 - 1
    )
    torch.testing.assert_close(thumbnails(images).double(), expected, rtol=0, atol=1e-6)
    small = torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    assert torch.equal(thumbnails(small), torch.ones(1, 3, 8, 8))
