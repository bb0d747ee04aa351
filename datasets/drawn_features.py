"""The face itself: neck, ears, head, nose, mouth, eyes, brows, each drawn by one function.

Face coordinates: the origin lies between the eyes, x points right, y down, the unit is the side of the picture.
A `lean` of -1 or 1 says which of a pair is meant.
"""

import numpy as np

from stylepipe.datasets.drawn_canvas import Mask, Points, curve, ellipse, mirrored, points, shifted, stroke
from stylepipe.datasets.drawn_portrait import DARK, WHITE, Portrait
from stylepipe.datasets.drawn_shading import MOUTH_LINE, shadow_of
from stylepipe.datasets.drawn_traits import Face, mix, scaled


def draw_neck(p: Portrait) -> None:
    """Draws the neck, the chin's shadow on it, and the collar bones."""
    face = p.face
    width = 0.128 - 0.022 * face.feminine
    side = points(
        (width - 0.01, 0.18), (width - 0.006, 0.36), (width + 0.02, 0.45), (width + 0.12, 0.52), (width + 0.1, 0.7)
    )
    neck = p.fill(mirrored(curve(side, closed=False)), shadow_of(face.skin, 0.30))
    away = p.shadow_side
    p.fill(ellipse(0.75 * away * width, 0.42, 0.06, 0.2), p.skin_shadow, 0.5 * face.contrast, 0.03, within=neck)
    p.fill(ellipse(-0.08 * face.light[0], 0.36, 0.17, 0.085), p.skin_shadow, 0.85 * face.contrast, 0.028, within=neck)
    for lean in (-1.0, 1.0):  # collar bones
        bone = curve(points((0.025 * lean, 0.53), (0.08 * lean, 0.505), (0.16 * lean, 0.498)), closed=False)
        p.fill(stroke(bone, 0.014), p.skin_shadow, 0.35, 0.006, within=neck)


def draw_ears(p: Portrait) -> None:
    """Draws ears and earrings where no hair or scarf covers them."""
    face = p.face
    if face.hair_style in ("long", "bob", "afro") or face.hat == "scarf":
        return  # covered
    for lean in (-1.0, 1.0):
        x = 0.222 * face.cheek * lean
        ear = points((0.0, -0.045), (0.028, -0.05), (0.04, -0.015), (0.030, 0.035), (0.014, 0.072), (-0.006, 0.06))
        mask = p.fill(shifted(curve(ear * (lean, 1.0)), x, 0.02), p.skin)
        p.fill(ellipse(x + 0.012 * lean, 0.02, 0.009, 0.028, -0.15 * lean), p.skin_shadow, 0.6, 0.005, within=mask)
        rim = points((0.008, -0.02), (0.022, -0.028), (0.028, -0.005), (0.02, 0.035)) * (lean, 1.0)
        p.fill(stroke(shifted(curve(rim, False), x, 0.02), 0.006), p.skin_shadow, 0.5, 0.003, within=mask)
        if face.earrings:
            p.fill(ellipse(x + 0.014 * lean, 0.1, 0.011, 0.011), face.earrings)
            p.fill(ellipse(x + 0.011 * lean, 0.097, 0.004, 0.004), WHITE, 0.8)


def draw_head(p: Portrait) -> None:
    """Draws the head with its shaded skin, then wrinkles and freckles."""
    p.head = p.fill(_head_outline(p.face), p.skin)
    if p.face.age > 0.3:
        _wrinkles(p)
    if p.face.freckles:
        _freckles(p)


def _head_outline(face: Face) -> Points:
    side = points(
        (0.0, -0.325),
        (0.11, -0.305),
        (0.195, -0.22),
        (0.222, -0.09),
        (0.222 * face.cheek, 0.05),
        (0.201 * face.jaw + 0.012, 0.175),
        (0.159 * face.jaw, 0.278),
        (0.080 * face.chin, 0.354),
        (0.0, 0.372),
    )
    return curve(mirrored(side))


def _freckles(p: Portrait) -> None:
    face = p.face
    tone = shadow_of(face.skin, 0.7)
    spread = np.arange(56)
    # A golden-ratio lattice is evenly spread and yet looks scattered.
    across, down = (0.7549 * spread + face.strands[0]) % 1.0, (0.5698 * spread + face.strands[1]) % 1.0
    x = 0.16 * (2.0 * across - 1.0)
    for at, (left, height) in enumerate(zip(x, 0.045 + 0.11 * down - 0.25 * np.abs(x) ** 1.5, strict=True)):
        size = 0.0022 + 0.0016 * ((0.618 * at) % 1.0)
        p.fill(ellipse(left, height, size, size), tone, 0.55 * face.freckles, 0.0012, within=p.head)


def _wrinkles(p: Portrait) -> None:
    face = p.face
    depth = 0.45 * (face.age - 0.3) / 0.7
    tone = p.skin_shadow
    for lean in (-1.0, 1.0):
        fold = points((0.048, 0.13), (0.075, 0.165), (0.088, 0.205), (0.088, 0.235))
        p.fill(stroke(curve(fold * (lean, 1.0), False), 0.012), tone, depth + 0.1, 0.005, within=p.head)
        bag = points((-0.042, 0.038), (0.0, 0.052), (0.042, 0.042)) * (lean, 1.0)
        p.fill(stroke(shifted(curve(bag, False), lean * face.eye_gap, 0.0), 0.011), tone, depth, 0.005, within=p.head)
    for height in (-0.175, -0.142) if face.age > 0.55 else ():
        line = points((-0.09, height + 0.008), (0.0, height), (0.09, height + 0.008))
        p.fill(stroke(curve(line, False), 0.008), tone, 0.8 * depth, 0.004, within=p.head)


def draw_nose(p: Portrait) -> None:
    """Draws the nose as light does: a shaded flank, a cast shadow, wings, nostrils, a spot of gloss."""
    face = p.face
    tip, wide = face.nose_length, face.nose_width
    away = p.shadow_side
    tone = p.skin_shadow
    strength = face.contrast * min(1.0, 0.35 + abs(face.light[0]))
    cast = ellipse(away * 0.6 * wide - 0.01 * face.light[0], tip + 0.028, 0.9 * wide, 0.014)
    p.fill(cast, tone, 0.5 * strength, 0.010, within=p.head)
    flank = points((0.018, -0.01), (0.016, 0.04), (0.55 * wide, tip - 0.015)) * (away, 1.0)
    p.fill(stroke(curve(flank, False), 0.018), tone, 0.3 * strength, 0.008, within=p.head)
    base = points(
        (-1.05, -0.008), (-0.8, 0.012), (-0.32, 0.011), (0.0, 0.018), (0.32, 0.011), (0.8, 0.012), (1.05, -0.008)
    )
    base = shifted(curve(base * (wide, 1.0), False), 0.0, tip + 0.002)
    p.fill(stroke(base, 0.009, 0.1, 0.1), tone, 0.55, 0.003, within=p.head, lift=0.3)
    for lean in (-1.0, 1.0):
        nostril = ellipse(0.5 * wide * lean, tip + 0.008, 0.32 * wide, 0.0062, 0.25 * lean)
        p.fill(nostril, shadow_of(tone), 0.85, 0.002, within=p.head, lift=0.3)
    p.fill(ellipse(-0.012 * away, tip - 0.018, 0.011, 0.009), WHITE, 0.28, 0.006, within=p.head, lift=0.35)


def draw_mouth(p: Portrait) -> None:
    """Draws lips, closed or open over teeth, and the shadows around them."""
    face = p.face
    wide, gap = face.mouth_width, face.mouth_open
    t = np.linspace(-1.0, 1.0, 33)
    round_ = 1.0 - t * t
    corner = MOUTH_LINE + 0.004 - 0.025 * face.smile * (1.0 - round_) + 0.006 * face.smile
    x = wide * t
    bow = 0.006 * np.exp(-((t / 0.16) ** 2)) - 0.003 * np.exp(-(((np.abs(t) - 0.3) / 0.2) ** 2))
    seam_top = corner - 0.35 * gap * round_ + 0.003 * np.exp(-((t / 0.2) ** 2))
    seam_low = corner + 0.65 * gap * round_
    top = seam_top - face.upper_lip * round_**0.7 + bow * (face.upper_lip / 0.014)
    low = seam_low + face.lower_lip * round_**0.75

    def between(upper: Points, lower: Points) -> Points:
        return np.concatenate((np.stack((x, upper), 1), np.stack((x, lower), 1)[::-1]))

    below = ellipse(0.0, MOUTH_LINE + 0.65 * gap + face.lower_lip + 0.016, 0.6 * wide, 0.010)
    p.fill(below, p.skin_shadow, 0.55, 0.010, within=p.head)
    p.fill(between(top, seam_top + 0.001), scaled(face.lip, 0.88), 1.0, 0.0014)
    lower = p.fill(between(seam_low - 0.001, low), face.lip, 1.0, 0.0014)
    gloss = ellipse(-0.012 * p.shadow_side, seam_low[16] + 0.5 * face.lower_lip, 0.38 * wide, 0.25 * face.lower_lip)
    p.fill(gloss, WHITE, 0.30, 0.005, within=lower)
    if gap:
        inside = p.fill(between(seam_top, seam_low), (0.22, 0.06, 0.07))
        p.fill(ellipse(0.0, seam_low[16], 0.5 * wide, 0.4 * gap), (0.70, 0.32, 0.33), 0.8, 0.003, within=inside)
        teeth = np.minimum(seam_top + 0.62 * gap * round_**0.5 + 0.002, seam_low + 0.002)
        p.fill(between(seam_top - 0.002, teeth), (0.95, 0.93, 0.89), 1.0, 0.001, within=inside)
        p.fill(between(seam_top - 0.002, seam_top + 0.18 * gap), DARK, 0.3, 0.003, within=inside)
    else:
        seam = np.stack((x, corner + 0.002 * np.exp(-((t / 0.2) ** 2))), 1)
        p.fill(stroke(seam, 0.0075, 0.35, 0.35), shadow_of(shadow_of(face.lip)), 0.9)
    for lean in (-1.0, 1.0):
        p.fill(ellipse(lean * (wide + 0.004), corner[0], 0.009, 0.010), p.skin_shadow, 0.4, 0.007, within=p.head)


def draw_eyes(p: Portrait) -> None:
    """Draws both eyes."""
    for lean in (-1.0, 1.0):
        _eye(p, lean)


def _eye(p: Portrait, lean: float) -> None:
    face = p.face
    wide, high = face.eye_width, face.eye_height
    t = np.linspace(-1.0, 1.0, 15)  # from the inner corner to the outer
    x = lean * (face.eye_gap + wide * t)
    axis = -face.eye_slant * wide * 0.5 * (t + 1.0) + 0.4 * face.eye_slant * wide
    upper = np.stack((x, axis - high * (1.0 - np.abs(t + 0.08 * (1 - t * t)) ** 2.3)), 1)
    lower = np.stack((x, axis + (0.62 - 0.12 * face.smile) * high * (1.0 - (t - 0.1 * (1 - t * t)) ** 2)), 1)
    opening = np.concatenate((upper, lower[::-1]))
    tone = p.skin_shadow

    lid = ellipse(lean * face.eye_gap, -0.9 * high, 1.05 * wide, 0.9 * high)
    p.fill(lid, face.eyeshadow or tone, 0.6 if face.eyeshadow else 0.32, 0.010, within=p.head)
    white = p.fill(opening, (0.93, 0.91, 0.90))
    _iris(p, lean, white)
    shade = np.concatenate((shifted(upper, 0.0, -0.01), shifted(upper[::-1], 0.0, 0.42 * high)))
    p.fill(shade, DARK, 0.40, 0.005, within=white)
    p.fill(stroke(lower[1:], 0.0055, 0.3, 0.5), shadow_of(tone, 0.5), 0.6)
    crease = upper - np.stack((np.zeros(15), 0.006 + 0.009 * (1 - t * t)), 1)
    p.fill(stroke(crease, 0.006, 0.1, 0.3), tone, 0.8, 0.002, within=p.head)
    lash = np.concatenate((upper, shifted(upper[-1:], lean * 0.012 * face.lashes, -0.009 * face.lashes)))
    p.fill(stroke(lash, 0.007 + 0.0055 * face.lashes, 0.35, 0.15, 0.7), DARK, 0.92)


def _iris(p: Portrait, lean: float, white: Mask) -> None:
    face = p.face
    x, y = lean * face.eye_gap + 0.012 * face.gaze[0], -0.08 * face.eye_height + 0.005 * face.gaze[1]
    radius = 0.0245
    p.fill(ellipse(x, y, radius, radius), scaled(face.iris, 0.42), within=white)
    p.fill(ellipse(x, y, 0.86 * radius, 0.86 * radius), face.iris, 1.0, 0.002, within=white)
    glow = ellipse(x, y + 0.45 * radius, 0.6 * radius, 0.4 * radius)
    p.fill(glow, mix(face.iris, WHITE, 0.38), 0.55, 0.005, within=white)
    p.fill(ellipse(x, y, 0.44 * radius, 0.44 * radius), DARK, within=white)
    spark = -0.009 * p.shadow_side
    p.fill(ellipse(x + spark, y - 0.009, 0.0062, 0.0062), WHITE, 0.95, within=white)
    p.fill(ellipse(x - 0.8 * spark, y + 0.010, 0.003, 0.003), WHITE, 0.5, within=white)


def draw_brows(p: Portrait) -> None:
    """Draws both brows as tapered strokes."""
    face = p.face
    for lean in (-1.0, 1.0):
        y = -face.brow_height
        arc = points(
            (0.045, y + 0.004 - face.brow_lift),
            (0.08, y - 0.5 * face.brow_arch - 0.5 * face.brow_lift),
            (0.125, y - face.brow_arch),
            (0.172, y + 0.014),
        )
        brow = stroke(curve(arc * (lean, 1.0), False), face.brow_width, 0.55, 0.1, 0.35)
        p.fill(brow, face.brow_colour, 0.88, 0.0025, within=p.head)
