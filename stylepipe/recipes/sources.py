"""Where generated images come from: latents drawn for positions, and what the generator makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stylepipe.networks.norms import batch_norms
from stylepipe.recipes.conditioning import Labels, follow_class_styles_, note_class_styles
from stylepipe.training.draws import Draws
from stylepipe.training.growth import Stage
from stylepipe.training.phase import Record

# Per step, of the mean w that truncation pulls towards. StyleGAN's paper has 0.995 (arXiv:1812.04948); with a batch's
# mean per step, StyleGAN2's published models were trained with the slower one.
W_AVG_DECAY = 0.998
BATCH_STATISTICS_WEIGHT = 0.1  # how fast running statistics follow: torch.nn.BatchNorm2d's


class Latents(NamedTuple):
    """What images are made of.

    Attributes:
        code: ws [N, num_ws, w_dim] of a generator with styles, z [N, z_dim] of a plain one.
        c: [N, c_dim] float32 labels that belong to them.
    """

    code: Tensor
    c: Tensor


class Source(Protocol):
    """Images of a generator that is being trained."""

    def draw(self, purpose: str, positions: Sequence[int], stage: Stage) -> Latents:
        """Draw latents and labels for the images at these positions."""
        ...

    def images(self, purpose: str, positions: Sequence[int], latents: Latents, stage: Stage) -> Tensor:
        """Make images [N, 3, R, R] float32 at the stage's resolution."""
        ...

    def sample(self, average: nn.Module, z: Tensor, c: Tensor, stage: Stage) -> Tensor:
        """Make images [N, 3, R, R] with the averaged generator, nothing of them left to chance."""
        ...

    def note(self, latents: Latents, record: Record) -> None:
        """Offer what `follow` needs of a training batch to `Phase.after`."""
        ...

    def follow(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        """Move running means towards what the step has noted."""
        ...

    def used_at(self, stage: Stage) -> list[nn.Module]:
        """Return the modules that the stage uses."""
        ...


class StyleSource:
    """Of a generator with mapping and synthesis.

    Args:
        G: StyleGAN's or StyleGAN2's.
        draws, labels: of the training.
        mixing: share of images that mix two latents.
        alpha: [] float32, how far the newest level is faded in; read where the stage fades.
    """

    def __init__(self, G: Any, draws: Draws, labels: Labels, mixing: float, alpha: Tensor) -> None:
        self.G, self.draws, self.labels, self.mixing, self.alpha = G, draws, labels, mixing, alpha

    def draw(self, purpose: str, positions: Sequence[int], stage: Stage) -> Latents:
        """Return ws, a share of them mixed of two latents.

        Mixing (Karras et al. 2019, arXiv:1812.04948, section 3.1): layers from a uniform cut-off on have another w.
        """
        n, num_ws = len(positions), self.G.synthesis.num_ws_at(stage.resolution)
        c = self.labels.draw(f"{purpose}/c", positions)
        if self.mixing == 0:
            return Latents(self.G.mapping(self.draws.normal(f"{purpose}/z", positions, self.G.z_dim), c), c)
        z = self.draws.normal(f"{purpose}/z", positions, 2 * self.G.z_dim)
        ws = self.G.mapping(torch.cat(z.chunk(2, dim=1)), c.repeat(2, 1))
        u = self.draws.uniform(f"{purpose}/mixing", positions)
        cutoff = torch.where(u < self.mixing, 1 + (u / self.mixing * (num_ws - 1)).floor(), num_ws)
        keep = torch.arange(self.G.num_ws, device=u.device) < cutoff.unsqueeze(1)
        return Latents(torch.where(keep.unsqueeze(2), ws[:n], ws[n:]), c)

    def images(self, purpose: str, positions: Sequence[int], latents: Latents, stage: Stage) -> Tensor:
        synthesis = self.G.synthesis
        noise = self.draws.image_noise(f"{purpose}/noise", positions, [synthesis.noise_size(stage.resolution)])
        img: Tensor = synthesis(latents.code, noise=noise, res=stage.resolution, alpha=self._fade(stage))
        return img

    def sample(self, average: Any, z: Tensor, c: Tensor, stage: Stage) -> Tensor:
        ws = average.mapping(z, c)
        img: Tensor = average.synthesis(ws, noise_mode="const", res=stage.resolution, alpha=self._fade(stage))
        return img

    def note(self, latents: Latents, record: Record) -> None:
        w = latents.code[:, 0]  # the first layer never has the mixed-in latent
        record.average("w", w.mean(dim=0))
        if self.G.mapping.class_w_offset is not None:
            note_class_styles(record, w, latents.c)

    def follow(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        del stage
        mapping = self.G.mapping
        follow_(mapping.w_avg, averages["w"], 1 - W_AVG_DECAY)
        if mapping.class_w_offset is not None:
            follow_class_styles_(mapping.class_w_offset, mapping.w_avg, averages, 1 - W_AVG_DECAY)

    def used_at(self, stage: Stage) -> list[nn.Module]:
        modules: list[nn.Module] = self.G.synthesis.used_at(stage.resolution, stage.fading)
        return [self.G.mapping, *modules]

    def _fade(self, stage: Stage) -> Tensor | None:
        return self.alpha if stage.fading else None


class PlainSource:
    """Of a generator that makes images of z itself.

    Args:
        G: ProGAN's, R3GAN's or DCGAN's.
        draws, labels, alpha: as for StyleSource.
    """

    def __init__(self, G: Any, draws: Draws, labels: Labels, alpha: Tensor) -> None:
        self.G, self.draws, self.labels, self.alpha = G, draws, labels, alpha
        self._norms = batch_norms(G)

    def draw(self, purpose: str, positions: Sequence[int], stage: Stage) -> Latents:
        del stage
        z = self.draws.normal(f"{purpose}/z", positions, self.G.z_dim)
        return Latents(z, self.labels.draw(f"{purpose}/c", positions))

    def images(self, purpose: str, positions: Sequence[int], latents: Latents, stage: Stage) -> Tensor:
        return self.sample(self.G, *latents, stage)

    def sample(self, average: nn.Module, z: Tensor, c: Tensor, stage: Stage) -> Tensor:
        img: Tensor = average(z, c, res=stage.resolution, alpha=self.alpha if stage.fading else None)
        return img

    def note(self, latents: Latents, record: Record) -> None:
        del latents
        if self._norms:
            record.average("G_norms", torch.cat([norm.noted.flatten() for norm in self._norms]))

    def follow(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        del stage
        follow_norms_(self.G, averages.get("G_norms"))

    def used_at(self, stage: Stage) -> list[nn.Module]:
        modules: list[nn.Module] = self.G.used_at(stage.resolution, stage.fading)
        return modules


def follow_(mean: Tensor, value: Tensor, weight: float) -> None:
    """Move a running mean towards `value`, except where that is inf or NaN: the optimizer skips such a step as well."""
    moved = mean.lerp(value, weight)
    mean.copy_(torch.where(moved.isfinite(), moved, mean))


def follow_norms_(network: nn.Module, noted: Tensor | None) -> None:
    """Move a network's running statistics towards those that a step has noted, one batch norm after the other."""
    if noted is None:
        return
    norms = batch_norms(network)
    for norm, part in zip(norms, noted.split([2 * len(norm.running_mean) for norm in norms]), strict=True):
        norm.follow_(part.view(2, -1), BATCH_STATISTICS_WEIGHT)
