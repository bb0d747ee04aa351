"""What generators with styles share, whichever paper they are from: how they are called, levels and noise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from stylepipe.networks.levels import Levels
from stylepipe.networks.mapping import MappingNetwork


class Layer(Protocol):
    """A layer of a block, which takes a style and noise."""

    res: int
    noise_const: torch.Tensor


class Block(Protocol):
    """The layers of one resolution."""

    def layers(self) -> Any:
        """Return them, a list of Layer, in the order of their styles and noise."""
        ...


AnyBlock = TypeVar("AnyBlock", bound=Block)


class Synthesis(nn.Module, Generic[AnyBlock]):
    """Maps ws to images through blocks b4, b8, ... of doubling resolution.

    Called with
        ws: [N, num_ws, w_dim] float32.
        noise_mode: random (fresh, or taken from `noise`), const (the buffers noise_const) or none.
        noise: [N, noise_size(res)] float32 normal, used when noise_mode is random; None draws it here.
        res: size of the image while the network grows, by default the full one.
        alpha: [] float32, how far the last level is faded in over the enlarged image of the one before; None: wholly,
            unless the network says less.

    Attributes:
        num_ws: styles that one image takes. A smaller image takes the first of them.
        alpha: how far the last level is faded in, where a call says nothing else.
    """

    num_ws: int

    def __init__(self, levels: Levels, alpha: float, torgb_styles: int) -> None:
        super().__init__()
        self.resolutions, self.alpha, self._torgb_styles = levels.resolutions, alpha, torgb_styles

    @abstractmethod
    def used_at(self, res: int, fading: bool) -> list[nn.Module]:
        """Return the modules that an image of `res` pixels takes."""

    def blocks(self, res: int | None = None) -> list[AnyBlock]:
        """Return the blocks from 4 px up to `res`, by default all."""
        return [getattr(self, f"b{r}") for r in self.resolutions if res is None or r <= res]

    def num_ws_at(self, res: int) -> int:
        """Return how many of the styles an image of `res` pixels takes."""
        return sum(len(block.layers()) for block in self.blocks(res)) + self._torgb_styles

    def noise_size(self, res: int | None = None) -> int:
        """Return how many random numbers one image of `res` pixels takes, by default one of the full size."""
        return sum(layer.res**2 for block in self.blocks(res) for layer in block.layers())

    def prepared(
        self,
        ws: torch.Tensor,
        noise_mode: str,
        noise: torch.Tensor | None,
        res: int | None,
        alpha: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, Iterator[torch.Tensor | None]]:
        """Check a call; return the alpha that holds, and the noise of each layer, [N or 1, 1, r, r] or None."""
        if noise_mode not in ("random", "const", "none"):
            raise ValueError(f"noise_mode {noise_mode!r}: expected random, const or none")
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(f"ws of shape {list(ws.shape)}: expected [N, {self.num_ws}, w_dim]")
        if alpha is None and self.alpha < 1:
            alpha = torch.tensor(self.alpha, device=ws.device)
        if noise_mode == "random" and noise is None:
            noise = torch.randn(ws.shape[0], self.noise_size(res), device=ws.device)
        return alpha, self._noises(noise_mode, noise, res)

    def _noises(self, noise_mode: str, noise: torch.Tensor | None, res: int | None) -> Iterator[torch.Tensor | None]:
        first = 0
        for block in self.blocks(res):
            layer: Layer
            for layer in block.layers():
                if noise_mode == "random":
                    assert noise is not None
                    yield noise[:, first : first + layer.res**2].view(-1, 1, layer.res, layer.res)
                    first += layer.res**2
                else:
                    yield layer.noise_const[None, None] if noise_mode == "const" else None


class StyleGenerator(nn.Module):
    """Maps latents to images: `mapping(z, c) -> ws`, `synthesis(ws) -> img`, or both in one call."""

    config: dict[str, Any]
    mapping: MappingNetwork
    synthesis: Synthesis[Any]

    def take_dimensions(self) -> None:
        """Offer what users ask of a generator: z_dim, w_dim, c_dim and num_ws."""
        self.z_dim, self.w_dim, self.c_dim = (self.config[name] for name in ("z_dim", "w_dim", "c_dim"))
        self.num_ws = self.mapping.num_ws

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
    ) -> torch.Tensor:
        """Return img [N, img_channels, res, res] float32, about in [-1, 1], of z [N, z_dim] and c [N, c_dim]."""
        img: torch.Tensor = self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), noise_mode=noise_mode)
        return img
