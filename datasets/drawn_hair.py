"""Hair and beard of a drawn face."""

import numpy as np

from stylepipe.datasets.drawn_canvas import Mask, Paint, Points, curve, ellipse, mirrored, points, shifted
from stylepipe.datasets.drawn_portrait import DARK, Portrait
from stylepipe.datasets.drawn_shading import MOUTH_LINE
from stylepipe.datasets.drawn_traits import Face, mix


def draw_back_hair(p: Portrait) -> None:
    """Draws the hair behind neck and head."""
    face = p.face
    volume = face.hair_volume
    if face.hair_style == "bun":
        knot = ellipse(0.2 * face.hair_part, -0.375 - 0.02 * volume, 0.095 + 0.02 * volume, 0.075 + 0.015 * volume)
        p.fill(knot, p.hair)
    if face.hair_style == "tied":
        lean = 1.0 if face.hair_part > 0.0 else -1.0
        tail = points((0.15, 0.0), (0.225, 0.12), (0.235, 0.3), (0.2, 0.5), (0.15, 0.62), (0.12, 0.45), (0.1, 0.2))
        p.fill(curve(tail * (lean, 1.0)), p.hair)
    if face.hair_style == "afro":
        cloud = ellipse(0.0, -0.10, 0.30 + 0.045 * volume, 0.275 + 0.045 * volume)[::2]
        p.fill(_curled(face, curve(cloud, steps=24)), p.hair)
    if face.hair_style in ("long", "bob"):
        end = _hair_end(face)
        wide = 0.25 + 0.03 * volume
        wave = 0.02 * face.hair_wave
        side = points(
            (0.0, -0.3),
            (wide - 0.09, -0.2),
            (wide - 0.02, 0.0),
            (wide + wave, 0.35 * end),
            (wide - wave, 0.7 * end),
            (wide + wave - 0.02, end),
            (0.15, end + 0.02),
            (0.0, end - 0.02),
        )
        back = p.fill(curve(mirrored(side)), p.hair)
        p.fill(ellipse(0.0, 0.22, 0.2, 0.3), DARK, 0.5, 0.04, within=back)


def draw_front_hair(p: Portrait) -> None:
    """Draws the hair over skull and forehead, and its shadow on the skin."""
    face = p.face
    if face.hair_style == "bald":
        return
    cap = _curled(face, curve(_cap(face), steps=24 if face.hair_style in ("curly", "afro") else 7))
    soft = {"buzz": 0.003, "short": 0.0012}.get(face.hair_style, 0.0)
    p.fill(shifted(cap, 0.0, 0.012), p.skin_shadow, 0.5 * face.contrast, 0.012, within=p.head)
    p.fill(cap, p.hair, 0.85 if face.hair_style == "buzz" else 1.0, soft)


def _cap(face: Face) -> Points:
    """Returns the outline of the hair in front: over the skull, down the sides, back along the hairline."""
    volume, part, end = face.hair_volume, face.hair_part, _hair_end(face)
    puff = {"buzz": 0.002, "short": 0.022, "quiff": 0.022, "curly": 0.045, "afro": 0.055, "bun": 0.012, "tied": 0.012}
    out = puff.get(face.hair_style, 0.03) * volume
    tuft = 0.034 * volume if face.hair_style == "quiff" else 0.0
    long = face.hair_style in ("long", "bob")
    wave = 0.022 * face.hair_wave if face.hair_style == "long" else 0.0
    low = face.hairline + face.fringe * (-0.085 - face.hairline) if long else face.hairline  # down to the brows
    crown = points(
        (-0.228 - out, -0.09),
        (-0.203 - out, -0.215 - 0.3 * out),
        (-0.126 - 0.4 * out, -0.313 - 0.6 * out - tuft * (0.75 - 4.0 * part)),
        (-0.3 * part, -0.346 - out - tuft),
        (0.126 + 0.4 * out, -0.313 - 0.6 * out - tuft * (0.75 + 4.0 * part)),
        (0.203 + out, -0.215 - 0.3 * out),
        (0.228 + out, -0.09),
    )
    tip = 0.222 + out
    if long:
        right = points(
            (tip + 0.012 + wave, 0.25 * end),
            (tip + 0.010 - wave, 0.5 * end),
            (tip + wave, 0.75 * end),
            (tip - wave - 0.005, end),
            (tip - 0.055, end + 0.01),
            (0.185 + wave, 0.75 * end),
            (0.197 - wave, 0.5 * end),
            (0.202, 0.25 * end),
        )
    else:
        right = points((0.226 + out, 0.5 * end), (0.220, end), (0.206, end))
    # Long hair falls from a parting, short hair lies along the hairline.
    fall = 1.0 - face.fringe if long else 0.0
    peak, drop = 0.002 + 0.020 * fall, 0.035 * fall
    hairline = points(
        (0.197, -0.055),
        (0.188, 0.4 * low - 0.05 + 0.5 * drop),
        (0.160, low + 0.030 + drop),
        (0.092 + 0.5 * part, low + 0.4 * drop),
        (part, low - peak),
        (-0.092 + 0.5 * part, low + 0.4 * drop),
        (-0.160, low + 0.030 + drop),
        (-0.188, 0.4 * low - 0.05 + 0.5 * drop),
        (-0.197, -0.055),
    )
    left = right[::-1] * (-1.0, 1.0)
    return np.concatenate((crown, right, hairline, left))


def _hair_end(face: Face) -> float:
    """Returns the height at which the hair ends at the sides of the face."""
    if face.hair_style == "long":
        return 0.42 + 0.3 * face.hair_length
    if face.hair_style == "bob":
        return 0.16 + 0.14 * face.hair_length
    return {"curly": 0.02, "afro": 0.08, "bun": -0.02, "tied": -0.02, "buzz": 0.0}.get(face.hair_style, 0.015)


def _curled(face: Face, outline: Points) -> Points:
    """Ripples an outline as curls do; leaves straight styles alone."""
    size = {"curly": 0.012, "afro": 0.010}.get(face.hair_style, 0.0)
    if not size:
        return outline
    along = np.gradient(outline, axis=0)
    length = np.hypot(along[:, 0], along[:, 1])
    way = np.cumsum(length)
    ripple = size * np.abs(np.sin(50.0 * way + 1.3 * np.sin(17.0 * way + face.strands[1]) + face.strands[0]))
    ripple *= 0.75 + 0.35 * np.sin(23.0 * way + face.strands[2])
    outward = np.stack((along[:, 1], -along[:, 0]), 1) / np.maximum(length, 1e-6)[:, None]
    return outline + ripple[:, None] * outward


def draw_beard(p: Portrait) -> None:
    """Draws stubble, moustache, goatee or full beard."""
    face = p.face
    if face.stubble:
        _jaw_hair(p, 0.04, 0.45 * face.stubble, 0.016, mix(face.brow_colour, face.skin, 0.2), p.head)
    if face.beard == "full":
        _jaw_hair(p, -0.04, 0.96, 0.003, p.hair)
    if face.beard == "goatee":
        chin = points((0.0, MOUTH_LINE + 0.045), (0.05, MOUTH_LINE + 0.05), (0.075, 0.31), (0.05, 0.385), (0.0, 0.395))
        p.fill(curve(mirrored(chin)), p.hair, 0.95, 0.0035)
    if face.beard != "none":
        moustache = points(
            (0.0, MOUTH_LINE - 0.042),
            (0.05, MOUTH_LINE - 0.038),
            (0.088, MOUTH_LINE - 0.008),
            (0.100, MOUTH_LINE + 0.014),
            (0.070, MOUTH_LINE + 0.004),
            (0.0, MOUTH_LINE - 0.006),
        )
        p.fill(curve(mirrored(moustache)), p.hair, 0.95, 0.003)


def _jaw_hair(p: Portrait, start: float, opacity: float, blur: float, paint: Paint, within: Mask | None = None) -> None:
    """Covers jaw, chin and the mouth's surroundings with hair, from the height `start` at the ears down."""
    jaw, cheek = p.face.jaw, p.face.cheek
    side = points(
        (0.0, MOUTH_LINE - 0.04),
        (0.06, MOUTH_LINE - 0.045),
        (0.125, MOUTH_LINE - 0.035),
        (0.170 * cheek, 0.14),
        (0.198 * cheek, 0.5 * start + 0.04),
        (0.210 * cheek, start),
        (0.223 * cheek, 0.5 * start + 0.02),
        (0.207 * jaw + 0.012, 0.19),
        (0.168 * jaw, 0.295),
        (0.090, 0.380),
        (0.0, 0.402),
    )
    p.fill(curve(mirrored(side)), paint, opacity, blur, within=within)
