"""Things a drawn face wears: clothes, glasses, hats, scarves."""

import numpy as np

from stylepipe.datasets.drawn_canvas import Mask, Points, curve, ellipse, mirrored, points, shifted, stroke
from stylepipe.datasets.drawn_portrait import WHITE, Portrait
from stylepipe.datasets.drawn_traits import Colour, Face, mix, scaled

_SCARF = points(
    (0.0, -0.385),
    (0.15, -0.35),
    (0.25, -0.22),
    (0.275, 0.0),
    (0.265, 0.2),
    (0.3, 0.4),
    (0.36, 0.56),
    (0.2, 0.7),
    (0.0, 0.72),
)

_LENS = {"round": (0.072, 0.066), "square": (0.080, 0.056), "wide": (0.082, 0.048), "sun": (0.084, 0.062)}


def draw_clothes(p: Portrait) -> None:
    """Draws shoulders and the collar of one of four garments."""
    face = p.face
    dark = scaled(face.cloth, 0.55)
    neckline = _neckline(face)
    throat, rim = neckline[-1]
    broad = 0.40 - 0.05 * face.feminine
    side = points(
        (throat, rim),
        (throat + 0.05, 0.425),
        (broad - 0.06, 0.468),
        (broad + 0.04, 0.525),
        (broad + 0.09, 0.7),
        (broad + 0.11, 1.0),
    )
    outline = np.concatenate((curve(neckline, closed=False), curve(side, closed=False)[1:]))
    cloth = p.fill(mirrored(outline), face.cloth)
    away = p.shadow_side
    p.fill(ellipse(0.42 * away, 0.62, 0.22, 0.2), dark, 0.6 * face.contrast, 0.06, within=cloth)
    p.fill(ellipse(-0.26 * away, 0.5, 0.14, 0.04, -0.4 * away), WHITE, 0.16, 0.035, within=cloth)
    p.fill(ellipse(0.0, 0.44, 0.2, 0.07), dark, 0.5, 0.03, within=cloth)
    if face.clothes == "turtle":
        fold = curve(points((-0.1, 0.455), (-0.05, 0.472), (0.0, 0.476), (0.05, 0.472), (0.1, 0.455)), closed=False)
        p.fill(stroke(fold, 0.014), dark, 0.6, 0.006, within=cloth)
    elif face.clothes == "shirt":
        _collar(p, neckline, cloth)
    else:
        edge = curve(np.concatenate((neckline[:0:-1] * (-1.0, 1.0), neckline)), closed=False)
        p.fill(stroke(edge, 0.03, 1.0, 1.0), face.cloth_accent if face.clothes == "crew" else dark, 0.75, within=cloth)


def _neckline(face: Face) -> Points:
    """Returns the right half of the neckline, from its lowest point to where it meets the shoulder."""
    low = {"crew": 0.45, "vneck": 0.52, "shirt": 0.475, "turtle": 0.395}[face.clothes]
    throat, rim = (0.122, 0.362) if face.clothes == "turtle" else (0.145, 0.405)
    throat -= 0.02 * face.feminine
    if face.clothes == "vneck":
        return points((0.0, low), (0.5 * throat, low - 0.35 * (low - rim)), (throat, rim))
    return points((0.0, low), (0.45 * throat, low - 0.012), (0.82 * throat, low - 0.6 * (low - rim)), (throat, rim))


def _collar(p: Portrait, neckline: Points, cloth: Mask) -> None:
    low, (throat, rim) = neckline[0, 1], neckline[-1]
    right = points((0.0, low), (0.9 * throat, rim - 0.035), (throat + 0.035, rim + 0.012), (0.1, low + 0.075))
    for lean in (-1.0, 1.0):
        wing = right * (lean, 1.0)
        p.fill(shifted(wing, 0.0, 0.008), scaled(p.face.cloth, 0.55), 0.6, 0.008, within=cloth)
        p.fill(wing, mix(p.face.cloth, WHITE, 0.25))


def draw_glasses(p: Portrait) -> None:
    """Draws glasses or sunglasses."""
    face = p.face
    if face.glasses == "none":
        return
    wide, high = _LENS[face.glasses]
    power = 1.0 if face.glasses == "round" else 0.62
    ring = ellipse(0.0, 0.0, 1.0, 1.0)
    ring = np.sign(ring) * np.abs(ring) ** power
    rim = 0.0065 if face.glasses != "square" else 0.0095
    for lean in (-1.0, 1.0):
        centre = (lean * (face.eye_gap + 0.004), 0.008)
        lens = shifted(ring * (wide, high), *centre)
        p.fill(shifted(lens, 0.0, 0.012), p.skin_shadow, 0.25, 0.010, within=p.head, lift=0.2)
        inner = shifted(ring * (wide - rim, high - rim), *centre)
        if face.glasses == "sun":
            p.fill(lens, (0.10, 0.09, 0.10), 0.9, lift=0.2)
        pane = p.canvas.mask(p.pose.place(lens, 0.2))
        glare = shifted(points((-0.5, -1.2), (-0.1, -1.2), (-0.55, 1.2), (-0.95, 1.2)) * (wide, high), *centre)
        p.fill(glare, WHITE, 0.16, 0.004, within=pane, lift=0.2)
        p.fill(lens, face.frame, lift=0.2, hole=inner)
        temple = points((centre[0] + lean * wide, -0.008), (lean * 0.226, -0.014))
        p.fill(stroke(temple, 0.010, 1.0, 1.0), face.frame, lift=0.2)
    near = face.eye_gap + 0.004 - wide
    bridge = curve(points((-near, 0.0), (0.0, -0.010), (near, 0.0)), closed=False)
    p.fill(stroke(bridge, 0.009, 0.9, 0.9), face.frame, lift=0.2)


def draw_scarf_back(p: Portrait) -> None:
    """Draws the inside of a head scarf, behind neck and head."""
    if p.face.hat == "scarf":
        p.fill(curve(mirrored(_SCARF)), scaled(p.face.hat_colour, 0.4))


def draw_hat(p: Portrait) -> None:
    """Draws a beanie or the front of a head scarf."""
    if p.face.hat == "beanie":
        _beanie(p)
    elif p.face.hat == "scarf":
        _scarf_front(p)


def _beanie(p: Portrait) -> None:
    colour = p.face.hat_colour
    dark = scaled(colour, 0.55)
    dome = points(
        (0.0, -0.415), (0.07, -0.412), (0.17, -0.36), (0.238, -0.25), (0.246, -0.14), (0.12, -0.155), (0.0, -0.16)
    )
    _rounded(p, p.fill(curve(mirrored(dome)), colour), dark)
    band = points((0.0, -0.225), (0.13, -0.21), (0.24, -0.175), (0.25, -0.105), (0.13, -0.138), (0.0, -0.15))
    band = curve(mirrored(band))
    p.fill(shifted(band, 0.0, 0.012), p.skin_shadow, 0.6, 0.010, within=p.head)
    rim = p.fill(band, mix(colour, WHITE, 0.22))
    for rib in np.linspace(-1.0, 1.0, 17):
        bend = points((0.235 * rib, -0.235 + 0.05 * rib**2), (0.25 * rib, -0.125 + 0.03 * rib**2))
        p.fill(stroke(bend, 0.007, 0.6, 0.6), dark, 0.4, 0.002, within=rim)
    _rounded(p, rim, dark)


def _scarf_front(p: Portrait) -> None:
    dark = scaled(p.face.hat_colour, 0.55)
    inner = points((0.0, 0.40), (0.1, 0.365), (0.178, 0.23), (0.2, 0.03), (0.188, -0.13), (0.11, -0.215), (0.0, -0.235))
    hole = curve(mirrored(inner))
    p.fill(stroke(np.concatenate((hole, hole[:1])), 0.03, 1.0, 1.0), p.skin_shadow, 0.55, 0.012, within=p.head)
    cloth = p.fill(curve(mirrored(_SCARF)), p.face.hat_colour, hole=hole)
    _rounded(p, cloth, dark)
    for lean, depth in ((1.0, 0.5), (-1.0, 0.35)):
        fold = points((0.2 * lean, 0.28), (0.1 * lean, 0.46), (-0.1 * lean, 0.56))
        p.fill(stroke(curve(fold, False), 0.03), dark, depth, 0.012, within=cloth)


def _rounded(p: Portrait, mask: Mask, dark: Colour) -> None:
    """Shades a worn thing as something round: dark away from the lamp, a soft light toward it."""
    x, y, _ = p.face.light
    p.fill(ellipse(0.32 * p.shadow_side, -0.05, 0.16, 0.45), dark, 0.7 * p.face.contrast, 0.05, within=mask)
    p.fill(ellipse(0.3 * x, -0.28 + 0.1 * y, 0.09, 0.07), WHITE, 0.18, 0.04, within=mask)
