"""A generator against a discriminator: StyleGAN2's losses, regularizers and order of phases."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stylepipe.config import Config, filled
from stylepipe.images import to_uint8
from stylepipe.losses.adversarial import logistic_d_fake, logistic_d_real, non_saturating_g
from stylepipe.losses.regularizers import path_lengths, r1_penalty
from stylepipe.networks.stylegan2 import Discriminator, Generator
from stylepipe.presets import with_batch_gpu
from stylepipe.training.draws import Draws
from stylepipe.training.growth import FixedResolution, Schedule
from stylepipe.training.phase import MicroBatch, Phase, Record

# Per step, of the mean w that truncation pulls towards. StyleGAN's paper has 0.995 (arXiv:1812.04948); with a batch's
# mean per step, StyleGAN2's published models were trained with the slower one.
W_AVG_DECAY = 0.998
HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

LabelSource = Callable[[Sequence[int]], Tensor]


class GANRecipe:
    """Phases `G/main`, `G/path_length`, `D/main`, `D/r1`, as a `stylepipe.training.phase.Recipe`.

    Args:
        config: resolved settings.
        device: where the networks go.
        c_dim: label dimensions; 0 trains without labels.
        labels_at: gives the data's labels at positions in 0..num_labels - 1, [N, c_dim] float32 on the host.
            Generated images draw theirs from there, so classes come as often as in the data.
        num_labels: how many there are to draw from.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        c_dim: int = 0,
        labels_at: LabelSource | None = None,
        num_labels: int = 1,
    ) -> None:
        self.loss = config.loss
        self.r1_gamma = filled(config.loss.r1_gamma)
        self.device = device
        self.c_dim = c_dim
        self.draws = Draws(config.seed, device)
        self._labels_at, self._num_labels = labels_at, num_labels
        self.G, self.D = build_networks(config, c_dim, device)
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        self.G_ema.mapping.w_avg = self.G.mapping.w_avg  # one buffer: it is a moving average already
        self.pl_mean = torch.zeros((), device=device)

        self.networks: Mapping[str, nn.Module] = {"G": self.G, "D": self.D}
        self.averaged: Mapping[str, nn.Module] = {"G": self.G_ema}
        self.headline: Mapping[str, str] = {
            "G": "Loss/G/adversarial",
            "D": "Loss/D/adversarial",
            "r1": "Loss/D/r1",
            "pl": "Loss/G/path_length",
        }
        self.learning_rates: Mapping[str, float] = {"G": filled(config.optim.g_lr), "D": filled(config.optim.d_lr)}
        self.schedule: Schedule = FixedResolution(config.res, filled(config.batch_size))
        self.state: Mapping[str, Tensor] = {"pl_mean": self.pl_mean}
        self.phases: Sequence[Phase] = self._phases()

    def _phases(self) -> list[Phase]:
        phases = [Phase("G/main", "G", 1, self.g_main, after=self._follow_w_avg)]
        if self.loss.pl_weight > 0:
            follow = self._follow_pl_mean
            phases.append(Phase("G/path_length", "G", self.loss.pl_interval, self.g_path_length, after=follow))
        phases.append(Phase("D/main", "D", 1, self.d_main, uses_reals=True))
        if self.r1_gamma > 0:
            phases.append(Phase("D/r1", "D", self.loss.r1_interval, self.d_r1, uses_reals=True))
        return phases

    def g_main(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """L_G = -log sigmoid(D(G(z)))."""
        ws, c = self._draw_ws("G/main", batch.positions)
        record.average("w", ws[:, 0].mean(dim=0))  # the first layer never has the mixed-in latent
        fake_logits = self.D(self._synthesize("G/main", batch.positions, ws), c)
        loss = non_saturating_g(fake_logits)
        record.stat("Loss/G/adversarial", loss)
        record.stat("Logits/fake_sign_G", fake_logits.sign())
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
        """L_D = -log(1 - sigmoid(D(G(z)))) - log sigmoid(D(x))."""
        assert batch.img is not None
        with torch.no_grad():
            ws, c = self._draw_ws("D/main", batch.positions)
            img = self._synthesize("D/main", batch.positions, ws)
        fake_logits = self.D(img, c)
        fake_loss = logistic_d_fake(fake_logits)
        yield fake_loss.mean()

        real_logits = self.D(batch.img, batch.c)
        real_loss = logistic_d_real(real_logits)
        yield real_loss.mean()

        record.stat("Loss/D/adversarial", fake_loss.detach() + real_loss.detach())
        for kind, logits in (("fake", fake_logits), ("real", real_logits)):
            record.stat(f"Logits/{kind}", logits)
            record.stat(f"Logits/{kind}_sign", logits.sign())
            record.histogram(f"Logits/{kind}", logits)

    def d_r1(self, batch: MicroBatch, record: Record) -> Iterator[Tensor]:
        """L_R1 = gamma/2 ||dD(x)/dx||^2 (Mescheder et al. 2018, arXiv:1801.04406, Eq. 9)."""
        assert batch.img is not None
        real_img = batch.img.requires_grad_()
        penalty = r1_penalty(real_img, self.D(real_img, batch.c))
        record.stat("Loss/D/r1", penalty)
        yield penalty.mean() * (self.r1_gamma / 2)

    @torch.no_grad()
    def sample(self, count: int, batch_gpu: int) -> Tensor:
        """Return images of G_ema at the latents that every grid of the run shows, [count, H, W, 3] uint8."""
        images = []
        for start in range(0, count, batch_gpu):
            positions = range(start, min(start + batch_gpu, count))
            z, c = self.draws.normal("grid/z", positions, self.G.z_dim), self._draw_labels("grid/c", positions)
            images.append(to_uint8(self.G_ema(z, c)).cpu())
        return torch.cat(images)

    def export(self) -> nn.Module:
        return self.G_ema

    def _draw_ws(self, purpose: str, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return ws [N, num_ws, w_dim], a share of them mixed of two latents, and the labels that belong to them.

        Mixing (Karras et al. 2019, arXiv:1812.04948, section 3.1): layers from a uniform cut-off on have another w.
        """
        n, num_ws, mixing = len(positions), self.G.num_ws, self.loss.style_mixing
        c = self._draw_labels(f"{purpose}/c", positions)
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

    def _draw_labels(self, purpose: str, positions: Sequence[int]) -> Tensor:
        if self.c_dim == 0 or self._labels_at is None:
            return torch.zeros(len(positions), 0, device=self.device)
        rows = self.draws.integers(purpose, positions, self._num_labels)
        return self.draws.to_device(self._labels_at(rows))

    def _follow_w_avg(self, averages: Mapping[str, Tensor]) -> None:
        _follow_(self.G.mapping.w_avg, averages["w"], 1 - W_AVG_DECAY)

    def _follow_pl_mean(self, averages: Mapping[str, Tensor]) -> None:
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
            **common,
        )
        D = Discriminator(
            config.res,
            architecture=network.d_architecture,
            mbstd_group_size=filled(network.mbstd_group_size),
            mbstd_channels=network.mbstd_channels,
            **common,
        )
    if device.type != "cpu":  # drawn on the CPU, so that every device starts from the same weights
        G.to(device), D.to(device)
    return G, D
