"""Which objectives keep all modes of a ring of 8 Gaussians and of a grid of 25.

The networks, the optimizers and the number of steps are the same for all; D learns faster than G (Heusel et al. 2017,
arXiv:1706.08500), and rates fall to 0 in the second half, so that what is counted is where training ends.

Rates, weights and steps were chosen on such runs, for the difference to show soon: with D as slow as G, the plain GAN
keeps the ring as well.

Run as a script for the table of kept modes: python tests/losses/test_rings.py [seed ...]
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from stylepipe.losses.adversarial import PairedObjective, objective
from stylepipe.losses.regularizers import gradient_penalty, r1_penalty, r2_penalty

STD = 0.05
Z_DIM = 2
BATCH = 128
G_LR = 1e-3
BETAS = (0.0, 0.99)
SAMPLES = 4000
# Of the fair share of the samples within 3 standard deviations. An even spread over the whole square would have 0.07
# of it around each mode of the grid, so that it keeps none.
KEPT = 0.2


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one weight and of standard deviation STD, and the training that they take."""

    centres: Tensor
    steps: int
    width: int
    d_lr: float


@dataclass(frozen=True)
class Game:
    """An objective and the weights of its regularizers."""

    loss: str
    r1_gamma: float = 0.0
    r2_gamma: float = 0.0
    gp_weight: float = 0.0


ANGLES = torch.arange(8) * (torch.pi / 4)
MIXTURES = {
    "ring": Mixture(2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1), steps=2000, width=64, d_lr=8e-3),
    "grid": Mixture(torch.cartesian_prod(*2 * [torch.linspace(-2, 2, 5)]), steps=8000, width=96, d_lr=4e-3),
}
GAMES = {
    "minimax": Game("minimax"),
    "non-saturating": Game("non-saturating"),
    "relativistic": Game("relativistic"),
    "relativistic + R1 + R2": Game("relativistic", r1_gamma=0.02, r2_gamma=0.02),
    "wgan-gp": Game("wgan-gp", gp_weight=0.1),  # 10 for images; 1 kept fewer in as many steps
}
PLAIN, REGULARIZED = ("minimax", "non-saturating", "relativistic"), ("relativistic + R1 + R2", "wgan-gp")


class MLPs(nn.Module):
    """Networks of three hidden layers, one per run: [runs * N, inputs] to [runs * N, outputs], run after run."""

    def __init__(self, runs: int, inputs: int, width: int, outputs: int, slope: float) -> None:
        super().__init__()
        sizes = [inputs, width, width, width, outputs]
        pairs = list(itertools.pairwise(sizes))
        self.weights = nn.ParameterList([torch.randn(runs, i, o) * (2 / i) ** 0.5 for i, o in pairs])
        self.biases = nn.ParameterList([torch.zeros(runs, 1, o) for _, o in pairs])
        self.runs, self.slope = runs, slope

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(self.runs, -1, x.shape[1])
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            x = x if layer == last else leaky_relu(x, self.slope)
        return x.flatten(0, 1)


def train(mixture: Mixture, game: Game, runs: int, seed: int = 0) -> MLPs:
    """Return the generators of trainings that go on at once, each with its own start, networks and samples."""
    torch.manual_seed(seed)
    n, losses = runs * BATCH, objective(game.loss)
    G, D = MLPs(runs, Z_DIM, mixture.width, 2, slope=0.0), MLPs(runs, 2, mixture.width, 1, slope=0.2)
    optimizers = [
        torch.optim.Adam(network.parameters(), rate, BETAS, fused=True)
        for network, rate in ((G, G_LR), (D, mixture.d_lr))
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / mixture.steps))
        for optimizer in optimizers
    ]

    def real() -> Tensor:
        return mixture.centres[torch.randint(len(mixture.centres), (n,))] + STD * torch.randn(n, 2)

    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        (loss * runs).backward()  # the sum over runs of their means
        optimizer.step()

    def d_loss() -> Tensor:
        real_x, fake_x = real().requires_grad_(), G(torch.randn(n, Z_DIM)).detach().requires_grad_()
        real_logits, fake_logits = D(real_x), D(fake_x)
        if isinstance(losses, PairedObjective):
            loss = losses.d(real_logits, fake_logits).mean()
        else:
            loss = losses.d_real(real_logits).mean() + losses.d_fake(fake_logits).mean()
        if game.r1_gamma:
            loss = loss + game.r1_gamma / 2 * r1_penalty(real_x, real_logits).mean()
        if game.r2_gamma:
            loss = loss + game.r2_gamma / 2 * r2_penalty(fake_x, fake_logits).mean()
        if game.gp_weight:
            loss = loss + game.gp_weight * gradient_penalty(D, real_x, fake_x, torch.rand(n)).mean()
        return loss

    def g_loss() -> Tensor:
        fake_logits = D(G(torch.randn(n, Z_DIM)))
        if isinstance(losses, PairedObjective):
            return losses.g(D(real()), fake_logits).mean()
        return losses.g(fake_logits).mean()

    for _ in range(mixture.steps):
        step(optimizers[1], d_loss())
        step(optimizers[0], g_loss())
        for schedule in schedules:
            schedule.step()
    return G


@torch.no_grad()
def kept_modes(G: MLPs, mixture: Mixture) -> tuple[list[int], list[float]]:
    """Return, per run, how many modes it kept and the share of samples within 3 standard deviations of any."""
    modes = len(mixture.centres)
    distances = torch.cdist(G(torch.randn(G.runs * SAMPLES, Z_DIM)), mixture.centres).view(G.runs, SAMPLES, modes)
    near = distances < 3 * STD
    shares = near.float().mean(dim=1)
    return (shares >= KEPT / modes).sum(dim=1).tolist(), near.any(dim=2).float().mean(dim=1).tolist()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads gain nothing on such small products, and wait for each other where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def modes_of(mixture: str, game: str, runs: int) -> list[int]:
    return kept_modes(train(MIXTURES[mixture], GAMES[game], runs), MIXTURES[mixture])[0]


def test_a_regularized_game_keeps_a_ring_where_the_plain_one_drops_modes() -> None:
    """Counted over the runs, for a plain run in three keeps all 8."""
    assert sum(modes_of("ring", "non-saturating", runs=3)) < 8 * 3
    assert modes_of("ring", "relativistic + R1 + R2", runs=3) == [8] * 3


@pytest.mark.slow
@pytest.mark.parametrize("game", REGULARIZED)
def test_regularized_games_keep_a_ring(game: str) -> None:
    assert modes_of("ring", game, runs=4) == [8] * 4


@pytest.mark.slow
@pytest.mark.parametrize("game", PLAIN)
def test_plain_games_drop_modes_of_a_grid(game: str) -> None:
    assert max(modes_of("grid", game, runs=3)) < 25  # in every run


@pytest.mark.slow
@pytest.mark.parametrize("game", REGULARIZED)
def test_regularized_games_keep_a_grid(game: str) -> None:
    assert modes_of("grid", game, runs=3) == [25] * 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    for mixture_name, mixture in MIXTURES.items():
        for game_name, game in GAMES.items():
            for seed in map(int, sys.argv[1:] or ["0"]):
                start = time.monotonic()
                kept, precision = kept_modes(train(mixture, game, 4, seed), mixture)
                counts = "  ".join(f"{count:2} ({share:.2f})" for count, share in zip(kept, precision, strict=True))
                took = time.monotonic() - start
                print(f"{mixture_name:4} of {len(mixture.centres):2}  {game_name:22} {seed=}  {counts}  {took:4.0f} s")
