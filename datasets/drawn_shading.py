"""Pose and light of a drawn face: where a point of the face lies, and how bright and of what colour each place is.

A field is a float32 array [g, g] or [g, g, 3] over the whole picture, in [0, 1]; fields are smooth, so a coarse one is
computed and enlarged. The head is an ellipsoid with Gaussian bumps (nose, cheeks, lips, eye sockets), lit by one lamp.
"""

import math

import numpy as np

from stylepipe.datasets.drawn_canvas import Field, Points
from stylepipe.datasets.drawn_traits import Colour, Face

MOUTH_LINE = 0.222
_EYE_LINE = 0.462  # height of the eyes in the picture
_HEAD = (0.255, 0.41)  # half axes of the ellipsoid
_HEAD_CENTRE = 0.02
_TURN = (0.07, 0.035)  # how far yaw = 1 and pitch = 1 move the front of the head against its outline


class Pose:
    """Places points of the face in the picture: head turn (by depth), then roll, scale and shift."""

    def __init__(self, face: Face) -> None:
        self.turn = np.array((face.yaw * _TURN[0], face.pitch * _TURN[1]))
        cos, sin = math.cos(face.roll), math.sin(face.roll)
        self._frame = face.scale * np.array(((cos, sin), (-sin, cos)))
        self._origin = np.array((0.5 + face.shift[0], _EYE_LINE + face.shift[1]))

    def place(self, points: Points, lift: float = 0.0) -> Points:
        """Maps [n, 2] face coordinates to the picture; `lift` is how far a point stands out of the ellipsoid."""
        # The eyes' depth is taken off: an aligned photograph keeps the features and moves the head's outline.
        depth = _depth(points[:, 0], points[:, 1]) + lift - 0.85
        return (points + depth[:, None] * self.turn) @ self._frame + self._origin

    def outline_offset(self) -> Points:
        """Returns how far the head's outline is moved, in face coordinates."""
        return -0.85 * self.turn

    def coordinates(self, size: int) -> tuple[Field, Field]:
        """Returns the face coordinates (x, y), [size, size] each, of a field's pixels; the turn is not undone."""
        centres = (np.arange(size, dtype=np.float32) + 0.5) / size
        x, y = centres[None, :] - self._origin[0], centres[:, None] - self._origin[1]
        back = np.linalg.inv(self._frame)
        return (
            (x * back[0, 0] + y * back[1, 0]).astype(np.float32),
            (x * back[0, 1] + y * back[1, 1]).astype(np.float32),
        )


def skin_field(face: Face, pose: Pose, size: int) -> Field:
    """Shades the head [size, size, 3]: diffuse light with warm shadows, a soft sheen, blush and freckles."""
    x, y = pose.coordinates(size)
    offset_x, offset_y = pose.outline_offset().tolist()  # Python floats keep the fields float32
    u, v = (x - offset_x) / _HEAD[0], (y - offset_y - _HEAD_CENTRE) / _HEAD[1]
    depth = np.sqrt(np.clip(1.0 - u * u - v * v, 0.06, 1.0))
    turned_x, turned_y = x - (depth - 0.85) * float(pose.turn[0]), y - (depth - 0.85) * float(pose.turn[1])
    slope_x, slope_y = _relief_slopes(face, turned_x, turned_y)
    diffuse, sheen = _lit(face, 0.95 * u - slope_x, 0.8 * v - slope_y, depth)

    skin = _rgb(*face.skin)
    shadow = skin * _rgb(0.56, 0.44, 0.42) + _rgb(0.03, 0.01, 0.015)
    light = np.minimum(skin * _rgb(1.06 + 0.03 * face.warmth, 1.05, 1.05 - 0.03 * face.warmth), 1.0)
    tone = _blend(shadow, light, 1.0 - face.contrast * (1.0 - diffuse))
    red = face.blush * (
        _bump(np.abs(turned_x), turned_y, 0.125, 0.115, 0.05, 0.04)
        + 0.5 * _bump(turned_x, turned_y, 0.0, 0.12, 0.03, 0.025)
    )
    tone *= 1.0 - red[..., None] * _rgb(0.0, 0.16, 0.13)
    return tone + (0.34 * sheen)[..., None] * _rgb(1.0, 0.95, 0.88) * (1.0 - 0.8 * tone)


def hair_field(face: Face, pose: Pose, size: int) -> Field:
    """Shades hair [size, size, 3]: the head's roundness, strands that fan out from the parting, a band of gloss."""
    x, y = pose.coordinates(size)
    offset_x, offset_y = pose.outline_offset().tolist()
    x, y = x - offset_x, y - offset_y
    u, v = x / 0.36, np.clip((y + 0.02) / 0.44, -1.0, 0.25)
    diffuse, _ = _lit(face, 0.9 * u, 0.8 * v, np.sqrt(np.clip(1.0 - u * u - v * v, 0.1, 1.0)))
    first, second, third, fourth = face.strands
    if face.hair_style in ("curly", "afro"):
        warp_x = 0.020 * np.sin(47 * y + first) + 0.011 * np.sin(83 * y + 31 * x + second)
        warp_y = 0.020 * np.sin(43 * x + third) + 0.011 * np.sin(79 * x - 37 * y + fourth)
        x, y = x + warp_x, y + warp_y
        texture = _fine(95, size) * np.sin(88 * x + third) * np.sin(95 * y + fourth)
        texture = texture + 0.6 * _fine(170, size) * np.sin(150 * x + 80 * y + first)
        gloss = 0.3 + 0.25 * texture
    else:
        width = 0.13 + 0.36 * np.tanh(np.maximum(y + 0.37, 0.0) / 0.36)
        fan = (x - face.hair_part) / width
        fan = fan + 0.02 * (0.3 + face.hair_wave) * np.sin(16.0 * y + first)
        texture = np.zeros_like(fan)
        for strength, count, phase in ((0.5, 19, second), (0.45, 43, third), (0.4, 97, fourth), (0.3, 171, first)):
            texture += strength * _fine(count / width, size) * np.sin(count * fan + phase)
        height = (y + 0.235 + 0.9 * x * x + 0.012 * texture - 0.10 * face.light[1]) / 0.05
        gloss = np.exp(-height * height) * (0.75 + 0.25 * texture)
    hair = _rgb(*face.hair)
    level = (0.42 + 0.75 * (1.0 - 0.8 * face.contrast * (1.0 - diffuse))) * (1.0 + 0.11 * texture)
    sheen = (gloss * (0.04 + 0.22 * diffuse))[..., None] * (0.35 + 0.65 * np.sqrt(hair)) * (1.0 - 0.65 * hair)
    return (hair * level[..., None] + sheen).astype(np.float32)


def backdrop_field(face: Face, size: int) -> Field:
    """Paints the background [size, size, 3]: two neighbouring colours in one of a few soft patterns."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = centres[None, :], centres[:, None]
    first, second, third, turn = face.backdrop_shape
    slope = (x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn)
    share = 0.5 + 0.55 * slope
    if face.backdrop == "bokeh":
        for spot in range(7):
            across, down = (first + 0.618 * spot) % 1.0, (second + 0.755 * spot) % 1.0
            radius = 0.07 + 0.09 * ((third + 0.569 * spot) % 1.0)
            distance = np.hypot(x - across, y - down) / radius
            share = share + 0.3 * _step(distance, 1.0, 0.14)
    elif face.backdrop == "bands":
        share = share + 0.3 * np.sin((9.0 + 14.0 * first) * slope + 6.3 * second)
    elif face.backdrop == "window":
        bright = _step(np.abs(x - first), 0.14 + 0.1 * second, 0.03) * _step(np.abs(y - 0.3), 0.28 + 0.1 * third, 0.03)
        share = 0.25 + 0.3 * y + 0.65 * bright
    elif face.backdrop == "horizon":
        edge = 0.45 + 0.3 * first + 0.04 * np.sin(6.0 * x + turn) + 0.015 * np.sin(17.0 * x + 6.3 * second)
        share = 0.15 + 0.35 * y + 0.5 * _step(edge - y, 0.0, 0.02 + 0.05 * third)
    vignette = 1.0 - 0.35 * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    near, far = (_rgb(*colour) for colour in face.backdrop_colours)
    backdrop = _blend(near, far, share.astype(np.float32)) * vignette[..., None]
    return backdrop.astype(np.float32)


def wash_field(face: Face, size: int) -> Field:
    """Returns the light's fall-off over the picture [size, size]: factors that darken the side away from the lamp."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    toward = face.light[0] * centres[None, :] + face.light[1] * centres[:, None]
    return (0.975 + 0.28 * face.contrast * np.minimum(toward - 0.02, 0.09)).astype(np.float32)


def shadow_of(colour: Colour, share: float = 1.0) -> Colour:
    """Returns the colour of a shadow on `colour`: darker, and warmer as skin's shadows are."""
    red, green, blue = (c * (1.0 - share * (1.0 - f)) for c, f in zip(colour, (0.56, 0.42, 0.40), strict=True))
    return red, green, blue


def _lit(face: Face, normal_x: Field, normal_y: Field, normal_z: Field) -> tuple[Field, Field]:
    """Lights a surface by its normals (any length): returns its diffuse light and its sheen, both in [0, 1]."""
    length = np.sqrt(normal_x * normal_x + normal_y * normal_y + normal_z * normal_z)
    light_x, light_y, light_z = face.light
    facing = (normal_x * light_x + normal_y * light_y + normal_z * light_z) / length
    half = math.sqrt(2.0 + 2.0 * light_z)
    glossy = (normal_x * light_x + normal_y * light_y + normal_z * (light_z + 1.0)) / (half * length)
    soft = np.clip((facing + 0.28) / 1.18, 0.0, 1.0)
    return soft * soft * (3.0 - 2.0 * soft), np.clip(glossy, 0.0, 1.0) ** 26


def _relief_slopes(face: Face, x: Field, y: Field) -> tuple[Field, Field]:
    """Returns the slopes (dh/dx, dh/dy) of the face's relief h over the ellipsoid, toward the viewer."""
    tip = face.nose_length - 0.012
    side = np.abs(x)
    sign = np.tanh(x / 0.02)  # soft, or the two sides meet in a visible edge
    slope_x, slope_y = np.zeros_like(x), np.zeros_like(x)
    # (height, x, y, half width, half height); those off the middle stand on both sides.
    for height, at_x, at_y, wide, high in (
        (0.0075, 0.0, 0.05, 0.019, 0.042),
        (0.0125, 0.0, tip, 0.5 * face.nose_width, 0.019),
        (0.0045, 0.7 * face.nose_width, tip + 0.008, 0.012, 0.012),
        (0.0100, 0.125, 0.105, 0.05, 0.045),
        (-0.0110, face.eye_gap - 0.01, 0.0, 0.05, 0.028),
        (0.0035, 0.09, -0.06, 0.06, 0.018),
        (0.0050, 0.0, MOUTH_LINE, 0.05, 0.03),
        (-0.0040, 0.0, MOUTH_LINE + 0.045, 0.032, 0.012),
        (0.0075, 0.0, MOUTH_LINE + 0.095, 0.04, 0.03),
    ):
        across, sense = (side - at_x, sign) if at_x else (x, 1.0)
        bump = height * np.exp(-0.5 * ((across / wide) ** 2 + ((y - at_y) / high) ** 2))
        slope_x -= bump * across * sense / wide**2
        slope_y -= bump * (y - at_y) / high**2
    return slope_x, slope_y


def _depth(x: Points, y: Points) -> Points:
    """Returns the ellipsoid's depth, 1 at the front and 0 at and beyond the outline."""
    return np.sqrt(np.clip(1.0 - (x / _HEAD[0]) ** 2 - ((y - _HEAD_CENTRE) / _HEAD[1]) ** 2, 0.0, 1.0))


def _fine(frequency: Field | float, size: int) -> Field:
    """Returns how much of a wave of `frequency` radians per side a field of `size` can hold without aliasing."""
    return np.exp(-np.square(np.asarray(frequency, dtype=np.float32) / (1.4 * size)))


def _bump(x: Field, y: Field, at_x: float, at_y: float, wide: float, high: float) -> Field:
    return np.exp(-0.5 * (((x - at_x) / wide) ** 2 + ((y - at_y) / high) ** 2))


def _step(value: Field | Points, edge: float, softness: float) -> Field:
    """Returns 1 where value is below `edge`, 0 above, smooth between."""
    return (0.5 - 0.5 * np.tanh((value - edge) / softness)).astype(np.float32)


def _rgb(red: float, green: float, blue: float) -> Field:
    return np.array((red, green, blue), dtype=np.float32)


def _blend(first: Field, second: Field, share: Field) -> Field:
    return first * (1.0 - share[..., None]) + second * share[..., None]
