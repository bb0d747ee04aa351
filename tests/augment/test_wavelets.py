"""Wavelets have the properties that define them; octaves add up to the whole."""

from __future__ import annotations

import numpy as np
import pytest

from stylepipe.augment.wavelets import SYM2, SYM6, SYM6_CENTRE, octave_bands


@pytest.mark.parametrize("taps", [SYM2, SYM6], ids=["sym2", "sym6"])
def test_taps_are_a_daubechies_wavelets(taps: np.ndarray) -> None:
    """2n taps that sum to 1, are orthogonal to their even shifts, and have n zeros at the highest frequency."""
    count = len(taps)
    assert taps.sum() == pytest.approx(1, abs=1e-14)
    products = [taps[: count - shift] @ taps[shift:] for shift in range(0, count, 2)]
    np.testing.assert_allclose(products, [0.5] + [0] * (count // 2 - 1), atol=1e-14)
    alternating = taps * (-1.0) ** np.arange(count)
    moments = [alternating @ (np.arange(count) / count) ** power for power in range(count // 2)]
    np.testing.assert_allclose(moments, 0, atol=1e-13)


def test_sym6_is_the_least_asymmetric_one() -> None:
    """The phase of the others with these properties is 0.41 or more where they pass: all 8 were made by factoring."""
    frequency = np.linspace(0.01, np.pi / 2, 100)
    response = np.array([SYM6 @ np.exp(-1j * w * (np.arange(12) - SYM6_CENTRE)) for w in frequency])
    assert np.abs(np.angle(response)).max() < 0.27  # radians
    assert np.argmax(SYM6) == SYM6_CENTRE


def test_octaves_add_up_to_the_whole() -> None:
    bands = octave_bands(SYM2, 4)
    assert bands.shape == (4, 43)
    np.testing.assert_allclose(bands, bands[:, ::-1], atol=1e-15)
    whole = np.zeros(43)
    whole[21] = 1
    np.testing.assert_allclose(bands.sum(axis=0), whole, atol=1e-15)


def test_each_octave_passes_its_frequencies() -> None:
    bands = octave_bands(SYM2, 4)
    for band, octave in enumerate([(0, 1 / 8), (1 / 8, 1 / 4), (1 / 4, 1 / 2), (1 / 2, 1)]):
        middle = np.pi * (0 if band == 0 else 1 if band == 3 else sum(octave) / 2)
        response = [float(taps @ np.cos(middle * (np.arange(43) - 21))) for taps in bands]
        assert np.argmax(response) == band
        assert response[band] > 0.65
