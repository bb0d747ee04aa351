"""The whole pipeline: what p = 0 leaves, which draws belong to what, sizes, formats, single augmentations."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from augment_draws import ALWAYS, NEVER, chosen, random, smooth_images
from torch import Tensor

from stylepipe.augment.ada import AdaPipeline
from stylepipe.augment.columns import CHANCES, NORMALS, UNIFORMS
from stylepipe.augment.pipelines import NAMES, PIPELINES, Strengths
from stylepipe.errors import UserError

ALL = PIPELINES["bgcfnc"]
ONLY = {name: Strengths(**{name: 1.0}) for name in NAMES}


def augmented(strengths: Strengths, img: Tensor, happens: tuple[str, ...], **values: float) -> Tensor:
    pipeline = AdaPipeline(strengths, img.shape[3], img.shape[1])
    noise = torch.randn_like(img) if pipeline.needs_noise else None
    return pipeline(img, ALWAYS, *chosen(len(img), happens, **values), noise)


# --- p = 0, and what belongs to whom ---


@pytest.mark.parametrize("name", [*NAMES, "all"])
@pytest.mark.parametrize("channels", [1, 3])
def test_p_of_0_changes_no_bit(name: str, channels: int) -> None:
    pipeline = AdaPipeline(ONLY.get(name, ALL), 16, channels)
    img, (uniform, normal) = torch.randn(8, channels, 16, 16), random(pipeline, 8)
    uniform[0, : len(CHANCES)] = 0  # the least that can be drawn
    torch.testing.assert_close(pipeline(img, NEVER, uniform, normal, torch.randn_like(img)), img, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_each_augmentation_alone_changes_images(name: str) -> None:
    pipeline, img = AdaPipeline(ONLY[name], 16), torch.randn(8, 3, 16, 16)
    result = pipeline(img, ALWAYS, *random(pipeline, 8), torch.randn_like(img))
    changed = (result - img).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert changed.sum() >= 2  # a flip is drawn as none half of the time, a rotation a quarter
    assert result.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_an_augmentations_draws_do_not_depend_on_what_else_is_on(name: str) -> None:
    """With all but one switched off by its chance, the whole pipeline does what that one does alone."""
    alone, whole = AdaPipeline(ONLY[name], 16), AdaPipeline(ALL, 16)
    assert (alone.num_uniform, alone.num_normal) == (whole.num_uniform, whole.num_normal)
    img, noise, (uniform, normal) = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16), random(whole, 8)
    for column, strength in enumerate(CHANCES.values()):
        if strength != name:
            uniform[:, column] = 1
    expected = alone(img, ALWAYS, uniform, normal, noise)
    torch.testing.assert_close(whole(img, ALWAYS, uniform, normal, noise), expected, rtol=0, atol=1e-6)


def test_every_column_matters() -> None:
    pipeline, img, noise = AdaPipeline(ALL, 16), torch.randn(64, 3, 16, 16), torch.randn(64, 3, 16, 16)
    uniform, normal = random(pipeline, 64)
    base = pipeline(img, ALWAYS, uniform, normal, noise)
    for kind, columns in ((0, range(len(CHANCES), pipeline.num_uniform)), (1, range(pipeline.num_normal))):
        for column in columns:
            draws = [uniform.clone(), normal.clone()]
            draws[kind][:, column] = 1 - draws[kind][:, column]
            names = (UNIFORMS, NORMALS)[kind]
            assert not torch.equal(pipeline(img, ALWAYS, *draws, noise), base), names[column - columns.start]


def test_an_image_does_not_depend_on_its_companions() -> None:
    pipeline, img, noise = AdaPipeline(ALL, 16), torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16)
    p, (uniform, normal) = torch.tensor(0.7), random(pipeline, 6)
    whole = pipeline(img, p, uniform, normal, noise)
    for k in range(6):
        one = slice(k, k + 1)
        alone = pipeline(img[one], p, uniform[one], normal[one], noise[one])
        torch.testing.assert_close(alone, whole[one], rtol=0, atol=1e-5)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_chances_are_p_times_strength(p: float) -> None:
    """Beyond the strength's share of p nothing happens, below it all does, and rotations have two smaller chances."""
    strengths = Strengths(**dict.fromkeys(NAMES, 0.5))
    pipeline, img = AdaPipeline(strengths, 16), torch.randn(1, 3, 16, 16)
    for name, column in zip(CHANCES, range(len(CHANCES)), strict=True):
        chance = 1 - (1 - p / 2) ** 0.5 if CHANCES[name] == "rotate" else p / 2
        draws = chosen(1, (), **dict.fromkeys(UNIFORMS, 0.8), **dict.fromkeys(set(NORMALS) - set(UNIFORMS), 0.7))
        for draw, happens in ((chance - 1e-4, True), (chance + 1e-4, False)):
            draws[0][0, column] = draw
            result = pipeline(img, torch.tensor(p), *draws, torch.randn_like(img))
            assert torch.equal(result, img) is not happens, name


# --- known results ---

# Sym6's mean lies 0.05 pixels beside the tap taken as its centre, so mirrored images are 0.1 pixels apart.
MIRRORED = 0.012  # the smooth images' slope is up to 0.08 a pixel


def test_a_flip_is_a_flip() -> None:
    img = smooth_images(2, 32)
    result = augmented(ONLY["xflip"], img, ("xflip",), xflip=0.9)
    torch.testing.assert_close(result[..., 2:-2, 2:-2], img.flip(3)[..., 2:-2, 2:-2], rtol=0, atol=MIRRORED)
    assert torch.equal(augmented(ONLY["xflip"], img, (), xflip=0.9), img)


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarters_are_rot90(quarters: int) -> None:
    img = smooth_images(2, 32)
    result = augmented(ONLY["rotate90"], img, ("rotate90",), rotate90=(quarters + 0.5) / 4)
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(result[inner], img.rot90(quarters, (2, 3))[inner], rtol=0, atol=MIRRORED)


def test_the_whole_turn_of_a_rotation_is_continuous_with_quarters() -> None:
    img = smooth_images(2, 32)
    quarter = augmented(ONLY["rotate90"], img, ("rotate90",), rotate90=0.3)
    angle = augmented(ONLY["rotate"], img, ("rotate",), rotate=0.75)
    torch.testing.assert_close(angle, quarter, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("uniform", "pixels"), [(0.0, -2), (0.5, 0), (0.7, 1), (0.9999, 2)])
def test_whole_translations_shift_with_reflection(uniform: float, pixels: int) -> None:
    img = torch.randn(2, 3, 16, 16)
    result = augmented(ONLY["xint"], img, ("xint",), xint_x=uniform, xint_y=0.5)
    padded = F.pad(img, (2, 2, 0, 0), mode="reflect")
    torch.testing.assert_close(result, padded[..., 2 - pixels : 18 - pixels], rtol=0, atol=1e-5)


def test_opposite_rotations_before_and_after_cancel_without_the_scale_between() -> None:
    img = smooth_images(2, 32)
    result = augmented(ONLY["rotate"], img, ("rotate", "rotate_after"), rotate=0.7, rotate_after=0.3)
    torch.testing.assert_close(result, img, rtol=0, atol=1e-4)


def test_a_scale_of_one_octave_shows_the_middle_twice_as_large() -> None:
    """A linear image stays linear, with half the slope, about the centre."""
    slope = ((torch.arange(32.0) - 15.5) / 16).expand(1, 3, 32, 32)
    result = augmented(ONLY["scale"], slope, ("scale",), scale=5.0)  # 2^(0.2 * 5)
    torch.testing.assert_close(result, slope / 2, rtol=0, atol=2e-3)


def test_fractional_translation_moves_by_a_share_of_the_side() -> None:
    slope = ((torch.arange(32.0) - 15.5) / 16).expand(1, 3, 32, 32)
    result = augmented(ONLY["xfrac"], slope, ("xfrac",), xfrac_x=0.6)  # 0.125 * 0.6 * 32 = 2.4 pixels to the right
    inner = (..., slice(6, 26))
    torch.testing.assert_close(result[inner], slope[inner] - 2.4 / 16, rtol=0, atol=2e-3)


def test_geometry_far_outside_shows_reflections_and_no_zeros() -> None:
    img = torch.rand(2, 3, 16, 16) * 0.2 + 0.7
    result = augmented(PIPELINES["geom"], img, ("scale", "rotate", "xfrac"), scale=-12.0, rotate=0.6, xfrac_x=9.0)
    assert result.min() > 0.6
    assert result.max() < 1


# --- sizes and formats ---


@pytest.mark.parametrize("res", [8, 16, 64])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_size_keeps_its_shape_and_format(
    res: int, n: int, channels: int, memory_format: torch.memory_format
) -> None:
    pipeline = AdaPipeline(ALL, res, channels)
    img = torch.randn(n, channels, res, res)
    draws, noise = random(pipeline, n), torch.randn_like(img)
    result = pipeline(img.contiguous(memory_format=memory_format), ALWAYS, *draws, noise)
    assert result.shape == img.shape
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(result, pipeline(img, ALWAYS, *draws, noise), rtol=0, atol=1e-5)


def test_grey_images_are_coloured_as_their_colours_mean() -> None:
    grey = torch.randn(4, 1, 8, 8)
    color, wide = AdaPipeline(PIPELINES["color"], 8, 1), AdaPipeline(PIPELINES["color"], 8, 3)
    draws = random(color, 4)
    expected = wide(grey.expand(4, 3, 8, 8), ALWAYS, *draws).mean(dim=1, keepdim=True)
    torch.testing.assert_close(color(grey, ALWAYS, *draws), expected)


def test_other_channels_have_no_colours() -> None:
    with pytest.raises(UserError, match="images have 4 channels, expected 1 or 3"):
        AdaPipeline(PIPELINES["bgc"], 8, 4)
    pipeline = AdaPipeline(PIPELINES["bg"], 8, 4)
    assert pipeline(torch.randn(2, 4, 8, 8), ALWAYS, *random(pipeline, 2)).shape == (2, 4, 8, 8)


def test_a_pipeline_has_nothing_to_train_or_save() -> None:
    pipeline = AdaPipeline(ALL, 8)
    assert not list(pipeline.parameters())
    assert not pipeline.state_dict()


@pytest.mark.parametrize("kind", ["noise", "bgcfn"])
def test_noise_is_asked_for_where_it_is_on(kind: str) -> None:
    assert AdaPipeline(PIPELINES[kind], 8).needs_noise
    assert not AdaPipeline(replace(PIPELINES[kind], noise=0), 8).needs_noise
    assert asdict(PIPELINES[kind])["noise"] == 1
