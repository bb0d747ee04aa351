"""DiffAugment: colour, translation and cutout (Zhao et al. 2020, arXiv:2006.10738), a light alternative to ADA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stylepipe.augment.corrupt import cut_out

MAX_SHIFT_SHARE = 0.125
_KINDS = 3  # colour, translation, cutout


class DiffAugment(nn.Module):
    """Augments images by given draws; called as AdaPipeline is, and as pure a function.

    In this order: brightness +-0.5, saturation x 0..2 about each pixel's mean, contrast x 0.5..1.5 about the image's;
    translation by up to 1/8 of the side in whole pixels, zeros moving in; a square of half the side set to 0.
    With p = 1, as in the paper, all are applied to every image; else each of the three kinds with probability p.

    Args:
        res: R, side of the images in pixels.

    Attributes:
        num_uniform, num_normal: numbers that one image needs.
        needs_noise: whether images also need noise of their own size.
    """

    num_uniform = _KINDS + 7
    num_normal = 0
    needs_noise = False

    def __init__(self, res: int) -> None:
        super().__init__()
        self.res = res

    def forward(self, img: Tensor, p: Tensor, uniform: Tensor, normal: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the augmented images.

        Args:
            img: [N, C, R, R] float32 in [-1, 1], contiguous or channels_last.
            p: [] float32 in [0, 1], on img's device.
            uniform: [N, num_uniform] float32 in [0, 1).
            normal, noise: not used.

        Returns:
            [N, C, R, R] float32 in img's memory format. Colours may leave [-1, 1].
        """
        channels_last = img.is_contiguous(memory_format=torch.channels_last) and not img.is_contiguous()
        color, translation, cutout = (uniform[:, :_KINDS] < p).to(img.dtype).unbind(1)
        brightness, saturation, contrast, x, y, cut_x, cut_y = uniform[:, _KINDS:].unbind(1)
        img = self._colored(img, color, brightness, saturation, contrast)
        img = self._translated(img, translation, x, y)
        img = cut_out(img, cutout, cut_x, cut_y)
        return img.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def _colored(
        self, img: Tensor, happens: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor
    ) -> Tensor:
        shift = (happens * (brightness - 0.5))[:, None, None, None]
        chroma = (happens * (2 * saturation - 1))[:, None, None, None]  # what is added of each, so that 0 adds nothing
        more = (happens * (contrast - 0.5))[:, None, None, None]
        img = img + shift
        img = img + chroma * (img - img.mean(dim=1, keepdim=True))
        return img + more * (img - img.mean(dim=(1, 2, 3), keepdim=True))

    def _translated(self, img: Tensor, happens: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Turn rows and columns round, then clear those that came in on the other side."""
        most = int(self.res * MAX_SHIFT_SHARE + 0.5)
        place = torch.arange(self.res, device=img.device)
        within = []
        for dim, share in ((2, y), (3, x)):
            shift = (happens * ((share * (2 * most + 1)).floor() - most)).long()
            source = place - shift[:, None]  # [N, R]
            wide = source.remainder(self.res)[:, None].unsqueeze(5 - dim)
            img = img.gather(dim, wide.expand(img.shape))
            within.append((source >= 0) & (source < self.res))
        rows, columns = within
        return img.masked_fill(~(rows[:, None, :, None] & columns[:, None, None, :]), 0)
