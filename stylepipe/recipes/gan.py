"""A generator against a discriminator: objectives, regularizers, remedies and the order of phases."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from stylepipe.config import Config, filled
from stylepipe.images import to_uint8
from stylepipe.losses.adversarial import (
    Objective,
    PairedObjective,
    auxiliary_classification,
    feature_matching,
    objective,
    san_d_fake,
    san_d_real,
)
from stylepipe.losses.regularizers import drift, gradient_penalty, path_lengths, r1_penalty, r2_penalty
from stylepipe.networks.head import Judgement
from stylepipe.networks.norms import batch_norms
from stylepipe.presets.defaults import STYLED
from stylepipe.recipes.augmentation import Augmentation
from stylepipe.recipes.build import alone, build_networks, schedule_of
from stylepipe.recipes.conditioning import Labels, LabelSource
from stylepipe.recipes.generated import MEASURED_SEED, GeneratedImages
from stylepipe.recipes.growing import grown_so_far
from stylepipe.recipes.remedies import HistoricalAverages, WeightBounds
from stylepipe.recipes.sources import Latents, PlainSource, Source, StyleSource, follow_, follow_norms_
from stylepipe.training.draws import Draws
from stylepipe.training.growth import Stage
from stylepipe.training.phase import Annealed, MicroBatch, Phase, Record

PL_START_IMAGES = 16


class GANRecipe:
    """Phases `G/main`, `G/path_length`, `D/main`, `D/r1`, as a `stylepipe.training.phase.Recipe`.

    Args:
        config: resolved settings.
        device: where the networks go.
        c_dim: label dimensions; 0 trains without labels.
        labels_at: gives the data's labels at positions in 0..num_labels - 1, [N, c_dim] float32 on the host.
            Generated images draw theirs from there, so classes come as often as in the data.
        num_labels: how many there are to draw from.
        vectors: labels are no classes but any vectors.
        world_size: processes that train together.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        c_dim: int = 0,
        labels_at: LabelSource | None = None,
        num_labels: int = 1,
        vectors: bool = False,
        world_size: int = 1,
    ) -> None:
        self.config, self.loss, self.device = config, config.loss, device
        self.objective = objective(filled(self.loss.kind), real_label=self.loss.real_label, margin=self.loss.margin)
        self.draws = Draws(config.seed, device)
        self.labels = Labels(self.draws, c_dim, labels_at, num_labels, vectors)
        # Of whichever paper: what is asked of them is what `sources` calls, and used_at and judge.
        self.G, self.D = build_networks(config, c_dim, device)
        for res in self.D.resolutions[: -1 - config.freeze_d : -1]:  # Freeze-D: Mo et al. 2020, arXiv:2002.10964
            self.D.get_submodule(f"b{res}").requires_grad_(False)
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        _share_running_means(self.G_ema, self.G)
        self.pl_mean = torch.zeros((), device=device)
        self.alpha = torch.ones((), device=device)
        self.gamma_share = torch.ones((), device=device)
        self.gp_weight = torch.full((), filled(self.loss.gp_weight), device=device)
        self._penalty_factor = 1.0
        self.source = self._source()
        self.augment = Augmentation(config, self.draws, device)
        self.networks: Mapping[str, nn.Module] = {"G": self.G, "D": self.D}
        self.averaged: Mapping[str, nn.Module] = {"G": self.G_ema}
        self._history = HistoricalAverages(self.networks) if self.loss.historical_weight > 0 else None

        self.learning_rates: Mapping[str, float] = {"G": filled(config.optim.g_lr), "D": filled(config.optim.d_lr)}
        self.schedule = schedule_of(config, world_size)
        self._bounds = {  # made before the engine marks what it trains
            (stage.resolution, stage.fading): WeightBounds(self.used_at(stage)["D"], filled(self.loss.weight_clip))
            for stage in self.schedule.stages()
        }
        self.state: Mapping[str, Tensor] = {
            "pl_mean": self.pl_mean,
            **{f"augment.{name}": tensor for name, tensor in self.augment.state.items()},
            **({} if self._history is None else self._history.state),
        }
        self.optional: Collection[str] = {
            "G.buffer.mapping.class_w_offset",
            *(f"recipe.{name}" for name in self.state if name != "pl_mean"),
        }
        self.phases: Sequence[Phase] = self._phases()
        self.headline: Mapping[str, str] = self._headline()

    def _source(self) -> Source:
        if self.config.network.kind in STYLED:
            return StyleSource(self.G, self.draws, self.labels, filled(self.loss.style_mixing), self.alpha)
        return PlainSource(self.G, self.draws, self.labels, self.alpha)

    def _phases(self) -> list[Phase]:
        loss = self.loss
        g_sees_reals = isinstance(self.objective, PairedObjective) or loss.feature_matching > 0
        phases = [Phase("G/main", "G", filled(loss.n_critic), self.g_main, g_sees_reals, after=self._after_g)]
        if filled(loss.pl_weight) > 0:
            lazy, follow = loss.pl_interval, self._follow_pl_mean
            interval = lazy * filled(loss.n_critic)  # in steps, of which one in n_critic updates G
            phases.append(Phase("G/path_length", "G", interval, self.g_path_length, weight=lazy, after=follow))
        phases.append(Phase("D/main", "D", 1, self.d_main, uses_reals=True, after=self._after_d))
        if not self._penalizes_in_main and (name := "_".join(self._penalties)):
            lazy, after = filled(loss.r1_interval), self._after_penalty
            phases.append(Phase(f"D/{name}", "D", lazy, self.d_penalty, uses_reals=True, weight=lazy, after=after))
        return phases

    def _headline(self) -> Mapping[str, str]:
        shown = {"G": "Loss/G/adversarial", "D": "Loss/D/adversarial"}
        shown |= {name: f"Loss/D/{name}" for name in self._penalties}
        if filled(self.loss.gp_weight) > 0:
            shown["gp"] = "Loss/D/gp"
        if filled(self.loss.pl_weight) > 0:
            shown["pl"] = "Loss/G/path_length"
        return shown | dict(self.augment.headline)

    @property
    def _penalties(self) -> dict[str, float]:
        weights = {"r1": filled(self.loss.r1_gamma), "r2": filled(self.loss.r2_gamma)}
        return {name: gamma for name, gamma in weights.items() if gamma > 0}

    @property
    def _penalizes_in_main(self) -> bool:
        return self.loss.r1_interval == 1

    def begin(self, stage: Stage) -> None:
        """Set alpha, the weights of penalties and, where it is scheduled, the probability of augmentation."""
        self.alpha.fill_(stage.alpha)
        self.gamma_share.fill_(self._annealed(stage, 1.0, self.config.anneal.gamma) * self._penalty_factor)
        self.gp_weight.fill_(filled(self.loss.gp_weight) * self._penalty_factor)
        self.augment.begin(stage)

    def regularize(self, factor: float) -> str:
        self._penalty_factor = factor
        weights = {
            "R1": self._penalties.get("r1"),
            "R2": self._penalties.get("r2"),
            "gradient penalty": self.loss.gp_weight,
        }
        return ", ".join(f"{name} {weight * factor:g}" for name, weight in weights.items() if weight)

    def anneal(self, stage: Stage) -> Annealed:
        """Return the learning rate's share, beta2 and the half-life of the average at this stage."""
        config, start = self.config, self.config.anneal.ema
        half_life = filled(config.ema.kimg)
        if (decay := config.ema.decay) is not None:
            half_life = -stage.batch_size / math.log2(decay) / 1000 if decay > 0 else 0.0
        elif start is not None:
            half_life = self._annealed(stage, start * half_life, half_life)
        beta2 = None
        if config.anneal.beta2 is not None:
            beta2 = self._annealed(stage, filled(config.optim.beta2), config.anneal.beta2)
        return Annealed(self._annealed(stage, 1.0, config.anneal.lr), beta2, half_life)

    def _annealed(self, stage: Stage, start: float, end: float | None) -> float:
        """Return where half a cosine from start to end stands."""
        length = filled(self.config.anneal.kimg) * 1000
        if end is None or length == 0:
            return start
        return end + (start - end) * (1 + math.cos(math.pi * min(1.0, stage.images_seen / length))) / 2

    def used_at(self, stage: Stage) -> Mapping[str, Sequence[nn.Module]]:
        return {"G": self.source.used_at(stage), "D": self.D.used_at(stage.resolution, stage.fading)}

    def g_main(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """Yield the generator's loss (see `stylepipe.losses.adversarial`) on images that it makes now.

        Of an auxiliary classifier also - acgan_weight log P(C = c | G(z)); of feature matching its weight times it.
        """
        latents = self.source.draw("G/main", batch.positions, batch.stage)
        img = self.source.images("G/main", batch.positions, latents, batch.stage)
        self.source.note(latents, record)
        fake = self._judge(self.augment(img, "G/main", batch), latents.c, batch.stage)
        if batch.img is None:
            assert isinstance(self.objective, Objective)
            adversarial = self.objective.g(fake.logits)
        else:
            with torch.no_grad():
                real = self._judge(self.augment(self._real(batch), "G/main/real", batch), batch.c, batch.stage)
            if isinstance(self.objective, PairedObjective):
                adversarial = self.objective.g(real.logits, fake.logits)
            else:
                adversarial = self.objective.g(fake.logits)
        record.stat("Loss/G/adversarial", adversarial)
        if self.objective.anchored:
            record.stat("Logits/fake_sign_G", _sign(fake.logits))
        loss, aux = self._with_aux(adversarial, fake.class_logits, latents.c)
        if aux is not None:
            record.stat("Loss/G/aux", aux)
        total = loss.mean()
        if self.loss.feature_matching > 0:
            matching = feature_matching(real.features, fake.features)
            record.stat("Loss/G/feature_matching", matching)
            total = total + matching * self.loss.feature_matching
        yield total
        if self._history is not None:
            yield self._history.penalty("G") * self.loss.historical_weight

    def g_path_length(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """L_pl = pl_weight (||J_w^T y|| - a)^2 (arXiv:1912.04958, Eq. 4).

        a is the running mean before this step: then the processes need not meet in the middle of the phase. (Code
        that updates a first differs by the factor 1 - pl_decay of the deviation.)
        """
        positions = batch.positions[: max(1, len(batch.positions) // self.loss.pl_batch_shrink)]
        latents = self.source.draw("G/path_length", positions, batch.stage)
        img = self.source.images("G/path_length", positions, latents, batch.stage)
        noise = self.draws.image_noise("G/path_length/y", positions, img.shape[1:])
        lengths = path_lengths(img, latents.code, noise)
        record.average("path_length", lengths.mean())
        penalty = (lengths - self.pl_mean).square()
        record.stat("Loss/G/path_length", penalty)
        record.stat("Progress/path_length", lengths)
        yield penalty.mean() * filled(self.loss.pl_weight)

    def d_main(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """Yield the discriminator's loss (see `stylepipe.losses.adversarial`) on generated and on real images.

        Of an auxiliary classifier also - acgan_weight (log P(C = c | G(z)) + log P(C = c | x)); R1 and R2 where they
        are part of every step; drift and gradient penalty.
        """
        fake_img, latents = self._fake(batch, "D/main")
        real_img = self._real(batch)
        if self._penalizes_in_main:
            fake_img.requires_grad_("r2" in self._penalties)
            real_img.requires_grad_("r1" in self._penalties)
        fake_view = self.augment(fake_img, "D/main/fake", batch)
        fake = self._judge(fake_view, latents.c, batch.stage)
        loss, fake_aux = self._with_aux(self._of_fake(fake), fake.class_logits, latents.c)
        loss = loss + self._penalty("r2", fake_img, fake.logits, record)
        if isinstance(self.objective, Objective):  # the losses of both are independent: one graph at a time
            yield loss.mean()
            loss = torch.zeros_like(loss)

        real_view = self.augment(real_img, "D/main/real", batch)
        real = self._judge(real_view, batch.c, batch.stage)
        of_real, real_aux = self._with_aux(self._of_real(real), real.class_logits, batch.c)
        loss = loss + of_real + self._penalty("r1", real_img, real.logits, record)
        if isinstance(self.objective, PairedObjective):
            loss = loss + self.objective.d(real.logits, fake.logits)
        yield loss.mean()

        self._note_d(real, fake, record)
        if fake_aux is not None and real_aux is not None and real.class_logits is not None:
            record.stat("Loss/D/aux", fake_aux + real_aux)
            record.stat("Accuracy/real", real.class_logits.argmax(dim=1) == batch.c.argmax(dim=1))
        if filled(self.loss.gp_weight) > 0:
            yield self._gradient_penalty(real_view.detach(), fake_view.detach(), batch, record)
        if self._history is not None:
            yield self._history.penalty("D") * self.loss.historical_weight

    def d_penalty(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """Yield R1 and R2, gamma/2 ||dD(T(x))/dx||^2 at real and at generated x, T augmenting the image.

        Mescheder et al. 2018, arXiv:1801.04406, Eq. 9 and 10.
        """
        if "r1" in self._penalties:
            img = self._real(batch).requires_grad_()
            logits = self._judge(self.augment(img, "D/r1", batch), batch.c, batch.stage).logits
            yield self._penalty("r1", img, logits, record).mean()
        if "r2" in self._penalties:
            img, latents = self._fake(batch, "D/r2")
            img.requires_grad_()
            logits = self._judge(self.augment(img, "D/r2", batch), latents.c, batch.stage).logits
            yield self._penalty("r2", img, logits, record).mean()

    def start_pl_mean(self) -> None:
        """Let the running mean of path lengths start from those that G has now.

        From 0, as with random weights, it would first pull down those of a trained G. One image at a time, so that the
        result depends on no micro-batch.
        """
        if filled(self.loss.pl_weight) == 0:
            return
        lengths, stage = [], self.schedule.final()
        for position in range(PL_START_IMAGES):
            latents = self.source.draw("start/path_length", [position], stage)
            img = self.source.images("start/path_length", [position], latents, stage)
            noise = self.draws.image_noise("start/path_length/y", [position], img.shape[1:])
            lengths.append(path_lengths(img, latents.code, noise).detach())
        self.pl_mean.copy_(torch.cat(lengths).mean())

    def sample(self, columns: int, rows: int, stage: Stage) -> Tensor:
        """Return images of G_ema at the latents and labels that every grid of the run shows, [N, H, W, 3] uint8.

        Those of a stage of growth are enlarged to the full size, pixel by pixel.
        """
        numbers, c = self.labels.grid(columns, rows)
        images = torch.cat([part.cpu() for part in self._images_of(self.G_ema, "grid/z", numbers, c, stage)])
        times = self.config.res // stage.resolution
        return images.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)

    def watched(self, count: int, stage: Stage) -> Iterator[Tensor]:
        numbers = list(range(count))
        self.G.eval()
        yield from self._images_of(self.G, "watched/z", numbers, self.labels.draw("watched/c", numbers), stage)
        self.G.train()

    @torch.no_grad()
    def _images_of(
        self, G: nn.Module, purpose: str, numbers: Sequence[int], c: Tensor, stage: Stage
    ) -> Iterator[Tensor]:
        """Yield images of a generator, [n, R, R, 3] uint8 on the device, as many at a time as in training."""
        self.begin(stage)
        for start in range(0, len(numbers), stage.batch_gpu):
            part = slice(start, start + stage.batch_gpu)
            z = self.draws.normal(purpose, numbers[part], self.G.z_dim)
            yield to_uint8(self.source.sample(G, z, c[part], stage))

    def generated(self, stage: Stage) -> GeneratedImages:
        self.begin(stage)
        draws = Draws(MEASURED_SEED, self.device)
        return GeneratedImages(
            self.G_ema,
            draws,
            self.labels.drawn_by(draws).draw,
            resolution=stage.resolution,
            batch=stage.batch_gpu,
            stage={"res": stage.resolution, "alpha": self.alpha if stage.fading else None},
        )

    def classes_of_rows(self, rows: int) -> list[int]:
        return self.labels.classes_of_rows(rows)

    def export(self, stage: Stage) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        beside = {name: grown_so_far(network, stage) for name, network in self.networks.items()}
        return grown_so_far(self.G_ema, stage), beside

    def _real(self, batch: MicroBatch) -> Tensor:
        """Return the real images; while a level fades in, they fade from the level below as the generated ones do.

        Karras et al. 2018, arXiv:1710.10196, appendix A.1.
        """
        assert batch.img is not None
        if not batch.stage.fading:
            return batch.img.detach()
        below: Tensor = self.D.at_half(batch.img)
        return below.lerp(batch.img, self.alpha)

    def _fake(self, batch: MicroBatch, purpose: str) -> tuple[Tensor, Latents]:
        """Return generated images without a graph, and what they are made of."""
        with torch.no_grad():
            latents = self.source.draw(purpose, batch.positions, batch.stage)
            return self.source.images(purpose, batch.positions, latents, batch.stage), latents

    def _judge(self, view: Tensor, c: Tensor, stage: Stage) -> Judgement:
        judgement: Judgement = self.D.judge(view, c, self.alpha if stage.fading else None)
        return judgement

    def _of_fake(self, fake: Judgement) -> Tensor:
        """Return D's loss on generated images, without what it takes both kinds of images for; [N, 1]."""
        paired = isinstance(self.objective, PairedObjective)
        loss = torch.zeros_like(fake.logits) if paired else cast(Objective, self.objective).d_fake(fake.logits)
        return loss if fake.direction is None else loss + san_d_fake(fake.direction)

    def _of_real(self, real: Judgement) -> Tensor:
        """Return D's loss on real images, likewise."""
        paired = isinstance(self.objective, PairedObjective)
        loss = torch.zeros_like(real.logits) if paired else cast(Objective, self.objective).d_real(real.logits)
        if filled(self.loss.drift) > 0:
            loss = loss + drift(real.logits) * filled(self.loss.drift)
        return loss if real.direction is None else loss + san_d_real(real.direction)

    def _penalty(self, name: str, img: Tensor, logits: Tensor, record: Record) -> Tensor:
        """Return gamma/2 ||dD/dx||^2 [N, 1], 0 where the images take no gradient."""
        if not img.requires_grad:
            return torch.zeros_like(logits)
        penalty = (r1_penalty if name == "r1" else r2_penalty)(img, logits)
        record.stat(f"Loss/D/{name}", penalty)
        return penalty[:, None] * (self._penalties[name] / 2) * self.gamma_share

    def _gradient_penalty(self, real: Tensor, fake: Tensor, batch: MicroBatch, record: Record) -> Tensor:
        """Return gp_weight times the penalty between what D sees of real and of generated images (WGAN-GP, Eq. 3)."""
        u = self.draws.uniform("D/gp", batch.positions)

        def critic(img: Tensor) -> Tensor:
            return self._judge(img, batch.c, batch.stage).logits

        penalty = gradient_penalty(critic, real, fake, u, self.loss.gp_target, self.loss.gp_one_sided)
        record.stat("Loss/D/gp", penalty)
        return penalty.mean() * self.gp_weight

    def _note_d(self, real: Judgement, fake: Judgement, record: Record) -> None:
        """Report what D made of both kinds of images."""
        real_logits, fake_logits = real.logits.detach(), fake.logits.detach()
        middle = torch.zeros((), device=self.device)
        if not self.objective.anchored:  # the loss does not tell where 0 is: between the two kinds of images
            middle = (real_logits.mean() + fake_logits.mean()) / 2
        self.augment.record(real_logits - middle, record)
        if isinstance(self.objective, PairedObjective):
            record.stat("Loss/D/adversarial", self.objective.d(real_logits, fake_logits))
        else:
            record.stat("Loss/D/adversarial", self.objective.d_fake(fake_logits) + self.objective.d_real(real_logits))
        divergence = self.objective.divergence
        record.stat(f"Divergence/{divergence.name}", divergence.estimate(real_logits, fake_logits))
        record.stat("Logits/gap", real_logits - fake_logits)
        for kind, logits in (("fake", fake_logits), ("real", real_logits)):
            record.stat(f"Logits/{kind}", logits)
            record.stat(f"Logits/{kind}_sign", _sign(logits - middle))
            record.histogram(f"Logits/{kind}", logits)
        if norms := batch_norms(self.networks["D"]):
            record.average("D_norms", torch.cat([norm.noted.flatten() for norm in norms]))

    def _with_aux(self, loss: Tensor, class_logits: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a loss [N, 1] with the auxiliary classifier's term added, and that term; None without classifier."""
        if class_logits is None:
            return loss, None
        aux = auxiliary_classification(class_logits, c)
        return loss + aux * self.loss.acgan_weight, aux

    def _after_g(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        self.source.follow(averages, stage)
        if self._history is not None:
            self._history.update_("G")

    def _after_d(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        self.augment.follow(averages, stage)
        follow_norms_(self.networks["D"], averages.get("D_norms"))
        self._after_penalty(averages, stage)
        if self._history is not None:
            self._history.update_("D")

    def _after_penalty(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        """Keep the weights of D that the stage uses within their bounds."""
        del averages
        self._bounds[stage.resolution, stage.fading].keep_()

    def _follow_pl_mean(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        del stage
        follow_(self.pl_mean, averages["path_length"], self.loss.pl_decay)


def trial(config: Config, c_dim: int, device: torch.device, batch_gpu: int) -> GANRecipe:
    """Build the recipe for one micro-batch a step, with blank labels: to measure what it takes."""
    return GANRecipe(alone(config, batch_gpu), device, c_dim, lambda rows: torch.zeros(len(rows), c_dim))


def _sign(logits: Tensor) -> Tensor:
    """Return the signs, NaN where the logit is: torch.sign would have 0 there, as of an undecided D."""
    return torch.where(logits.isnan(), logits, logits.sign())


def _share_running_means(average: nn.Module, network: nn.Module) -> None:
    """Let an averaged network have the running means of the one it follows: they are moving averages already."""
    for name, module in average.named_modules():
        other = network.get_submodule(name)
        for buffer, _ in list(module.named_buffers(recurse=False)):
            if buffer in ("w_avg", "class_w_offset", "running_mean", "running_var"):
                setattr(module, buffer, getattr(other, buffer))
