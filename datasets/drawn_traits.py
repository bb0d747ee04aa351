"""The traits of a drawn face, and how they are drawn from (seed, index).

A `Face` says everything about a picture and nothing about pixels; `stylepipe.datasets.drawn` renders it at any
resolution. Lengths are fractions of the picture's side, angles radians, colours RGB in [0, 1]. Most traits vary
smoothly, so that a small generator finds them within minutes; a few (hair style, glasses, beard) are choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Colour = tuple[float, float, float]
_Option = TypeVar("_Option")


@dataclass(frozen=True)
class Face:
    """States one portrait: pose, light, build, features, hair, things worn, background."""

    # Pose: as loose as an aligned photograph's.
    shift: tuple[float, float]
    scale: float
    roll: float
    yaw: float
    pitch: float
    # Light: a unit vector towards the lamp (x right, y down, z to the viewer).
    light: tuple[float, float, float]
    contrast: float
    warmth: float
    # Build
    feminine: float
    age: float
    cheek: float
    jaw: float
    chin: float
    skin: Colour
    blush: float
    freckles: float
    # Eyes and brows
    eye_width: float
    eye_height: float
    eye_gap: float
    eye_slant: float
    iris: Colour
    gaze: tuple[float, float]
    lashes: float
    eyeshadow: Colour | None
    brow_height: float
    brow_arch: float
    brow_lift: float
    brow_width: float
    # Nose and mouth
    nose_length: float
    nose_width: float
    mouth_width: float
    mouth_open: float
    smile: float
    upper_lip: float
    lower_lip: float
    lip: Colour
    # Hair
    hair_style: str
    hair: Colour
    brow_colour: Colour
    hair_volume: float
    hair_length: float
    hair_part: float
    hair_wave: float
    hairline: float
    fringe: float
    strands: tuple[float, float, float, float]
    beard: str
    stubble: float
    # Things worn
    glasses: str
    frame: Colour
    hat: str
    hat_colour: Colour
    earrings: Colour | None
    clothes: str
    cloth: Colour
    cloth_accent: Colour
    # Background
    backdrop: str
    backdrop_colours: tuple[Colour, Colour]
    backdrop_shape: tuple[float, float, float, float]


def sample_face(index: int, seed: int = 0) -> Face:
    """Draws the traits of face `index` of the collection `seed`; both are whole numbers in [0, 2**64)."""
    dice = _Dice(seed, index)
    feminine = dice.soft(0.0, 1.0, flat=0.6)
    age = dice.between(0.0, 1.0) ** 1.5
    tone = dice.between(0.0, 1.0)
    skin = _jitter(dice, _ramp(_SKIN, tone), 0.018)
    hair = _hair_colour(dice, tone, age)
    style = _hair_style(dice, feminine, age)
    beard, stubble = _beard(dice, feminine)
    smile = dice.soft(-0.15, 1.15)
    made_up = feminine > 0.5 and dice.chance(0.5)
    hat = dice.pick(("none", "beanie", "scarf"), (0.93, 0.04, 0.06 * feminine))
    if hat == "scarf":
        style, beard, stubble = "bald", "none", 0.0
    elif hat == "beanie" and style in ("afro", "bun", "curly", "quiff"):
        style = "short"
    sun = dice.between(-0.75, 0.75)
    light = np.array([sun, dice.between(-0.65, -0.3), 0.75])
    light /= np.linalg.norm(light)
    return Face(
        shift=(dice.soft(-0.018, 0.018), dice.soft(-0.012, 0.012)),
        scale=dice.soft(1.03, 1.13),
        roll=dice.soft(-0.12, 0.12),
        yaw=dice.soft(-1.0, 1.0),
        pitch=dice.soft(-0.6, 0.6),
        light=(float(light[0]), float(light[1]), float(light[2])),
        contrast=dice.between(0.65, 1.0),
        warmth=dice.soft(-1.0, 1.0),
        feminine=feminine,
        age=age,
        cheek=dice.soft(0.95, 1.06),
        jaw=dice.soft(0.9, 1.08) - 0.1 * (feminine - 0.5),
        chin=dice.soft(0.85, 1.15) - 0.16 * (feminine - 0.5),
        skin=skin,
        blush=dice.between(0.2, 0.7) + 0.3 * made_up,
        freckles=dice.between(0.4, 1.0) if tone < 0.45 and dice.chance(0.14) else 0.0,
        eye_width=dice.soft(0.050, 0.060),
        eye_height=dice.soft(0.019, 0.030) + 0.004 * feminine,
        eye_gap=dice.soft(0.101, 0.112),
        eye_slant=dice.soft(-0.06, 0.2),
        iris=_jitter(dice, dice.pick(_IRIS, (5.0, 3.0, 1.2, 1.2 * (1 - tone), 1.6 * (1 - tone), 0.8)), 0.04),
        gaze=(dice.soft(-1.0, 1.0), dice.soft(-0.6, 0.6)),
        lashes=0.35 + 0.5 * feminine + 0.3 * made_up,
        eyeshadow=_jitter(dice, dice.pick(_EYESHADOW), 0.06) if made_up and dice.chance(0.6) else None,
        brow_height=dice.soft(0.058, 0.08),
        brow_arch=dice.soft(0.002, 0.018),
        brow_lift=dice.soft(-0.006, 0.012),
        brow_width=dice.soft(0.010, 0.020) - 0.006 * (feminine - 0.5),
        nose_length=dice.soft(0.115, 0.148),
        nose_width=dice.soft(0.036, 0.054) - 0.006 * (feminine - 0.5) + 0.006 * tone,
        mouth_width=dice.soft(0.072, 0.096) + 0.012 * max(smile, 0.0),
        mouth_open=dice.between(0.008, 0.034) if dice.chance(0.4 if smile > 0.3 else 0.12) else 0.0,
        smile=smile,
        upper_lip=dice.soft(0.010, 0.020) + 0.005 * tone,
        lower_lip=dice.soft(0.015, 0.027) + 0.006 * tone,
        lip=_lip_colour(dice, skin, made_up),
        hair_style=style,
        hair=hair,
        brow_colour=mix(scaled(hair, 0.62), scaled(skin, 0.42), 0.35),
        hair_volume=dice.soft(0.6, 1.4),
        hair_length=dice.between(0.0, 1.0),
        hair_part=dice.soft(-0.09, 0.09),
        hair_wave=dice.between(0.0, 1.0),
        hairline=dice.soft(-0.235, -0.185) - (0.025 * age if feminine < 0.5 else 0.0),
        fringe=dice.between(0.5, 1.0) if feminine > 0.35 and dice.chance(0.3) else 0.0,
        strands=(dice.turn(), dice.turn(), dice.turn(), dice.turn()),
        beard=beard,
        stubble=stubble,
        glasses=dice.pick(("none", "round", "square", "wide", "sun"), (0.78, 0.08, 0.08, 0.04, 0.015)),
        frame=_jitter(dice, dice.pick(_FRAME), 0.04),
        hat=hat,
        hat_colour=_jitter(dice, dice.pick(_CLOTH), 0.06),
        earrings=dice.pick(_JEWEL) if feminine > 0.5 and dice.chance(0.35) else None,
        clothes=dice.pick(("crew", "vneck", "shirt", "turtle"), (4.0, 2.0, 2.5, 1.2)),
        cloth=_jitter(dice, dice.pick(_CLOTH), 0.06),
        cloth_accent=_jitter(dice, dice.pick(_CLOTH), 0.06),
        backdrop=dice.pick(("plain", "bokeh", "bands", "window", "horizon"), (4.0, 2.0, 1.0, 1.2, 1.5)),
        backdrop_colours=_backdrop_colours(dice),
        backdrop_shape=(dice.between(0.0, 1.0), dice.between(0.0, 1.0), dice.between(0.0, 1.0), dice.turn()),
    )


class _Dice:
    """Draws from a counter-based generator keyed by (seed, index).

    Only `Generator.random` is used: numpy keeps the stream of the other distributions open to change.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._random = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64))).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._random())

    def soft(self, low: float, high: float, flat: float = 0.0) -> float:
        """Draws from [low, high], the middle more often than the ends (`flat` = 1: evenly)."""
        first, second, third = (float(u) for u in self._random(3))
        return low + (high - low) * (flat * first + (1.0 - flat) * (first + second + third) / 3.0)

    def turn(self) -> float:
        return self.between(0.0, 2.0 * np.pi)

    def chance(self, probability: float) -> bool:
        return float(self._random()) < probability

    def pick(self, options: Sequence[_Option], weights: Sequence[float] | None = None) -> _Option:
        if weights is None:
            weights = (1.0,) * len(options)
        mark = self.between(0.0, sum(weights))
        for option, weight in zip(options, weights, strict=True):
            mark -= weight
            if mark < 0.0:
                return option
        return options[-1]


def _hair_style(dice: _Dice, feminine: float, age: float) -> str:
    him = {"bald": 0.4 + 1.6 * age, "buzz": 1.6, "short": 4.0, "quiff": 2.4, "curly": 1.4, "afro": 0.5, "long": 0.4}
    her = {"long": 5.0, "bob": 2.6, "bun": 1.5, "tied": 1.2, "curly": 1.2, "afro": 0.7, "short": 0.9, "buzz": 0.1}
    styles = sorted({*him, *her})
    side = min(max((feminine - 0.35) / 0.3, 0.0), 1.0)
    return dice.pick(styles, [(1 - side) * him.get(name, 0.0) + side * her.get(name, 0.0) for name in styles])


def _hair_colour(dice: _Dice, tone: float, age: float) -> Colour:
    """Draws a hair colour: dark skin seldom has fair hair, age turns hair grey, a few people dye it."""
    if dice.chance(0.04):
        return _jitter(dice, dice.pick(_DYE), 0.05)
    colour = _ramp(_HAIR, dice.between(0.0, 1.0) * (1.0 - 0.75 * tone))
    if dice.chance(0.12):
        colour = mix(colour, (0.58, 0.24, 0.10), 0.7 * (1.0 - tone))
    grey = min(max((age - 0.45) / 0.5 + dice.soft(-0.4, 0.4), 0.0), 1.0)
    return mix(colour, _jitter(dice, (0.76, 0.75, 0.74), 0.03), grey)


def _beard(dice: _Dice, feminine: float) -> tuple[str, float]:
    if feminine > 0.42:
        return "none", 0.0
    beard = dice.pick(("none", "moustache", "goatee", "full"), (6.0, 0.8, 1.0, 1.8))
    return beard, dice.between(0.1, 0.6) if beard != "none" or dice.chance(0.5) else 0.0


def _lip_colour(dice: _Dice, skin: Colour, made_up: bool) -> Colour:
    natural = mix(scaled(skin, 0.80), (0.72, 0.26, 0.28), dice.between(0.28, 0.45))
    return mix(natural, _jitter(dice, dice.pick(_LIPSTICK), 0.04), dice.between(0.4, 0.9)) if made_up else natural


def _backdrop_colours(dice: _Dice) -> tuple[Colour, Colour]:
    """Draws two neighbouring, rather muted colours, so that the face stays the strongest thing in the picture."""
    base = _jitter(dice, dice.pick(_BACKDROP), 0.06)
    return base, _jitter(dice, mix(scaled(base, dice.between(0.55, 1.2)), dice.pick(_BACKDROP), 0.3), 0.03)


def _jitter(dice: _Dice, colour: Colour, amount: float) -> Colour:
    red, green, blue = (min(max(c + dice.between(-amount, amount), 0.0), 1.0) for c in colour)
    return red, green, blue


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Blends two colours: `share` of the second, the rest of the first."""
    red, green, blue = ((1.0 - share) * a + share * b for a, b in zip(first, second, strict=True))
    return red, green, blue


def scaled(colour: Colour, factor: float) -> Colour:
    """Brightens or darkens a colour by a factor; stays below white."""
    red, green, blue = (min(c * factor, 1.0) for c in colour)
    return red, green, blue


def _ramp(stops: Sequence[Colour], position: float) -> Colour:
    """Reads a piecewise linear ramp at `position` in [0, 1]."""
    step = position * (len(stops) - 1)
    left = min(int(step), len(stops) - 2)
    return mix(stops[left], stops[left + 1], step - left)


def _hex(*codes: str) -> tuple[Colour, ...]:
    return tuple((int(c[0:2], 16) / 255, int(c[2:4], 16) / 255, int(c[4:6], 16) / 255) for c in codes)


_SKIN = _hex("fbdcc8", "f3c9ad", "e8b592", "d79b74", "bb7d57", "96603f", "754a32", "5b3929")
_HAIR = _hex("1b1716", "2a1e1a", "43291d", "64402a", "8a5c38", "b58650", "d9b679", "eed7a4")
_DYE = _hex("d8688f", "4f7fb5", "4aa39a", "7d5aa8", "b8323f")
_IRIS = _hex("4b2e1e", "6b4528", "7d6a35", "5f7f54", "5b86ad", "6f7b83")
_EYESHADOW = _hex("a5747a", "8a6a9a", "6d7fa3", "a98457", "6e5a55")
_LIPSTICK = _hex("b3202e", "c2446a", "a33a4b", "d66a6a", "7c2a45")
_FRAME = _hex("1d1b1c", "4a2d1e", "7a5a34", "8b8f96", "2d3f5e", "7a2630")
_JEWEL = _hex("e3c46a", "d8dbe0", "c86a6a", "5aa3a0")
_CLOTH = _hex(
    "26303f", "e9e6df", "7e2f37", "2f5d62", "c98b4b", "6b7a8f", "3c3b3d", "94a58b", "d4a5a5", "4b4e84", "b9b3a6"
)
_BACKDROP = _hex(
    "9fc0d6",
    "c5d8d3",
    "e0cbae",
    "7fa39a",
    "b3c795",
    "ecd9bf",
    "8fa2d0",
    "e0a992",
    "6c86a3",
    "b9aed6",
    "efe9dd",
    "f0c987",
)
