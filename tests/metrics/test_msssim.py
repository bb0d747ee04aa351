"""Multi-scale structural similarity: against a library, and what is asked of a measure of diversity."""

from __future__ import annotations

import pytest
import torch
from pytorch_msssim import ms_ssim as of_library

from stylepipe.metrics.msssim import PairSimilarities, mean_similarities, ms_ssim


def pairs(side: int, noise: float, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.nn.functional.interpolate(torch.rand(count, 3, side // 8, side // 8), side, mode="bicubic") * 255
    return a.clamp(0, 255), (a + noise * torch.randn_like(a)).clamp(0, 255)


@pytest.mark.parametrize("side", [176, 256])
@pytest.mark.parametrize("noise", [1, 20, 100])
def test_from_161_px_on_it_is_that_of_the_library(side, noise):
    a, b = pairs(side, noise)
    theirs = of_library(a, b, data_range=255, size_average=False)
    torch.testing.assert_close(ms_ssim(a, b), theirs, rtol=0, atol=1e-4)  # both in float32


def test_unlike_images_come_to_0_as_in_the_library():
    a, _ = pairs(256, 0)
    torch.testing.assert_close(ms_ssim(a, 255 - a), of_library(a, 255 - a, data_range=255, size_average=False))
    assert (ms_ssim(a, 255 - a) < 0.01).all()


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_below_it_is_still_1_for_equal_images_and_falls_with_noise(side):
    found = [float(ms_ssim(*pairs(side, noise)).mean()) for noise in (0, 5, 30, 120)]
    assert found[0] == pytest.approx(1, abs=1e-4)
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.8


def test_the_smaller_window_is_the_gaussian_of_that_size():
    # At 16 px the last scale is one pixel: window 1, where only luminance is left: (2ab + C1) / (a^2 + b^2 + C1).
    a, b = torch.full((1, 3, 16, 16), 100.0), torch.full((1, 3, 16, 16), 50.0)
    c1 = (0.01 * 255) ** 2
    expected = ((2 * 100 * 50 + c1) / (100**2 + 50**2 + c1)) ** 0.1333
    torch.testing.assert_close(ms_ssim(a, b), torch.tensor([expected], dtype=torch.float32))


def test_pairs_are_images_2k_and_2k_plus_1_and_a_collapsed_set_scores_1():
    extractor = PairSimilarities().extractor(64, 0, False, torch.device("cpu"))
    images = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8)
    images[1] = images[0]
    similarity = extractor(images, range(6))["similarity"]
    assert similarity.shape == (6, 1)
    torch.testing.assert_close(similarity[:2], torch.ones(2, 1))
    assert (similarity[2:] < 0.1).all()
    alike = {"similarity": extractor(images[:1].expand(6, -1, -1, -1), range(6))["similarity"]}
    found = mean_similarities({"similarity": similarity}, alike)
    assert found["msssim"] == pytest.approx(1)
    assert found["msssim_real"] == pytest.approx(float(similarity.mean()))


def test_counts_are_even():
    assert PairSimilarities().counts(945, None) == (944, 40_000)
    assert PairSimilarities().counts(945, 101) == (100, 100)
