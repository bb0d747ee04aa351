"""What is drawn is distributed as the paper says (Karras et al. 2020, arXiv:2006.06676, appendix B)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stylepipe.augment.color import color_basis, color_matrix
from stylepipe.augment.columns import CHANCES, NORMALS, UNIFORMS, happenings, normal_columns, uniform_columns
from stylepipe.augment.corrupt import add_noise, band_gains, cut_out
from stylepipe.augment.geometry import inverse_geometry

N = 20_000
RES = 64
NAMES = tuple(CHANCES)
TWICE = torch.tensor([name == "rotate" for name in CHANCES.values()])


def drawn(p: float, *on: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return what happens, uniform and normal columns of N images with p and these strengths of 1."""
    uniform, normal = torch.rand(N, len(CHANCES) + len(UNIFORMS)), torch.randn(N, len(NORMALS))
    strengths = torch.tensor([float(name in on) for name in CHANCES.values()])
    happens = happenings(uniform, torch.tensor(p), strengths, TWICE)
    return dict(happens), dict(uniform_columns(uniform)), dict(normal_columns(normal))


def share(condition: Tensor) -> float:
    return float(condition.double().mean())


def near(expected: float) -> object:
    return pytest.approx(expected, abs=4 * math.sqrt(0.25 / N))  # four standard deviations of a share


def geometry(p: float, *on: str) -> Tensor:
    return inverse_geometry(*drawn(p, *on), RES)


# --- how often ---


@pytest.mark.parametrize("p", [0.0, 0.2, 0.8, 1.0])
def test_each_happens_with_probability_p(p: float) -> None:
    happens, _, _ = drawn(p, *CHANCES.values())
    for name in NAMES:
        assert share(happens[name] > 0) == near(1 - math.sqrt(1 - p) if CHANCES[name] == "rotate" else p), name
    assert share(happens["rotate"] + happens["rotate_after"] > 0) == near(p)  # of the two together


def test_they_happen_independently() -> None:
    happens, _, _ = drawn(0.5, *CHANCES.values())
    together = torch.corrcoef(torch.stack([happens[name] for name in NAMES]))
    assert (together - torch.eye(len(NAMES))).abs().max() < 5 / math.sqrt(N)


def test_strength_0_never_happens() -> None:
    happens, _, _ = drawn(1.0, "hue")
    assert {name for name in NAMES if happens[name].any()} == {"hue"}


# --- blit and geometry ---


def test_half_of_the_flips_flip() -> None:
    xx = geometry(0.6, "xflip")[:, 0, 0]
    assert share(xx == -1) == near(0.3)
    assert share(xx == 1) == near(0.7)


def test_quarters_are_even() -> None:
    matrix = geometry(1.0, "rotate90")
    turns = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]) / (math.pi / 2)
    for quarter in (-1, 0, 1):
        assert share((turns - quarter).abs() < 1e-5) == near(0.25)


def test_whole_translations_are_even_within_an_eighth() -> None:
    shift = geometry(1.0, "xint")[:, :, 2]
    assert torch.equal(shift, shift.round())
    assert shift.abs().max() == RES / 8
    assert share(shift[:, 0] == 3) == near(1 / 16)
    assert share(shift[:, 1] == 8) == near(1 / 32)  # of the outermost only half a pixel's width is drawn
    assert abs(float(torch.corrcoef(shift.t())[0, 1])) < 5 / math.sqrt(N)


def test_scales_are_log_normal() -> None:
    octaves = -torch.det(geometry(1.0, "scale")[:, :, :2]).log2() / 2
    assert float(octaves.mean()) == pytest.approx(0, abs=0.01)
    assert float(octaves.std()) == pytest.approx(0.2, abs=0.005)
    matrix = geometry(1.0, "aniso")
    torch.testing.assert_close(torch.det(matrix[:, :, :2]), torch.ones(N))
    assert float(matrix[:, 0, 0].log2().std()) == pytest.approx(0.2, abs=0.005)


def test_rotations_are_even_over_the_circle() -> None:
    matrix = geometry(0.5, "rotate")
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])
    assert share(angle == 0) == near(0.5)
    turned = angle[angle != 0]
    assert float(turned.cos().mean()) == pytest.approx(0, abs=0.04)
    assert float((turned.abs() / math.pi).mean()) == pytest.approx(0.5, abs=0.02)


def test_fractional_translations_are_normal() -> None:
    shift = geometry(1.0, "xfrac")[:, :, 2] / RES
    assert float(shift.std(dim=0)[0]) == pytest.approx(0.125, abs=0.003)
    assert float(shift.std(dim=0)[1]) == pytest.approx(0.125, abs=0.003)
    assert abs(float(torch.corrcoef(shift.t())[0, 1])) < 5 / math.sqrt(N)


def test_geometry_is_the_product_of_its_parts() -> None:
    """Flip, quarter, whole shift, scale, rotation, aniso, rotation, fractional shift: inverses from the left."""

    def affine(xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor, x: Tensor, y: Tensor) -> Tensor:
        zero, one = torch.zeros(N).double(), torch.ones(N).double()
        entries = [part.double() for part in (xx, xy, x, yx, yy, y)] + [zero, zero, one]
        return torch.stack(entries, dim=1).unflatten(1, (3, 3))

    def scale(x: Tensor, y: Tensor) -> Tensor:
        return affine(x, 0 * x, 0 * x, y, 0 * x, 0 * x)

    def rotate(angle: Tensor) -> Tensor:
        return affine(angle.cos(), -angle.sin(), angle.sin(), angle.cos(), 0 * angle, 0 * angle)

    def translate(x: Tensor, y: Tensor) -> Tensor:
        return affine(0 * x + 1, 0 * x, 0 * x, 0 * x + 1, x, y)

    happens, uniform, normal = drawn(0.7, *CHANCES.values())
    h, u, n = ({k: v.double() for k, v in columns.items()} for columns in (happens, uniform, normal))
    quarters = h["rotate90"] * (u["rotate90"] * 4).floor()
    shift = [h["xint"] * ((2 * u[f"xint_{a}"] - 1) * RES / 8).round() for a in "xy"]
    zoom, stretch = 2 ** (0.2 * h["scale"] * n["scale"]), 2 ** (0.2 * h["aniso"] * n["aniso"])
    product = scale(1 - 2 * h["xflip"] * (u["xflip"] * 2).floor(), torch.ones(N))
    for part in (
        rotate(quarters * math.pi / 2),
        translate(-shift[0], -shift[1]),
        scale(1 / zoom, 1 / zoom),
        rotate(h["rotate"] * (2 * u["rotate"] - 1) * math.pi),
        scale(1 / stretch, stretch),
        rotate(h["rotate_after"] * (2 * u["rotate_after"] - 1) * math.pi),
        translate(*(-h["xfrac"] * n[f"xfrac_{a}"] * RES / 8 for a in "xy")),
    ):
        product = product @ part
    result = inverse_geometry(happens, uniform, normal, RES).double()
    torch.testing.assert_close(result, product[:, :2], rtol=1e-4, atol=1e-4)


# --- colours, filter, noise, cutout ---


def colors(p: float, *on: str) -> tuple[Tensor, Tensor]:
    return color_matrix(*drawn(p, *on), color_basis())


def test_brightness_and_contrast() -> None:
    matrix, offset = colors(1.0, "brightness")
    assert torch.equal(matrix, torch.eye(3).expand(N, 3, 3))
    assert float(offset.std()) == pytest.approx(0.2, abs=0.005)
    matrix, offset = colors(1.0, "contrast")
    assert not offset.any()
    assert float(matrix[:, 0, 0].log2().std()) == pytest.approx(0.5, abs=0.012)
    torch.testing.assert_close(matrix, matrix[:, :1, :1] * torch.eye(3))


def test_luma_flips_half_of_the_time() -> None:
    matrix, _ = colors(1.0, "lumaflip")
    flipped = torch.eye(3) - torch.full((3, 3), 2 / 3)
    assert share(((matrix - flipped).abs() < 1e-6).all(dim=(1, 2))) == near(0.5)
    assert share((matrix == torch.eye(3)).all(dim=(1, 2))) == near(0.5)


def test_hue_rotates_about_grey() -> None:
    matrix, _ = colors(1.0, "hue")
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3).expand(N, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix.sum(dim=2), torch.ones(N, 3), rtol=0, atol=1e-5)
    cosine = (matrix.diagonal(dim1=1, dim2=2).sum(dim=1) - 1) / 2
    angle = cosine.clamp(-1, 1).acos() / math.pi
    assert float(angle.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(angle.std()) == pytest.approx(math.sqrt(1 / 12), abs=0.005)


def test_saturation_scales_chroma() -> None:
    matrix, _ = colors(1.0, "saturation")
    torch.testing.assert_close(matrix.sum(dim=2), torch.ones(N, 3), rtol=0, atol=1e-4)
    chroma = matrix[:, 0, 0] - matrix[:, 0, 1]
    assert float(chroma.log2().std()) == pytest.approx(1, abs=0.02)


def test_colours_are_the_product_of_their_parts() -> None:
    """Brightness, contrast, luma flip, hue, saturation, each applied to what the one before gave."""
    happens, uniform, normal = drawn(0.7, *CHANCES.values())
    h, u, n = ({k: v.double() for k, v in columns.items()} for columns in (happens, uniform, normal))
    color = torch.randn(N, 3).double()
    y = color + 0.2 * (h["brightness"] * n["brightness"])[:, None]
    y = y * 2 ** (0.5 * h["contrast"] * n["contrast"])[:, None]
    y = y - 2 * (h["lumaflip"] * (u["lumaflip"] * 2).floor())[:, None] * y.mean(dim=1, keepdim=True)
    axis = torch.full((N, 3), 1 / math.sqrt(3)).double()
    angle = (h["hue"] * (2 * u["hue"] - 1) * math.pi)[:, None]
    y = (  # Rodrigues' formula
        y * angle.cos()
        + torch.linalg.cross(axis, y) * angle.sin()
        + axis * (axis * y).sum(dim=1, keepdim=True) * (1 - angle.cos())
    )
    luma = y.mean(dim=1, keepdim=True)
    y = luma + (y - luma) * 2 ** (h["saturation"] * n["saturation"])[:, None]
    matrix, offset = color_matrix(happens, uniform, normal, color_basis())
    result = (matrix.double() @ color[:, :, None])[:, :, 0] + offset.double()[:, None]
    torch.testing.assert_close(result, y, rtol=1e-4, atol=1e-4)


def test_gains_of_bands_keep_the_expected_power() -> None:
    happens, _, normal = drawn(0.5, "imgfilter")
    gains = band_gains(happens, normal)
    untouched = 1 - torch.stack([happens[f"band_{k}"] for k in range(4)]).amax(dim=0) > 0
    assert share(untouched) == near(0.5**4)
    torch.testing.assert_close(gains[untouched], torch.ones_like(gains[untouched]))
    for band, power in enumerate((10 / 13, 1 / 13, 1 / 13, 1 / 13)):
        only = {k: v * (k == f"band_{band}") for k, v in happens.items()}
        gains = band_gains(only, normal)
        other = gains[:, (band + 1) % 4]
        torch.testing.assert_close(power * gains[:, band].square() + (1 - power) * other.square(), torch.ones(N))
        changed = only[f"band_{band}"] > 0
        octaves = (gains[:, band] / other).log2()[changed]
        assert float(octaves.std()) == pytest.approx(1, abs=0.03)


def test_noise_is_half_normal_in_its_strength() -> None:
    happens, _, normal = drawn(1.0, "noise")
    result = add_noise(torch.zeros(N, 1, 1, 1), torch.ones(N, 1, 1, 1), happens, normal)
    assert result.min() >= 0
    assert float(result.mean()) == pytest.approx(0.1 * math.sqrt(2 / math.pi), abs=0.002)


def test_cutout_clears_half_the_side_about_an_even_centre() -> None:
    happens, uniform, _ = drawn(0.5, "cutout")
    n = 4000
    cut = (
        cut_out(torch.ones(n, 1, 16, 16), happens["cutout"][:n], uniform["cutout_x"][:n], uniform["cutout_y"][:n]) == 0
    )
    assert share(cut.any(dim=(1, 2, 3))) == pytest.approx(0.5, abs=0.04)
    # The mean share of a side that is cut is 1/2 less what reaches over the edges, 1/16.
    assert share(cut[happens["cutout"][:n] > 0]) == pytest.approx((7 / 16) ** 2, abs=0.01)
    widths = cut.any(dim=2).sum(dim=2)
    assert widths.max() == 8
    assert share(cut[:, :, 8, 8]) > share(cut[:, :, 0, 0]) > 0
