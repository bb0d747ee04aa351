"""What the discriminators of several papers share: how they are called, and the pyramid of levels that can grow."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import nn

from stylepipe.networks.head import DiscriminatorHead, HeadOptions, Judgement, label_mapping
from stylepipe.networks.layers import Conv2d, to_channels_last
from stylepipe.networks.levels import LOWEST_RES, Levels, used_modules
from stylepipe.networks.spectral import add_spectral_norm_


class JudgingNetwork(nn.Module):
    """A discriminator: `judge` tells all that it makes of images, a call the logits.

    Attributes:
        config: keyword arguments that make another of its kind.
        resolutions: of the images that it can take, ascending.
    """

    config: dict[str, Any]
    resolutions: list[int]

    @abstractmethod
    def judge(self, img: torch.Tensor, c: torch.Tensor | None = None, alpha: torch.Tensor | None = None) -> Judgement:
        """Return all that the last block says of the images.

        Args:
            img: [N, img_channels, R, R] float32, R a resolution of this network; the full one unless it grows.
            c: [N, c_dim] float32.
            alpha: [] float32, how far the first level that sees the image is faded in, the next seeing it at half the
                size; None: wholly.

        Raises:
            ValueError: images of another size, or an `alpha` where nothing grows.
        """

    @abstractmethod
    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that see an image of `res` pixels."""

    def forward(
        self, img: torch.Tensor, c: torch.Tensor | None = None, alpha: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits [N, 1] float32 of `judge`."""
        return self.judge(img, c, alpha).logits


class PyramidDiscriminator(JudgingNetwork):
    """Judges images through blocks of halving resolution, down to the head at 4 px.

    One that grows (Karras et al. 2018, arXiv:1710.10196, section 2) takes images of any of its resolutions; each has a
    fromRGB of its own.
    """

    def __init__(
        self,
        levels: Levels,
        make_block: Callable[[Conv2d | None, int], nn.Module],
        *,
        img_channels: int,
        architecture: str,
        grows: bool,
        spectral_norm: bool,
        **head: Unpack[HeadOptions],
    ) -> None:
        """Build with random weights from torch's default generator.

        Args:
            levels: channels and types by resolution.
            make_block: makes the layers of a resolution above 4 px, given its fromRGB; they have a `dtype` and map
                activations [N, C, res, res] to [N, C', res / 2, res / 2].
            img_channels: colours.
            architecture: skip, where every level sees the image, or any other.
            grows: take images of lower resolutions too.
            spectral_norm: divide all weights by their largest singular value (Miyato et al. 2018, arXiv:1802.05957).
            head: options of the last block and of labels; `conv_clamp` holds for fromRGB too.
        """
        super().__init__()
        self.resolutions, self.grows, self.architecture = levels.resolutions, grows, architecture

        def fromrgb(r: int) -> Conv2d | None:
            if architecture == "skip" or grows or r == levels.res:
                return Conv2d(img_channels, levels.channels[r], 1, act="lrelu", conv_clamp=head.get("conv_clamp"))
            return None

        for r in reversed(levels.resolutions[1:]):
            self.add_module(f"b{r}", make_block(fromrgb(r), r))
        lowest = levels.channels[LOWEST_RES]
        self.mapping = label_mapping(head.get("c_dim", 0), head.get("conditioning", "projection"), lowest)
        self.b4 = DiscriminatorEpilogue(fromrgb(LOWEST_RES), lowest, **head)
        if spectral_norm:
            add_spectral_norm_(self)

    @abstractmethod
    def downsample(self, img: torch.Tensor) -> torch.Tensor:
        """Return img [N, C, H, W] at half the size, as the levels below see it."""

    @abstractmethod
    def upsample(self, img: torch.Tensor) -> torch.Tensor:
        """Return img [N, C, H, W] at twice the size, as the generator of the same paper enlarges it."""

    def judge(self, img: torch.Tensor, c: torch.Tensor | None = None, alpha: torch.Tensor | None = None) -> Judgement:
        """See JudgingNetwork."""
        res, full = img.shape[-1], self.resolutions[-1]
        if img.ndim != 4 or img.shape[2] != res or (res != full and not (self.grows and res in self.resolutions)):
            smaller = " or a smaller power of two" if self.grows else ""
            raise ValueError(f"img of shape {list(img.shape)}: expected [N, C, {full}, {full}]{smaller}")
        img = to_channels_last(img, torch.promote_types(img.dtype, torch.float32))
        x: torch.Tensor | None = None
        for r in reversed([r for r in self.resolutions[1:] if r <= res]):
            block: Any = self.get_submodule(f"b{r}")
            x = block(self._enter(r, x, img, block.dtype))
            fades = alpha is not None and r == res
            if fades or self.architecture == "skip":
                img = self.downsample(img)
            if fades:
                assert alpha is not None
                x = self._faded(r // 2, x, img, alpha)
        cmap = None if self.mapping is None else self.mapping(None, c)
        judgement: Judgement = self.b4(self._enter(LOWEST_RES, x, img, img.dtype), cmap)
        return judgement

    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that see an image of `res` pixels."""
        seen = {r for r in self.resolutions if r == res or (r < res and self.architecture == "skip")}
        modules = used_modules(
            self, reversed(self.resolutions), res, "fromrgb", seen | ({res // 2} if fading else set())
        )
        return modules if self.mapping is None else [*modules, self.mapping]

    def at_half(self, img: torch.Tensor) -> torch.Tensor:
        """Return img [N, C, H, W] without what a level of half its size has not."""
        return self.upsample(self.downsample(img))

    def _enter(self, res: int, x: torch.Tensor | None, img: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the input of a level in its type: x, the image's features, or their sum."""
        if x is not None and self.architecture != "skip":
            return to_channels_last(x, dtype)
        features = to_channels_last(self._fromrgb(res, img), dtype)
        return features if x is None else to_channels_last(x, dtype) + features

    def _faded(self, res: int, x: torch.Tensor, img: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """Fade x, of the level above, into what the level of `res` pixels would make of the image without it.

        In float32, which rounds neither, so that alpha 0 and 1 are exact.
        """
        x = to_channels_last(x, img.dtype)
        if self.architecture == "skip":
            return x * alpha  # the image's features are added anyway
        return self._fromrgb(res, img).lerp(x, alpha)

    def _fromrgb(self, res: int, img: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = getattr(self, f"b{res}").fromrgb(img)  # in float32
        return features


class DiscriminatorEpilogue(DiscriminatorHead):
    """The head, and the fromRGB of images that come in at 4 px."""

    def __init__(self, fromrgb: Conv2d | None, channels: int, **options: Unpack[HeadOptions]) -> None:
        super().__init__(channels, **options)
        self.fromrgb = fromrgb
