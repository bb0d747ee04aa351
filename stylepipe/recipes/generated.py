"""Images of a trained generator, by number: the same on any number of processes, in any company."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.images import to_uint8
from stylepipe.training.draws import Draws

MEASURED_SEED = 0  # of the images that a training measures: the same for all runs, whatever their own seed

LabelsOf = Callable[[str, Sequence[int]], Tensor]
"""Draws labels for images: (purpose, numbers) -> [N, c_dim] float32 on the device."""


class GeneratedImages:
    """Draws latents, labels and noise for the image of each number, and makes it.

    Args:
        G: a generator in eval mode, with styles or without, on its device.
        draws: of latents and noise.
        labels_of: of labels; with none they are [N, 0].
        resolution: of the images.
        batch: how many to make at a time.
        truncation_psi: of a generator with styles; 1 for none, as published numbers have it.
        stage: what a growing generator is called with besides: res and alpha.
        checked: raise UserError where images are inf or NaN; else these are black.
    """

    def __init__(
        self,
        G: Any,
        draws: Draws,
        labels_of: LabelsOf,
        *,
        resolution: int,
        batch: int,
        truncation_psi: float = 1.0,
        stage: Mapping[str, Any] | None = None,
        checked: bool = False,
    ) -> None:
        self.G, self.resolution, self.batch, self.seed = G, resolution, batch, draws.seed
        self._draws, self._labels_of = draws, labels_of
        self._psi, self._stage, self._checked = truncation_psi, dict(stage or {}), checked
        self.styled = hasattr(G, "mapping")

    def facts(self, paths: bool = False) -> Mapping[str, Any]:
        """Return what moves the images, or the paths, besides the network and the seed."""
        space = {"space": "w" if self.styled else "z"} if paths else {}
        if not self.styled:
            return space
        return {**space, "truncation_psi": self._psi, "noise": "const" if paths else "random"}

    @torch.no_grad()
    def images(self, numbers: Sequence[int]) -> Tensor:
        """Return the images of these numbers, [n, R, R, 3] uint8 on the device."""
        parts = [numbers[start : start + self.batch] for start in range(0, len(numbers), self.batch)]
        return torch.cat([to_uint8(self._finite(self._made(self.G, self._codes(part), part))) for part in parts])

    @torch.no_grad()
    def paths(self, numbers: Sequence[int], epsilon: float) -> Tensor:
        """Return images of latents and of others a share `epsilon` of the way further on to another latent.

        With styles the way is a line in w, without it is an arc in z. All is float32, and the noise that which all
        images share, as for published numbers: the ends are closer than half precision can tell apart.

        Returns:
            [n, 2, 3, R, R] float32 in [0, 255], not rounded.
        """
        parts = [numbers[start : start + self.batch] for start in range(0, len(numbers), self.batch)]
        return torch.cat([self._path(part, epsilon) for part in parts])

    @torch.no_grad()
    def walks(self, count: int, frames: int, stops: int) -> Iterator[Tensor]:
        """Yield the frames of closed walks through latent space, [count, R, R, 3] uint8 on the device.

        Args:
            count: walks side by side.
            frames: of all, from the first latent back to it.
            stops: latents that each walk passes.
        """
        codes = [self._codes([walk * stops + stop for stop in range(stops)]) for walk in range(count)]
        for frame in range(frames):
            stop, share = divmod(frame * stops / frames, 1)
            here = torch.stack([c[int(stop)] for c in codes])
            there = torch.stack([c[(int(stop) + 1) % stops] for c in codes])
            code = self._between(here, there, (1 - math.cos(math.pi * share)) / 2)
            parts = [range(start, min(start + self.batch, count)) for start in range(0, count, self.batch)]
            yield torch.cat([to_uint8(self._made(self.G, code[p.start : p.stop], p, still=True)) for p in parts])

    def _path(self, numbers: Sequence[int], epsilon: float) -> Tensor:
        start = self._codes(numbers)
        end = self._between(start, self._codes(numbers, "metrics/to"), epsilon)
        both = [(self._made(self._exact, code, numbers, still=True) + 1) * 127.5 for code in (start, end)]
        return self._finite(torch.stack(both, dim=1))

    def _codes(self, numbers: Sequence[int], purpose: str = "metrics") -> Tensor:
        """Return ws [n, num_ws, w_dim], or z [n, z_dim] of a generator without styles."""
        z = self._draws.normal(f"{purpose}/z", numbers, self.G.z_dim)
        if not self.styled:
            return z
        ws: Tensor = self.G.mapping(z, self._labels_of("metrics/c", numbers), truncation_psi=self._psi)
        return ws

    @cached_property
    def _exact(self) -> Any:
        """The generator, in float32 throughout."""
        if not self.G.config.get("half_levels"):
            return self.G
        device = next(self.G.parameters()).device
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave no trace of drawing them
            exact = type(self.G)(**{**self.G.config, "half_levels": 0})
        exact.load_state_dict(self.G.state_dict())
        return exact.to(device).eval().requires_grad_(False)

    def _finite(self, img: Tensor) -> Tensor:
        """Return images; raise UserError where they are none, if that is checked: black ones would have a score."""
        if self._checked and not img.isfinite().all():
            raise UserError("the network makes images that are inf or NaN: there is nothing to measure")
        return img

    def _made(self, G: Any, code: Tensor, numbers: Sequence[int], still: bool = False) -> Tensor:
        """Return images [n, 3, R, R] of codes; `still` has the noise that all images of the network share."""
        if not self.styled:
            img: Tensor = G(code, self._labels_of("metrics/c", numbers), **self._stage)
            return img.float()
        noise = None
        if not still:
            size = G.synthesis.noise_size(self._stage.get("res"))
            noise = self._draws.image_noise("metrics/noise", numbers, [size])
        img = G.synthesis(code, noise_mode="const" if still else "random", noise=noise, **self._stage)
        return img.float()

    def _between(self, here: Tensor, there: Tensor, share: float) -> Tensor:
        if self.styled:
            return here.lerp(there, share)
        # Along the sphere: on a line the middle would be nearer to 0 than any z that the network has seen.
        here_unit, there_unit = (z / z.norm(dim=1, keepdim=True) for z in (here, there))
        angle = (here_unit * there_unit).sum(dim=1, keepdim=True).clamp(-1, 1).acos()
        length = here.norm(dim=1, keepdim=True).lerp(there.norm(dim=1, keepdim=True), share)
        mixed = ((1 - share) * angle).sin() * here_unit + (share * angle).sin() * there_unit
        return mixed / mixed.norm(dim=1, keepdim=True) * length
