"""A generator against a discriminator: StyleGAN2's losses, regularizers and order of phases."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stylepipe.config import Config, filled
from stylepipe.images import to_uint8
from stylepipe.losses.adversarial import (
    auxiliary_classification,
    logistic_d_fake,
    logistic_d_real,
    non_saturating_g,
)
from stylepipe.losses.regularizers import path_lengths, r1_penalty
from stylepipe.networks.stylegan2 import Discriminator, Generator
from stylepipe.presets import with_batch_gpu
from stylepipe.recipes.augmentation import Augmentation
from stylepipe.recipes.conditioning import Labels, LabelSource, follow_class_styles_, note_class_styles
from stylepipe.training.draws import Draws
from stylepipe.training.growth import FixedResolution, Schedule, Stage
from stylepipe.training.phase import MicroBatch, Phase, Record

# Per step, of the mean w that truncation pulls towards. StyleGAN's paper has 0.995 (arXiv:1812.04948); with a batch's
# mean per step, StyleGAN2's published models were trained with the slower one.
W_AVG_DECAY = 0.998
PL_START_IMAGES = 16
HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        c_dim: int = 0,
        labels_at: LabelSource | None = None,
        num_labels: int = 1,
        vectors: bool = False,
    ) -> None:
        self.loss = config.loss
        self.r1_gamma = filled(config.loss.r1_gamma)
        self.device = device
        self.draws = Draws(config.seed, device)
        self.labels = Labels(self.draws, c_dim, labels_at, num_labels, vectors)
        self.G, self.D = build_networks(config, c_dim, device)
        for res in self.D.resolutions[: -1 - config.freeze_d : -1]:  # Freeze-D: Mo et al. 2020, arXiv:2002.10964
            self.D.get_submodule(f"b{res}").requires_grad_(False)
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        self.G_ema.mapping.w_avg = self.G.mapping.w_avg  # one buffer: it is a moving average already
        self.G_ema.mapping.class_w_offset = self.G.mapping.class_w_offset
        self.pl_mean = torch.zeros((), device=device)
        self.augment = Augmentation(config, self.draws, device)

        self.networks: Mapping[str, nn.Module] = {"G": self.G, "D": self.D}
        self.averaged: Mapping[str, nn.Module] = {"G": self.G_ema}
        self.headline: Mapping[str, str] = {
            "G": "Loss/G/adversarial",
            "D": "Loss/D/adversarial",
            "r1": "Loss/D/r1",
            "pl": "Loss/G/path_length",
            **self.augment.headline,
        }
        self.learning_rates: Mapping[str, float] = {"G": filled(config.optim.g_lr), "D": filled(config.optim.d_lr)}
        self.schedule: Schedule = FixedResolution(config.res, filled(config.batch_size))
        self.state: Mapping[str, Tensor] = {
            "pl_mean": self.pl_mean,
            **{f"augment.{name}": tensor for name, tensor in self.augment.state.items()},
        }
        self.optional: Collection[str] = {
            "G.buffer.mapping.class_w_offset",
            *(f"recipe.augment.{name}" for name in self.augment.state),
        }
        self.phases: Sequence[Phase] = self._phases()

    def _phases(self) -> list[Phase]:
        phases = [Phase("G/main", "G", 1, self.g_main, after=self._follow_w_avg)]
        if self.loss.pl_weight > 0:
            follow = self._follow_pl_mean
            phases.append(Phase("G/path_length", "G", self.loss.pl_interval, self.g_path_length, after=follow))
        phases.append(Phase("D/main", "D", 1, self.d_main, uses_reals=True, after=self.augment.follow))
        if self.r1_gamma > 0:
            phases.append(Phase("D/r1", "D", self.loss.r1_interval, self.d_r1, uses_reals=True))
        return phases

    def g_main(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """L_G = -log sigmoid(D(G(z))), and of an auxiliary classifier - acgan_weight log P(C = c | G(z))."""
        ws, c = self._draw_ws("G/main", batch.positions)
        record.average("w", ws[:, 0].mean(dim=0))  # the first layer never has the mixed-in latent
        if self.G.mapping.class_w_offset is not None:
            note_class_styles(record, ws[:, 0], c)
        img = self._synthesize("G/main", batch.positions, ws)
        fake_logits, fake_classes = self.D.judge(self.augment(img, "G/main", batch), c)
        fake_loss = non_saturating_g(fake_logits)
        record.stat("Loss/G/adversarial", fake_loss)
        record.stat("Logits/fake_sign_G", fake_logits.sign())
        loss, aux = self._with_aux(fake_loss, fake_classes, c)
        if aux is not None:
            record.stat("Loss/G/aux", aux)
        yield loss.mean()

    def g_path_length(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """L_pl = pl_weight (||J_w^T y|| - a)^2 (arXiv:1912.04958, Eq. 4).

        a is the running mean before this step: then the processes need not meet in the middle of the phase. (Code
        that updates a first differs by the factor 1 - pl_decay of the deviation.)
        """
        positions = batch.positions[: max(1, len(batch.positions) // self.loss.pl_batch_shrink)]
        ws, _ = self._draw_ws("G/path_length", positions)
        img = self._synthesize("G/path_length", positions, ws)
        lengths = path_lengths(img, ws, self.draws.image_noise("G/path_length/y", positions, img.shape[1:]))
        record.average("path_length", lengths.mean())
        penalty = (lengths - self.pl_mean).square()
        record.stat("Loss/G/path_length", penalty)
        record.stat("Progress/path_length", lengths)
        yield penalty.mean() * self.loss.pl_weight

    def d_main(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """L_D = -log(1 - sigmoid(D(G(z)))) - log sigmoid(D(x)).

        Of an auxiliary classifier also - acgan_weight (log P(C = c | G(z)) + log P(C = c | x)).
        """
        assert batch.img is not None
        with torch.no_grad():
            ws, c = self._draw_ws("D/main", batch.positions)
            img = self.augment(self._synthesize("D/main", batch.positions, ws), "D/main/fake", batch)
        fake_logits, fake_classes = self.D.judge(img, c)
        fake_loss = logistic_d_fake(fake_logits)
        loss, fake_aux = self._with_aux(fake_loss, fake_classes, c)
        yield loss.mean()

        real_logits, real_classes = self.D.judge(self.augment(batch.img, "D/main/real", batch), batch.c)
        self.augment.record(real_logits, record)
        real_loss = logistic_d_real(real_logits)
        loss, real_aux = self._with_aux(real_loss, real_classes, batch.c)
        yield loss.mean()

        if fake_aux is not None and real_aux is not None and real_classes is not None:
            record.stat("Loss/D/aux", fake_aux + real_aux)
            record.stat("Accuracy/real", real_classes.argmax(dim=1) == batch.c.argmax(dim=1))
        record.stat("Loss/D/adversarial", fake_loss.detach() + real_loss.detach())
        for kind, logits in (("fake", fake_logits), ("real", real_logits)):
            record.stat(f"Logits/{kind}", logits)
            record.stat(f"Logits/{kind}_sign", logits.sign())
            record.histogram(f"Logits/{kind}", logits)

    def d_r1(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """L_R1 = gamma/2 ||dD(T(x))/dx||^2 (Mescheder et al. 2018, arXiv:1801.04406, Eq. 9), T augmenting the image."""
        assert batch.img is not None
        real_img = batch.img.requires_grad_()
        penalty = r1_penalty(real_img, self.D(self.augment(real_img, "D/r1", batch), batch.c))
        record.stat("Loss/D/r1", penalty)
        yield penalty.mean() * (self.r1_gamma / 2)

    def start_pl_mean(self) -> None:
        """Let the running mean of path lengths start from those that G has now.

        From 0, as with random weights, it would first pull down those of a trained G. One image at a time, so that the
        result depends on no micro-batch.
        """
        if self.loss.pl_weight == 0:
            return
        lengths = []
        for position in range(PL_START_IMAGES):
            ws, _ = self._draw_ws("start/path_length", [position])
            img = self._synthesize("start/path_length", [position], ws)
            noise = self.draws.image_noise("start/path_length/y", [position], img.shape[1:])
            lengths.append(path_lengths(img, ws, noise).detach())
        self.pl_mean.copy_(torch.cat(lengths).mean())

    @torch.no_grad()
    def sample(self, columns: int, rows: int, batch_gpu: int) -> Tensor:
        """Return images of G_ema at the latents and labels that every grid of the run shows, [N, H, W, 3] uint8."""
        latents, c = self.labels.grid(columns, rows)
        images = []
        for start in range(0, len(latents), batch_gpu):
            part = slice(start, start + batch_gpu)
            z = self.draws.normal("grid/z", latents[part], self.G.z_dim)
            images.append(to_uint8(self.G_ema(z, c[part])).cpu())
        return torch.cat(images)

    def classes_of_rows(self, rows: int) -> list[int]:
        return self.labels.classes_of_rows(rows)

    def export(self) -> nn.Module:
        return self.G_ema

    def _draw_ws(self, purpose: str, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return ws [N, num_ws, w_dim], a share of them mixed of two latents, and the labels that belong to them.

        Mixing (Karras et al. 2019, arXiv:1812.04948, section 3.1): layers from a uniform cut-off on have another w.
        """
        n, num_ws, mixing = len(positions), self.G.num_ws, self.loss.style_mixing
        c = self.labels.draw(f"{purpose}/c", positions)
        if mixing == 0:
            return self.G.mapping(self.draws.normal(f"{purpose}/z", positions, self.G.z_dim), c), c
        z = self.draws.normal(f"{purpose}/z", positions, 2 * self.G.z_dim)
        ws = self.G.mapping(torch.cat(z.chunk(2, dim=1)), c.repeat(2, 1))
        u = self.draws.uniform(f"{purpose}/mixing", positions)
        cutoff = torch.where(u < mixing, 1 + (u / mixing * (num_ws - 1)).floor(), num_ws)
        keep = torch.arange(num_ws, device=self.device) < cutoff.unsqueeze(1)
        return torch.where(keep.unsqueeze(2), ws[:n], ws[n:]), c

    def _synthesize(self, purpose: str, positions: Sequence[int], ws: Tensor) -> Tensor:
        noise = self.draws.image_noise(f"{purpose}/noise", positions, [self.G.synthesis.noise_size])
        return self.G.synthesis(ws, noise=noise)

    def _with_aux(self, loss: Tensor, class_logits: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a loss [N, 1] with the auxiliary classifier's term added, and that term; None without classifier."""
        if class_logits is None:
            return loss, None
        aux = auxiliary_classification(class_logits, c)
        return loss + aux * self.loss.acgan_weight, aux

    def _follow_w_avg(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        del stage
        mapping = self.G.mapping
        _follow_(mapping.w_avg, averages["w"], 1 - W_AVG_DECAY)
        if mapping.class_w_offset is not None:
            follow_class_styles_(mapping.class_w_offset, mapping.w_avg, averages, 1 - W_AVG_DECAY)

    def _follow_pl_mean(self, averages: Mapping[str, Tensor], stage: Stage) -> None:
        del stage
        _follow_(self.pl_mean, averages["path_length"], self.loss.pl_decay)


def _follow_(mean: Tensor, value: Tensor, weight: float) -> None:
    """Move a running mean towards `value`, except where that is inf or NaN: the optimizer skips such a step as well."""
    moved = mean.lerp(value, weight)
    mean.copy_(torch.where(moved.isfinite(), moved, mean))


def trial(config: Config, c_dim: int, device: torch.device, batch_gpu: int) -> GANRecipe:
    """Build the recipe for one micro-batch a step, with blank labels: to measure what it takes."""
    alone = with_batch_gpu(replace(config, batch_size=batch_gpu), batch_gpu)
    return GANRecipe(alone, device, c_dim, lambda rows: torch.zeros(len(rows), c_dim))


def build_networks(config: Config, c_dim: int, device: torch.device) -> tuple[Generator, Discriminator]:
    """Build StyleGAN2's networks from resolved settings, initialised from the seed, the same on every device."""
    network, half = config.network, HALF_TYPES.get(config.precision)
    common: dict[str, Any] = {
        "c_dim": c_dim,
        "channel_base": filled(network.channel_base),
        "channel_max": filled(network.channel_max),
        "conv_clamp": network.conv_clamp,
        "half_levels": network.half_levels if half else 0,
        "half_dtype": half,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        G = Generator(
            config.res,
            z_dim=network.z_dim,
            w_dim=network.w_dim,
            mapping_layers=filled(network.mapping_layers),
            architecture=network.g_architecture,
            class_w_avg=network.class_w_avg,
            **common,
        )
        D = Discriminator(
            config.res,
            architecture=network.d_architecture,
            mbstd_group_size=filled(network.mbstd_group_size),
            mbstd_channels=network.mbstd_channels,
            conditioning=network.d_conditioning,
            **common,
        )
    if device.type != "cpu":  # drawn on the CPU, so that every device starts from the same weights
        G.to(device), D.to(device)
    return G, D
