"""Built-in training data: procedurally drawn faces, at any resolution, from nothing but (seed, index).

`draw_face` samples the traits of a face (drawn_traits) and renders them: each feature is a function that fills shapes
(drawn_canvas) into a `Portrait`, placed and lit by drawn_shading. The faces are aligned as FFHQ's crops are: eyes on
one line, at one distance. Most of what varies does so smoothly, so that a small GAN learns them within minutes.
"""

from PIL import Image, ImageChops

from stylepipe.datasets.drawn_features import (
    draw_brows,
    draw_ears,
    draw_eyes,
    draw_head,
    draw_mouth,
    draw_neck,
    draw_nose,
)
from stylepipe.datasets.drawn_hair import draw_back_hair, draw_beard, draw_front_hair
from stylepipe.datasets.drawn_portrait import Portrait
from stylepipe.datasets.drawn_shading import backdrop_field, wash_field
from stylepipe.datasets.drawn_traits import Face, sample_face
from stylepipe.datasets.drawn_worn import draw_clothes, draw_glasses, draw_hat, draw_scarf_back
from stylepipe.errors import UserError

_SMALLEST = 64  # smaller pictures are averaged from this one: below it, features are thinner than a pixel


def draw_face(index: int, resolution: int, seed: int = 0) -> Image.Image:
    """Draws face `index` of the collection `seed`: one face at every resolution, the same bytes in every process.

    Returns an RGB image of `resolution` x `resolution` pixels, 4 to 1024. Raises UserError outside that range and
    for a negative index or seed.
    """
    if not 4 <= resolution <= 1024:
        raise UserError(f"resolution {resolution}: drawn faces have 4 to 1024 pixels a side; choose one of these")
    if index < 0 or seed < 0:
        raise UserError(
            f"drawn face {index} of seed {seed}: both are counted from 0; choose numbers that are not negative"
        )
    image = render_face(sample_face(index, seed), max(resolution, _SMALLEST))
    return image if image.width == resolution else image.resize((resolution, resolution), Image.Resampling.BOX)


def render_face(face: Face, size: int) -> Image.Image:
    """Paints a face, back to front, on a canvas of `size` x `size` pixels (64 or more)."""
    portrait = Portrait(face, size)
    for feature in (
        _backdrop,
        draw_back_hair,
        draw_scarf_back,
        draw_neck,
        draw_clothes,
        draw_ears,
        draw_head,
        draw_beard,
        draw_nose,
        draw_mouth,
        draw_eyes,
        draw_brows,
        draw_glasses,
        draw_front_hair,
        draw_hat,
        _wash,
    ):
        feature(portrait)
    return portrait.canvas.image


def _backdrop(p: Portrait) -> None:
    p.canvas.image = p.canvas.enlarged(backdrop_field(p.face, min(p.canvas.size, 128)))


def _wash(p: Portrait) -> None:
    light = p.canvas.enlarged(wash_field(p.face, 64))
    p.canvas.image = ImageChops.multiply(p.canvas.image, Image.merge("RGB", (light, light, light)))
