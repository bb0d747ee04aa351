"""Sliced Wasserstein distance: against a float64 calculation from the paper, known distances, and what it must see."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from stylepipe.metrics.extraction import Team, Wanted, collect
from stylepipe.metrics.swd import (
    PATCH,
    PATCHES,
    PatchExtraction,
    directions,
    laplacian_pyramid,
    levels_of,
    patch_distances,
    sliced_wasserstein,
)

KERNEL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def photographs(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Make images with structures of all scales, [N, R, R, 3] uint8."""
    generator = np.random.default_rng(seed)
    img = np.zeros((count, side, side, 3))
    for scale in (1, 2, 4, 8, 16):
        noise = generator.normal(size=(count, side // scale, side // scale, 3)) * scale * 6
        img += noise.repeat(scale, axis=1).repeat(scale, axis=2)
    return torch.from_numpy((img + 128).clip(0, 255).astype(np.uint8))


def patches_of(images: torch.Tensor, seed: int = 0, real: bool = True) -> dict[str, torch.Tensor]:
    extractor = PatchExtraction().extractor(images.shape[1], seed, real, torch.device("cpu"))
    return extractor(images, range(len(images)))


def reference_pyramid(image: np.ndarray, levels: int) -> list[np.ndarray]:
    """Build a pyramid of one channel with SciPy's convolution, in float64."""
    pyramid = [image]
    for _ in range(levels - 1):
        smaller = scipy.ndimage.convolve(pyramid[-1], KERNEL, mode="mirror")[::2, ::2]
        spread = np.zeros_like(pyramid[-1])
        spread[::2, ::2] = smaller
        pyramid[-1] = pyramid[-1] - scipy.ndimage.convolve(spread, KERNEL * 4, mode="mirror")
        pyramid.append(smaller)
    return pyramid


def reference_swd(real: np.ndarray, fake: np.ndarray, on: np.ndarray) -> float:
    """Calculate the distance of patches [n, 147] in float64, one direction after the other, from the paper's words."""
    normalized = []
    for patches in (real, fake):
        colours = patches.reshape(-1, 3, PATCH * PATCH).astype(np.float64)
        colours -= colours.mean(axis=(0, 2), keepdims=True)
        normalized.append((colours / colours.std(axis=(0, 2), keepdims=True)).reshape(len(patches), -1))
    distances = [np.abs(np.sort(normalized[0] @ a) - np.sort(normalized[1] @ a)).mean() for a in on.astype(np.float64)]
    return float(np.mean(distances)) * 1000


@pytest.mark.parametrize(
    ("resolution", "levels"), [(8, [8]), (16, [16]), (64, [64, 32, 16]), (1024, [1024, 512, 256, 128, 64, 32, 16])]
)
def test_levels_go_down_to_16_px(resolution, levels):
    assert levels_of(resolution) == levels


@pytest.mark.parametrize("side", [16, 64])
def test_the_pyramid_is_that_of_scipys_convolution(side):
    images = photographs(2, side)
    found = laplacian_pyramid(images.permute(0, 3, 1, 2).float())
    assert [level.shape[2] for level in found] == levels_of(side)
    for n in range(2):
        for channel in range(3):
            expected = reference_pyramid(images[n, :, :, channel].numpy().astype(np.float64), len(found))
            for level, theirs in zip(found, expected, strict=True):
                # float32 in [-255, 255]
                np.testing.assert_allclose(level[n, channel].numpy(), theirs, atol=2e-4)


def test_patches_are_those_of_the_pyramid_at_places_within_it():
    images = photographs(3, 32)
    found = patches_of(images)
    for level in laplacian_pyramid(images.permute(0, 3, 1, 2).float()):
        side = level.shape[2]
        rows = found[str(side)].view(3, PATCHES, 3, PATCH, PATCH)
        places = set()
        for n in range(3):
            windows = level[n].unfold(1, PATCH, 1).unfold(2, PATCH, 1)
            for patch in rows[n]:
                same = (windows == patch[:, None, None]).all(dim=(0, 3, 4)).nonzero()
                assert len(same) >= 1, "no such patch in its own image"
                places.add(tuple(same[0].tolist()))
        assert len(places) > 60
        assert max(max(place) for place in places) == side - PATCH, "the last places are drawn too"
        assert min(min(place) for place in places) == 0


def test_places_depend_on_the_image_number_and_not_on_the_company():
    images = photographs(6, 16)
    whole = patches_of(images)["16"]
    extractor = PatchExtraction().extractor(16, 0, True, torch.device("cpu"))
    part = extractor(images[4:], [4, 5])["16"]
    assert torch.equal(whole[4:], part)
    assert not torch.equal(whole, patches_of(images, real=False)["16"])
    assert not torch.equal(whole, patches_of(images, seed=1)["16"])


def test_the_distance_is_that_of_a_float64_calculation():
    real, fake = patches_of(photographs(20, 64)), patches_of(photographs(20, 64, seed=1) // 2, real=False)
    found = patch_distances(real, fake, seed=3)
    on = directions(3).numpy()
    for level in ("64", "32", "16"):
        theirs = reference_swd(*(rows[level].view(-1, 147).numpy() for rows in (real, fake)), on)
        assert found[f"swd_{level}"] == pytest.approx(theirs, rel=1e-6)
    assert found["swd"] == pytest.approx(np.mean([found[f"swd_{level}"] for level in (64, 32, 16)]))
    assert next(iter(found)) == "swd"


def test_a_shifted_cloud_is_as_far_as_the_shift_reaches_along_each_direction():
    cloud = torch.randn(1000, 147)
    shift = torch.randn(147)
    on = directions(0)
    found = sliced_wasserstein(cloud, cloud + shift, on)
    torch.testing.assert_close(found, (on @ shift).abs().double(), rtol=1e-4, atol=1e-6)


def test_gaussians_of_other_width_are_as_far_as_theory_says():
    # W1 of N(0, 1) and N(0, s^2) is |s - 1| E|z| = |s - 1| sqrt(2 / pi); of 200,000 samples to 1 %.
    cloud = torch.randn(200_000, 2)
    found = sliced_wasserstein(cloud, 1.5 * torch.randn(200_000, 2), directions(0, size=2, count=8))
    torch.testing.assert_close(
        found, torch.full((8,), 0.5 * (2 / torch.pi) ** 0.5, dtype=torch.float64), rtol=0.01, atol=0
    )


def test_directions_are_uniform_on_the_sphere():
    on = directions(0, size=3, count=20_000)
    torch.testing.assert_close(on.norm(dim=1), torch.ones(20_000))
    torch.testing.assert_close(on.T @ on / 20_000, torch.eye(3) / 3, atol=0.01, rtol=0)


def test_it_does_not_see_the_order_of_images():
    real, fake = patches_of(photographs(8, 16)), patches_of(photographs(8, 16, seed=1), real=False)
    turned = {"16": fake["16"].flip(0)}
    assert patch_distances(real, fake, 0) == pytest.approx(patch_distances(real, turned, 0), rel=1e-6)


def test_blur_shows_at_the_highest_level_and_other_layout_at_the_lowest():
    images = photographs(64, 64)
    real = patches_of(images)
    itself = patch_distances(real, patches_of(images, real=False), 0)
    blurred = torch.from_numpy(scipy.ndimage.uniform_filter(images.numpy(), (0, 3, 3, 0)))
    soft = patch_distances(real, patches_of(blurred, real=False), 0)
    assert soft["swd_64"] > 2 * itself["swd_64"]
    assert soft["swd_16"] < 1.2 * itself["swd_16"]
    stripes = torch.arange(64)[:, None, None] // 16 % 2 * 120 - 60
    layout = patch_distances(real, patches_of((images + stripes).clamp(0, 255).to(torch.uint8), real=False), 0)
    assert layout["swd_16"] > 3 * itself["swd_16"]
    assert layout["swd_64"] < layout["swd_16"] / 2


def test_one_colour_everywhere_is_a_number():
    flat = torch.full((4, 16, 16, 3), 7, dtype=torch.uint8)
    found = patch_distances(patches_of(photographs(4, 16)), patches_of(flat, real=False), 0)
    assert 100 < found["swd"] < 1000


def test_a_pass_in_parts_is_a_pass_at_once():
    images = photographs(11, 16)
    wanted = {"patches": Wanted(PatchExtraction().extractor(16, 0, True, torch.device("cpu")), 9)}
    rows = collect(lambda n: images[list(n)], wanted, batch=4, team=Team(), device=torch.device("cpu"))["patches"]
    assert torch.equal(rows["16"], patches_of(images)["16"][:9])
