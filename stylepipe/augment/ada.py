"""ADA's augmentations as one differentiable transform of a batch.

Karras et al. 2020, arXiv:2006.06676, section 3.1 and appendix B: blit, geometry, colour, image-space filter, noise,
cutout, in this order. Each is applied to an image with probability p times its strength, independently. Where none of a
kind is, the image passes through that kind unchanged to the bit, so that p = 0 is no augmentation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stylepipe.augment.color import apply_color, color_basis, color_matrix
from stylepipe.augment.columns import (
    CHANCES,
    NORMALS,
    UNIFORMS,
    Columns,
    happenings,
    normal_columns,
    uniform_columns,
)
from stylepipe.augment.corrupt import add_noise, band_gains, band_matrices, cut_out, filter_bands
from stylepipe.augment.geometry import inverse_geometry
from stylepipe.augment.pipelines import BLIT, COLOR, GEOMETRY, Strengths
from stylepipe.augment.warp import Warp
from stylepipe.errors import UserError

_MOVES = tuple(name for name, strength in CHANCES.items() if strength in BLIT + GEOMETRY)
_BANDS = tuple(name for name, strength in CHANCES.items() if strength == "imgfilter")


class AdaPipeline(nn.Module):
    """Augments images by given draws; a pure function, without branch or synchronisation, twice differentiable.

    A kind of augmentation whose strengths are all 0 costs nothing. It holds no parameters, and nothing to be saved.

    Args:
        strengths: of each augmentation.
        res: R, side of the images in pixels.
        channels: of the images.

    Attributes:
        num_uniform, num_normal: numbers that one image needs, whatever is on.
        needs_noise: whether images also need noise of their own size.

    Raises:
        UserError: colours of images that have neither 1 nor 3 channels.
    """

    strengths: Tensor
    twice: Tensor
    color_basis: Tensor
    bands: Tensor

    num_uniform = len(CHANCES) + len(UNIFORMS)
    num_normal = len(NORMALS)

    def __init__(self, strengths: Strengths, res: int, channels: int = 3) -> None:
        super().__init__()
        self.res = res
        self.moves = any(getattr(strengths, name) for name in BLIT + GEOMETRY)
        self.colors = any(getattr(strengths, name) for name in COLOR)
        self.filters, self.cuts = strengths.imgfilter > 0, strengths.cutout > 0
        self.needs_noise = strengths.noise > 0
        if self.colors and channels not in (1, 3):
            raise UserError(
                f"augmentation of colours: images have {channels} channels, expected 1 or 3; choose a pipeline without "
                f"colours, such as bg"
            )
        chances = torch.tensor([float(getattr(strengths, name)) for name in CHANCES.values()])
        self.register_buffer("strengths", chances, persistent=False)
        twice = torch.tensor([name == "rotate" for name in CHANCES.values()])
        self.register_buffer("twice", twice, persistent=False)
        if self.moves:
            self.warp = Warp(res)
        if self.colors:
            self.register_buffer("color_basis", color_basis(), persistent=False)
        if self.filters:
            self.register_buffer("bands", band_matrices(res), persistent=False)

    def forward(self, img: Tensor, p: Tensor, uniform: Tensor, normal: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the augmented images.

        Args:
            img: [N, C, R, R] float32 in [-1, 1], contiguous or channels_last.
            p: [] float32 in [0, 1], on img's device.
            uniform: [N, num_uniform] float32 in [0, 1).
            normal: [N, num_normal] float32, standard normal.
            noise: [N, C, R, R] float32, standard normal, if it is needed.

        Returns:
            [N, C, R, R] float32 in img's memory format. Colours, filter and noise may leave [-1, 1].
        """
        channels_last = img.is_contiguous(memory_format=torch.channels_last) and not img.is_contiguous()
        happens = happenings(uniform, p, self.strengths, self.twice)
        uniforms, normals = uniform_columns(uniform), normal_columns(normal)
        if self.moves:
            moved = self.warp(img, inverse_geometry(happens, uniforms, normals, self.res))
            img = _where_any(happens, _MOVES, moved, img)
        if self.colors:
            img = apply_color(img, *color_matrix(happens, uniforms, normals, self.color_basis))
        if self.filters:
            filtered = filter_bands(img, band_gains(happens, normals), self.bands)
            img = _where_any(happens, _BANDS, filtered, img)
        if self.needs_noise:
            assert noise is not None
            img = add_noise(img, noise, happens, normals)
        if self.cuts:
            img = cut_out(img, happens["cutout"], uniforms["cutout_x"], uniforms["cutout_y"])
        return img.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _where_any(happens: Columns, names: tuple[str, ...], yes: Tensor, no: Tensor) -> Tensor:
    """Choose for each image [N, C, H, W] by whether any of `names` happens to it."""
    any_of = torch.stack([happens[name] for name in names]).amax(dim=0) > 0
    return torch.where(any_of[:, None, None, None], yes, no)
