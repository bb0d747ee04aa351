"""What the discriminator sees of images: augmented, real and generated alike, with gradients to the generator."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stylepipe.augment.ada import AdaPipeline
from stylepipe.augment.controller import AdaptiveProbability, cosine_rise
from stylepipe.augment.diff import DiffAugment
from stylepipe.augment.pipelines import strengths_of
from stylepipe.config import Config, filled
from stylepipe.training.draws import Draws
from stylepipe.training.growth import Stage
from stylepipe.training.phase import MicroBatch, Record


class Augmentation:
    """The way from images to the discriminator, with the probability that belongs to it.

    Args:
        config: resolved settings.
        draws: of the training; an image's augmentation is drawn from its position and what it is used for.
        device: where the images are.

    Attributes:
        p: [] float32, the probability of each augmentation (times its strength); None where there is none.
        state: tensors that resuming needs, by name.
        headline: statistics to show while training, by a short label.
    """

    def __init__(self, config: Config, draws: Draws, device: torch.device) -> None:
        aug = config.aug
        self._draws = draws
        start, full = filled(config.growth.start_res).bit_length() - 1, config.res.bit_length() - 1
        levels = range(start, full + 1) if config.augment != "none" else ()
        self._pipelines = {2**k: _pipeline(config, 2**k).to(device) for k in levels}
        self._ada: AdaptiveProbability | None = None
        self._rise: tuple[float, float] | None = None
        self.p: Tensor | None = None
        self.state: Mapping[str, Tensor] = {}
        self.headline: Mapping[str, str] = {}
        if config.augment == "ada":
            begin, unit = filled(aug.p), filled(aug.speed_kimg) * 1000
            self._ada = AdaptiveProbability(begin, aug.target, aug.interval, unit, device)
            self.p, self.state = self._ada.p, self._ada.state
        elif config.augment != "none":
            self.p = torch.full((), filled(aug.p), device=device)
        if self.p is not None:
            self.headline = {"p": "Progress/augment_p", "sign": "Logits/real_sign"}
        if config.augment == "schedule":
            kimg = config.kimg if aug.schedule_kimg is None else aug.schedule_kimg
            self._rise = (filled(kimg) * 1000, filled(aug.p))

    def begin(self, stage: Stage) -> None:
        """Set a probability that is scheduled to what it is at this stage."""
        if self._rise is not None:
            assert self.p is not None
            self.p.fill_(cosine_rise(stage.images_seen, *self._rise))

    def __call__(self, img: Tensor, purpose: str, batch: MicroBatch) -> Tensor:
        """Return img [N, C, H, W] float32 as the discriminator sees it, for the images at the batch's positions.

        `purpose` tells the draws of one use of a position from those of another.
        """
        if self.p is None:
            return img
        pipeline = self._pipelines[img.shape[-1]]
        positions, name = batch.positions, f"{purpose}/augment"
        uniform = self._draws.uniforms(f"{name}/uniform", positions, pipeline.num_uniform)
        normal = self._draws.normal(f"{name}/normal", positions, pipeline.num_normal)
        noise = None
        if pipeline.needs_noise:
            noise = self._draws.image_noise(f"{name}/noise", positions, img.shape[1:])
        return pipeline(img, self.p, uniform, normal, noise)

    def record(self, real_logits: Tensor, record: Record) -> None:
        """Take note of D's logits [N, 1] of augmented real images, and report p."""
        if self.p is not None:
            record.stat("Progress/augment_p", self.p)
        if self._ada is not None:
            known = real_logits.sign().where(real_logits.isfinite(), torch.nan)  # the sign of NaN would be 0
            record.average("real_sign", known.mean())

    def follow(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        """Adapt p to what was noted on all processes; called once a step."""
        if self._ada is not None:
            self._ada.follow(averages["real_sign"], stage.batch_size)


def _pipeline(config: Config, res: int) -> AdaPipeline | DiffAugment:
    return DiffAugment(res) if config.augment == "diff" else AdaPipeline(strengths_of(config.aug), res)
