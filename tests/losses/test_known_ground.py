"""Losses where the answer is known: best discriminators of 1-D Gaussians, and two parallel lines."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stylepipe.losses.adversarial import Objective, PairedObjective, objective
from stylepipe.losses.regularizers import gradient_penalty

X = torch.linspace(-12, 12, 4801, dtype=torch.float64)
DX = 24 / 4800


def gaussian(mean: float, std: float) -> Tensor:
    return (-((X - mean) / std).square() / 2).exp() / (std * math.sqrt(2 * math.pi))


P_DATA, P_G = gaussian(0, 1), gaussian(1, 1.5)


def unpaired(name: str, **settings: float) -> Objective:
    losses = objective(name, **settings)
    assert isinstance(losses, Objective)
    return losses


def integral(values: Tensor) -> Tensor:
    return values.sum() * DX  # values vanish at both ends, where a sum of equal steps converges faster than any power


def d_loss(losses: Objective, logits: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """D's expected loss, with real images from p and generated ones from q."""
    return integral(p * losses.d_real(logits) + q * losses.d_fake(logits))


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    middle = (p + q) / 2
    return integral(p * (p / middle).log() + q * (q / middle).log()) / 2


BEST_LOGITS = {
    "minimax": lambda p, q: (p / q).log(),  # Goodfellow et al. 2014, Proposition 1, through the sigmoid
    "non-saturating": lambda p, q: (p / q).log(),
    "lsgan": lambda p, q: (p - q) / (p + q),  # Mao et al. 2017, Eq. 5, with a = -1 and b = 1
    "hinge": lambda p, q: (p - q).sign(),
}


@pytest.mark.parametrize("name", BEST_LOGITS)
def test_the_best_discriminator_is_that_of_the_paper(name: str):
    losses, best = unpaired(name), BEST_LOGITS[name](P_DATA, P_G)
    value = d_loss(losses, best, P_DATA, P_G)
    for _ in range(20):
        assert d_loss(losses, best + 0.3 * torch.randn_like(best), P_DATA, P_G) > value
    assert torch.equal(best > 0, P_DATA > P_G)  # anchored
    if name != "hinge":  # which has a corner there
        logits = best.clone().requires_grad_()
        (slope,) = torch.autograd.grad(d_loss(losses, logits, P_DATA, P_G), logits)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["minimax", "lsgan"])
def test_a_smoothed_label_scales_the_data_in_the_best_discriminator(name: str):
    """Salimans et al. 2016, section 3.4: D* = a p_data / (p_data + p_G), of LSGAN in its coding."""
    share = 0.9 * P_DATA / (P_DATA + P_G)
    best = share.logit() if name == "minimax" else 2 * share - 1
    logits = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(d_loss(unpaired(name, real_label=0.9), logits, P_DATA, P_G), logits)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-15)


def test_the_best_energy_is_0_on_data_and_the_margin_elsewhere():
    """Zhao et al. 2016, Lemma 1 and Theorem 1: D's loss is then m - m integral max(0, p - q), and m if p = q."""
    margin = 3.0
    losses = unpaired("ebgan", margin=margin)
    best = torch.where(P_DATA > P_G, 40.0, -math.log(math.expm1(margin))).double()
    value = d_loss(losses, best, P_DATA, P_G)
    expected = margin * (1 - integral((P_DATA - P_G).clamp(min=0)))
    torch.testing.assert_close(value, expected)
    for _ in range(20):
        assert d_loss(losses, best + torch.randn_like(best), P_DATA, P_G) > value
    torch.testing.assert_close(d_loss(losses, best, P_DATA, P_DATA), torch.tensor(margin, dtype=torch.float64))


def test_the_minimax_game_is_worth_twice_the_divergence_less_log_4():
    """Goodfellow et al. 2014, Theorem 1: V(D*, G) = -log 4 + 2 JS(p_data, p_G), least where the two are equal."""
    losses = unpaired("minimax")
    value = -d_loss(losses, (P_DATA / P_G).log(), P_DATA, P_G)
    torch.testing.assert_close(value, 2 * js_divergence(P_DATA, P_G) - math.log(4))
    undecided = torch.zeros_like(X)
    equal = -d_loss(losses, undecided, P_DATA, P_DATA)
    assert equal.item() == pytest.approx(-math.log(4), abs=1e-12)
    assert value > equal

    g_loss = integral(P_DATA * losses.g(undecided))  # G's part of the value: half of it
    assert g_loss.item() == pytest.approx(-math.log(2), abs=1e-12)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    return integral((p - q).abs()) / 2


DIVERGENCES = {
    "minimax": ("jensen_shannon", js_divergence),
    "non-saturating": ("jensen_shannon", js_divergence),
    "lsgan": ("triangular", lambda p, q: integral((p - q).square() / (p + q))),
    "hinge": ("total_variation", total_variation),
    "ebgan": ("total_variation", total_variation),
}


def estimated(losses: Objective, logits: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The expectation of the estimate over real images from p and generated ones from q: it is a sum of both parts."""
    undecided = torch.zeros_like(logits)
    estimate = losses.divergence.estimate
    of_both = estimate(logits, undecided) * p + estimate(undecided, logits) * q - estimate(undecided, undecided) * p
    return integral(of_both)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_estimated_divergence_is_that_of_the_paper_for_the_best_discriminator_and_less_for_others(name: str):
    known_as, divergence = DIVERGENCES[name]
    losses = unpaired(name)
    assert losses.divergence.name == known_as
    of_energy = torch.where(P_DATA > P_G, 40.0, -math.log(math.expm1(10.0))).double()
    best = of_energy if name == "ebgan" else BEST_LOGITS[name](P_DATA, P_G)
    expected = divergence(P_DATA, P_G)
    torch.testing.assert_close(estimated(losses, best, P_DATA, P_G), expected)
    for _ in range(20):
        assert estimated(losses, best + 0.3 * torch.randn_like(best), P_DATA, P_G) < expected
    assert estimated(losses, best, P_DATA, P_DATA).item() <= 1e-9, "equal distributions have none, whatever D says"


def test_a_smoothed_label_does_not_move_the_estimate():
    best = (P_DATA / P_G).log()
    smoothed, plain = unpaired("minimax", real_label=0.9), unpaired("minimax")
    assert torch.equal(estimated(smoothed, best, P_DATA, P_G), estimated(plain, best, P_DATA, P_G))


def test_the_estimated_distance_of_a_critic_of_slope_1_is_that_of_two_shifted_gaussians():
    """W_1 of N(0, 1) and N(2, 1) is 2, and D(x) = -x attains it."""
    losses = unpaired("wgan-gp")
    assert losses.divergence.name == "wasserstein"
    torch.testing.assert_close(estimated(losses, -X, P_DATA, gaussian(2, 1)), torch.tensor(2.0, dtype=torch.float64))


def test_the_relativistic_estimate_is_0_at_most_for_equal_and_2_log_2_for_separate_distributions():
    losses = objective("relativistic")
    assert losses.divergence.name == "relativistic"
    coarse = X[::40]

    def estimated_of_pairs(logits: Tensor, p: Tensor, q: Tensor) -> float:
        weights = torch.outer(p, q) / (p.sum() * q.sum())
        pairs = losses.divergence.estimate(logits[:, None].expand_as(weights), logits[None].expand_as(weights))
        return (weights * pairs).sum().item()

    p = P_DATA[::40]
    assert estimated_of_pairs(torch.zeros_like(coarse), p, p) == pytest.approx(0, abs=1e-12)
    for _ in range(20):
        assert estimated_of_pairs(torch.randn_like(coarse), p, p) < 0  # by Jensen's inequality
    left, right = (coarse < 0).double(), (coarse > 0).double()
    assert estimated_of_pairs(-40 * coarse.sign(), left, right) == pytest.approx(2 * math.log(2), abs=1e-12)


def mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    ).double()


@pytest.mark.parametrize(("mean", "std"), [(1.0, 1.5), (0.0, 1.0)])
def test_training_finds_the_best_discriminator(mean: float, std: float):
    """The expectation is integrated, so that only the optimizer's and the network's errors remain."""
    losses, q = unpaired("minimax"), gaussian(mean, std)
    D = mlp(1, 16)
    inputs = X[::40].unsqueeze(1)
    p_here, q_here = P_DATA[::40], q[::40]
    optimizer = torch.optim.LBFGS(D.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = D(inputs).squeeze(1)
        loss = 40 * DX * (p_here * losses.d_real(logits) + q_here * losses.d_fake(logits)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        trained = D(X.unsqueeze(1)).squeeze(1)
    distance = integral((P_DATA + q) / 2 * (trained.sigmoid() - P_DATA / (P_DATA + q)).abs())
    assert distance < 2e-3
    value = -d_loss(losses, trained, P_DATA, q)
    assert value.item() == pytest.approx((2 * js_divergence(P_DATA, q) - math.log(4)).item(), abs=1e-4)


# Arjovsky et al. 2017, Example 1: real points (0, y) and generated points (theta, y), y uniform in [0, 1].
THETAS = [-1.0, -0.3, 0.1, 0.5, 2.0]


def lines(theta: float, n: int = 64) -> tuple[Tensor, Tensor]:
    y = torch.rand(n, dtype=torch.float64)
    return torch.stack([torch.zeros(n), y], dim=1), torch.stack([torch.full((n,), theta), y], dim=1)


@pytest.mark.parametrize("theta", THETAS)
def test_the_divergence_of_parallel_lines_is_log_2_however_near(theta: float):
    """A discriminator that knows which side is whose brings V to 0 = -log 4 + 2 JS, and G gets no slope."""
    losses = unpaired("minimax")
    real, fake = lines(theta)
    fake.requires_grad_()
    values, slopes = [], []
    for steepness in (10, 100, 1000):

        def D(points: Tensor, steepness: int = steepness) -> Tensor:
            return steepness * (theta / 2 - points[:, :1]) / theta

        values.append(-(losses.d_real(D(real)) + losses.d_fake(D(fake))).mean().item())
        slopes.append(torch.autograd.grad(losses.g(D(fake)).mean(), fake)[0].abs().max().item())
    divergence = (values[-1] + math.log(4)) / 2
    assert divergence == pytest.approx(math.log(2), abs=1e-9)
    assert values == sorted(values)
    assert slopes[-1] < 1e-100


def test_the_divergence_of_equal_lines_is_0():
    losses = unpaired("minimax")
    undecided = torch.zeros(8, 1, dtype=torch.float64)
    value = -(losses.d_real(undecided) + losses.d_fake(undecided)).mean().item()
    assert (value + math.log(4)) / 2 == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("theta", THETAS)
def test_a_linear_critic_measures_the_distance_of_parallel_lines(theta: float, one_sided: bool):
    """D = w^T x: max over w of E D(real) - E D(fake) - lambda (||w|| - 1)^2 has ||w|| = 1 + |theta| / (2 lambda).

    The estimate is then |theta| + theta^2 / (2 lambda): the penalty lets the slope exceed 1 a little.
    """
    losses, weight = unpaired("wgan-gp"), 50.0
    real, fake = lines(theta)
    w = torch.tensor([[0.3], [0.4]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    u = torch.rand(len(real), dtype=torch.float64)

    def critic(points: Tensor) -> Tensor:
        return points @ w

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = gradient_penalty(critic, real, fake, u, one_sided=one_sided).mean()
        loss = (losses.d_real(critic(real)) + losses.d_fake(critic(fake))).mean() + weight * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    estimate = (critic(real) - critic(fake)).mean().item()
    assert estimate == pytest.approx(abs(theta) + theta**2 / (2 * weight), rel=1e-5)

    fake.requires_grad_()  # where JS gives G nothing, the critic tells it to go to the line at 0, at any distance
    (slope,) = torch.autograd.grad(losses.g(critic(fake)).sum(), fake)
    expected = math.copysign(1 + abs(theta) / (2 * weight), theta)
    torch.testing.assert_close(slope[:, 0], torch.full_like(slope[:, 0], expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("theta", [-1.0, 0.5])
def test_a_trained_critic_measures_the_distance_of_parallel_lines(theta: float):
    losses, weight = unpaired("wgan-gp"), 10.0
    critic = mlp(2, 16)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    for _ in range(300):
        real, fake = lines(theta)
        penalty = gradient_penalty(critic, real, fake, torch.rand(len(real), dtype=torch.float64)).mean()
        loss = (losses.d_real(critic(real)) + losses.d_fake(critic(fake))).mean() + weight * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = lines(theta, 1000)
    estimate = (critic(real) - critic(fake)).mean().item()
    # As of a linear critic, and no better: steeper than 1 + |theta| / (2 lambda) nowhere pays. 3 % for the optimizer.
    assert estimate == pytest.approx(abs(theta) + theta**2 / (2 * weight), rel=0.03)


def test_relativistic_pairs_are_undecided_where_distributions_are_equal():
    """D's loss is log 2 for every constant D, and any other D costs more in expectation over independent pairs."""
    losses = objective("relativistic")
    assert isinstance(losses, PairedObjective)
    real, fake = torch.randn(2, 2000, 1, dtype=torch.float64)  # logits of a D that sees differences in equal things
    assert losses.d(torch.full_like(real, 7), torch.full_like(real, 7)).mean().item() == pytest.approx(math.log(2))
    pairs = losses.d(real, fake.T)
    assert pairs.mean() > math.log(2)
