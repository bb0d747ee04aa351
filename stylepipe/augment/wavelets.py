"""Orthogonal wavelets' low-pass filters, and the octave bands made of one.

Daubechies, Ten Lectures on Wavelets (1992), chapters 6 and 8: symlets, the least asymmetric filters of 2n taps whose
wavelets have n vanishing moments. Taps here sum to 1 and are orthogonal to themselves shifted by 2: upsampling by 2
with twice the taps, then downsampling with the reversed taps gives back exactly what went in.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SYM2: NDArray[np.float64] = np.array([1 - math.sqrt(3), 3 - math.sqrt(3), 3 + math.sqrt(3), 1 + math.sqrt(3)]) / 8
SYM6: NDArray[np.float64] = np.array(
    [
        0.0108923501632912,
        0.002468306185924511,
        -0.08343160770606499,
        -0.03416156079328232,
        0.3472289864792136,
        0.556946391962871,
        0.2389521856664374,
        -0.05136248493084563,
        -0.01489187564927522,
        0.03162528133002138,
        0.001249961046397933,
        -0.005515933754689012,
    ]
)
SYM6_CENTRE = 5
"""The tap of SYM6 about which it is nearest to symmetric."""


def octave_bands(taps: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Split the axis of frequencies into octaves, by filters whose sum passes everything unchanged.

    With the half-band low-pass L(z) = H(z) H(1/z) and the high-pass L(-z) = 1 - L(z), band k from the top is
    L(z) L(z^2) ... L(z^(2^(k-1))) (1 - L(z^(2^k))), and the lowest is what then remains.

    Returns:
        [count, odd length], symmetric filters of zero phase, from the lowest band to the highest.
    """
    low = np.convolve(taps, taps[::-1])
    below = np.ones(1)  # passes what the bands so far have left
    bands = []
    for octave in range(count - 1):
        spread = np.zeros((len(low) - 1) * 2**octave + 1)
        spread[:: 2**octave] = low
        rest = np.convolve(below, spread)
        bands.append(_widened(below, len(rest)) - rest)
        below = rest
    bands.append(below)
    return np.stack([_widened(band, len(below)) for band in reversed(bands)])


def _widened(taps: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Pad a filter of odd length with zeros on both sides."""
    return np.pad(taps, (length - len(taps)) // 2)
