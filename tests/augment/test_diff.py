"""DiffAugment: its three kinds as its paper defines them (Zhao et al. 2020, arXiv:2006.10738)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from augment_draws import ALWAYS, NEVER
from torch import Tensor

from stylepipe.augment.diff import DiffAugment

COLUMNS = ("color", "translation", "cutout", "brightness", "saturation", "contrast", "x", "y", "cut_x", "cut_y")


def augmented(img: Tensor, *happens: str, **values: float) -> Tensor:
    """Apply what happens, with values of the columns in [0, 1); 0.5 where none is given."""
    row = [0.0 if name in happens else 1.0 for name in COLUMNS[:3]] + [values.get(name, 0.5) for name in COLUMNS[3:]]
    return DiffAugment(img.shape[3])(img, ALWAYS, torch.tensor([row] * len(img)), torch.empty(len(img), 0))


def test_p_of_0_changes_no_bit() -> None:
    img = torch.randn(8, 3, 16, 16)
    result = DiffAugment(16)(img, NEVER, torch.rand(8, len(COLUMNS)), torch.empty(8, 0))
    torch.testing.assert_close(result, img, rtol=0, atol=0)


def test_the_draws_are_as_many_as_it_says() -> None:
    assert DiffAugment.num_uniform == len(COLUMNS)
    assert DiffAugment.num_normal == 0
    assert not DiffAugment.needs_noise


@pytest.mark.parametrize(("draw", "added"), [(0.0, -0.5), (0.5, 0), (0.75, 0.25)])
def test_brightness_is_added(draw: float, added: float) -> None:
    img = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(augmented(img, "color", brightness=draw), img + added, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0), (0.5, 1), (0.9, 1.8)])
def test_saturation_is_about_each_pixels_mean(draw: float, factor: float, channels: int) -> None:
    img = torch.randn(2, channels, 8, 8)
    mean = img.mean(dim=1, keepdim=True)
    expected = (img - mean) * factor + mean
    torch.testing.assert_close(augmented(img, "color", saturation=draw), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("draw", "factor"), [(0.0, 0.5), (0.5, 1), (0.9, 1.4)])
def test_contrast_is_about_the_images_mean(draw: float, factor: float) -> None:
    img = torch.randn(2, 3, 8, 8)
    mean = img.mean(dim=(1, 2, 3), keepdim=True)
    expected = (img - mean) * factor + mean
    torch.testing.assert_close(augmented(img, "color", contrast=draw), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("x", range(-2, 3))
@pytest.mark.parametrize("y", [-2, 0, 1])
def test_translation_moves_whole_pixels_and_zeros_in(x: int, y: int) -> None:
    img = torch.randn(2, 3, 16, 16)
    result = augmented(img, "translation", x=(x + 2.5) / 5, y=(y + 2.5) / 5)
    padded = F.pad(img, (2, 2, 2, 2))
    assert torch.equal(result, padded[:, :, 2 - y : 18 - y, 2 - x : 18 - x])


def test_translation_is_even_over_an_eighth_to_both_sides() -> None:
    n = 4000
    uniform = torch.rand(n, len(COLUMNS))
    uniform[:, [0, 2]] = 1
    place = torch.arange(1.0, 17).expand(n, 1, 16, 16)
    middle = DiffAugment(16)(place, ALWAYS, uniform, torch.empty(n, 0))[:, 0, 8, 8]
    shares = [float((middle == 9 - shift).double().mean()) for shift in range(-2, 3)]
    assert shares == pytest.approx([0.2] * 5, abs=0.03)


def test_cutout_clears_a_square_of_half_the_side() -> None:
    result = augmented(torch.ones(2, 3, 16, 16), "cutout", cut_x=0.5, cut_y=0.0)
    cut = torch.zeros(16, 16, dtype=torch.bool)
    cut[:4, 4:12] = True
    assert torch.equal(result == 0, cut.expand(2, 3, 16, 16))


def test_each_kind_happens_with_probability_p() -> None:
    n = 4000
    img = torch.ones(n, 1, 8, 8)
    result = DiffAugment(8)(img, torch.tensor(0.25), torch.rand(n, len(COLUMNS)), torch.empty(n, 0))
    changed = float((result != img).any(dim=(1, 2, 3)).double().mean())
    still = 0.25 / 9  # a translation by nothing, of 3 x 3
    assert changed == pytest.approx(1 - 0.75 * 0.75 * (0.75 + 9 * still / 9), abs=0.03)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_stays(memory_format: torch.memory_format) -> None:
    img, uniform = torch.randn(4, 3, 8, 8), torch.rand(4, len(COLUMNS))
    pipeline = DiffAugment(8)
    result = pipeline(img.contiguous(memory_format=memory_format), ALWAYS, uniform, torch.empty(4, 0))
    assert result.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(result, pipeline(img, ALWAYS, uniform, torch.empty(4, 0)), rtol=0, atol=1e-6)


def test_an_image_does_not_depend_on_its_companions() -> None:
    img, uniform = torch.randn(4, 3, 8, 8), torch.rand(4, len(COLUMNS))
    whole = DiffAugment(8)(img, ALWAYS, uniform, torch.empty(4, 0))
    alone = DiffAugment(8)(img[2:3], ALWAYS, uniform[2:3], torch.empty(1, 0))
    torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=1e-6)
