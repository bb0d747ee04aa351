"""Losses and regularizers against their closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.losses.adversarial import (
    OBJECTIVES,
    Objective,
    PairedObjective,
    auxiliary_classification,
    feature_matching,
    logistic_d_fake,
    logistic_d_real,
    non_saturating_g,
    objective,
    san_d_fake,
    san_d_real,
)
from stylepipe.losses.regularizers import (
    HistoricalAverage,
    clip_weights_,
    drift,
    gradient_penalty,
    path_lengths,
    r1_penalty,
    r2_penalty,
)

LOGITS = torch.tensor([[-30.0], [-1.0], [0.0], [2.0], [30.0]], dtype=torch.float64)
UNPAIRED = [name for name in OBJECTIVES if name != "relativistic"]
SMOOTHABLE = ("minimax", "non-saturating", "lsgan")

# What the papers write: D's loss on real images, D's on generated ones, G's; of the logit x.
CLOSED_FORMS: dict[str, tuple[Callable[[float], float], ...]] = {
    "minimax": (lambda x: -log_sigmoid(x), lambda x: -log_sigmoid(-x), lambda x: log_sigmoid(-x)),
    "non-saturating": (lambda x: -log_sigmoid(x), lambda x: -log_sigmoid(-x), lambda x: -log_sigmoid(x)),
    "wgan": (lambda x: -x, lambda x: x, lambda x: -x),
    "wgan-gp": (lambda x: -x, lambda x: x, lambda x: -x),
    "lsgan": (lambda x: (x - 1) ** 2 / 2, lambda x: (x + 1) ** 2 / 2, lambda x: (x - 1) ** 2 / 2),
    "hinge": (lambda x: max(0, 1 - x), lambda x: max(0, 1 + x), lambda x: -x),
    "ebgan": (lambda x: -log_sigmoid(x), lambda x: max(0, 10 + log_sigmoid(x)), lambda x: -log_sigmoid(x)),
}


def log_sigmoid(logit: float) -> float:
    return -math.log1p(math.exp(-logit))


def unpaired(name: str, **settings: float) -> Objective:
    losses = objective(name, **settings)
    assert isinstance(losses, Objective)
    return losses


def relativistic() -> PairedObjective:
    losses = objective("relativistic")
    assert isinstance(losses, PairedObjective)
    return losses


def test_losses_are_the_logarithms_of_the_papers():
    sigmoid = LOGITS.sigmoid()
    torch.testing.assert_close(non_saturating_g(LOGITS), -sigmoid.log())
    torch.testing.assert_close(logistic_d_real(LOGITS), -sigmoid.log())
    torch.testing.assert_close(logistic_d_fake(LOGITS)[:4], -(1 - sigmoid).log()[:4])


def test_losses_stay_finite_where_the_logarithm_does_not():
    extreme = torch.tensor([[-1e4], [1e4]], requires_grad=True)
    for name in UNPAIRED:
        losses = unpaired(name)
        for loss in (losses.d_real, losses.d_fake, losses.g):
            value = loss(extreme)
            assert value.isfinite().all()
            assert torch.autograd.grad(value.sum(), extreme)[0].isfinite().all()
    for loss in (relativistic().d, relativistic().g):
        assert loss(extreme, -extreme).isfinite().all()


def test_an_undecided_discriminator_costs_two_ln_2():
    zero = torch.zeros(3, 1)
    assert (logistic_d_fake(zero) + logistic_d_real(zero)).mean() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("name", UNPAIRED)
def test_every_objective_is_its_closed_form(name: str):
    losses = unpaired(name)
    for loss, closed_form in zip((losses.d_real, losses.d_fake, losses.g), CLOSED_FORMS[name], strict=True):
        expected = [[closed_form(x)] for x in LOGITS.flatten().tolist()]
        torch.testing.assert_close(loss(LOGITS), torch.tensor(expected, dtype=torch.float64))


def test_relativistic_losses_compare_pairs():
    real, fake = torch.randn(5, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    losses = relativistic()
    torch.testing.assert_close(losses.d(real, fake), -(real - fake).sigmoid().log())
    torch.testing.assert_close(losses.g(real, fake), -(fake - real).sigmoid().log())


@pytest.mark.parametrize("name", UNPAIRED)
def test_slopes_of_every_objective_agree_with_finite_differences(name: str):
    logits = torch.tensor([[-3.1], [-0.7], [0.3], [2.2]], dtype=torch.float64, requires_grad=True)  # off the corners
    losses = unpaired(name, margin=2.0)
    for loss in (losses.d_real, losses.d_fake, losses.g):
        assert torch.autograd.gradcheck(loss, logits)
        assert torch.autograd.gradgradcheck(loss, logits)


def test_slopes_of_pairs_agree_with_finite_differences():
    pair = torch.randn(2, 4, 1, dtype=torch.float64, requires_grad=True).unbind()
    for loss in (relativistic().d, relativistic().g):
        assert torch.autograd.gradcheck(loss, pair)
        assert torch.autograd.gradgradcheck(loss, pair)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_have_one_float32_value_per_image(name: str):
    losses, logits = objective(name), torch.randn(5, 1)
    if isinstance(losses, PairedObjective):
        values = [losses.d(logits, logits), losses.g(logits, logits)]
    else:
        values = [losses.d_real(logits), losses.d_fake(logits), losses.g(logits)]
    assert all(value.shape == (5, 1) and value.dtype == torch.float32 for value in values)


@pytest.mark.parametrize("name", UNPAIRED)
def test_descent_pulls_logits_where_each_player_wants_them(name: str):
    losses = unpaired(name)
    for loss, sign in ((losses.d_real, 1), (losses.d_fake, -1), (losses.g, 1)):
        logit = torch.zeros(1, 1, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(logit).sum(), logit)
        assert -slope * sign > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_anchored_objective_knows_its_logits_and_others_only_differences(name: str):
    """Shifting all logits leaves D's loss as it is exactly where 0 is no boundary, but for energies: bounded."""
    losses = objective(name)
    real, fake = torch.randn(2, 6, 1, dtype=torch.float64)

    def d_loss(shift: float) -> Tensor:
        if isinstance(losses, PairedObjective):
            return losses.d(real + shift, fake + shift).mean()
        return (losses.d_real(real + shift) + losses.d_fake(fake + shift)).mean()

    same = torch.isclose(d_loss(0), d_loss(3))
    assert losses.anchored is (name in ("minimax", "non-saturating", "lsgan", "hinge"))
    assert same == (not losses.anchored and name != "ebgan")


def test_an_undecided_energy_is_not_at_logit_0():
    """Where p_data = p_G, D's loss is the margin whatever the energy from 0 to it: no logit means undecided."""
    losses = unpaired("ebgan", margin=4.0)
    energies = torch.linspace(0.01, 3.99, 50, dtype=torch.float64)
    logits = -(energies.expm1()).log().unsqueeze(1)
    torch.testing.assert_close(losses.d_real(logits).flatten(), energies)
    torch.testing.assert_close(losses.d_real(logits) + losses.d_fake(logits), torch.full_like(logits, 4))


@pytest.mark.parametrize("name", SMOOTHABLE)
def test_a_smoothed_label_changes_the_target_for_real_images_alone(name: str):
    smoothed, sharp = unpaired(name, real_label=0.9), unpaired(name)
    torch.testing.assert_close(smoothed.d_fake(LOGITS), sharp.d_fake(LOGITS), rtol=0, atol=0)
    logits = torch.linspace(-4, 4, 8001, dtype=torch.float64).unsqueeze(1)
    best = logits[smoothed.d_real(logits).argmin()].item()
    assert best == pytest.approx(2 * 0.9 - 1 if name == "lsgan" else math.log(0.9 / 0.1), abs=1e-3)
    if name != "lsgan":
        expected = 0.9 * sharp.d_real(LOGITS) + 0.1 * sharp.d_fake(LOGITS)
        torch.testing.assert_close(smoothed.d_real(LOGITS), expected)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in SMOOTHABLE])
def test_a_smoothed_label_is_refused_where_there_is_none(name: str):
    with pytest.raises(UserError, match=r"--loss\.real-label 0\.9: .*leave it at 1, or choose one of"):
        objective(name, real_label=0.9)


@pytest.mark.parametrize("label", [0.5, 0.0, 1.1, math.nan])
def test_labels_out_of_range_are_refused(label: float):
    with pytest.raises(UserError, match=rf"--loss\.real-label {label}: expected"):
        objective("minimax", real_label=label)


@pytest.mark.parametrize("margin", [0.0, -1.0, math.inf, math.nan])
def test_margins_out_of_range_are_refused(margin: float):
    with pytest.raises(UserError, match=rf"--loss\.margin {margin}: expected"):
        objective("ebgan", margin=margin)


def test_unknown_objectives_are_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"--loss wgangp: .*did you mean wgan-gp\?"):
        objective("wgangp")


def test_san_trains_the_direction_by_the_wasserstein_loss():
    """D(x) = <w, h>: its direction term moves w towards mean h(x) - mean h(G(z)), and h not at all."""
    w, real_h, fake_h = (torch.randn(*shape, requires_grad=True) for shape in ((3,), (4, 3), (4, 3)))
    real, fake = ((h.detach() @ w).unsqueeze(1) for h in (real_h, fake_h))
    loss = (san_d_real(real) + san_d_fake(fake)).mean()
    w_slope, h_slope = torch.autograd.grad(loss, (w, real_h), allow_unused=True)
    torch.testing.assert_close(-w_slope, (real_h - fake_h).mean(dim=0).detach())
    assert h_slope is None


def test_feature_matching_is_the_squared_distance_of_means():
    real, fake = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True).unbind()
    loss = feature_matching(real, fake)
    expected = sum((a - b) ** 2 for a, b in zip(real.mean(0).tolist(), fake.mean(0).tolist(), strict=True))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(feature_matching, (real, fake))


def test_auxiliary_classification_is_the_log_likelihood():
    logits, c = torch.randn(4, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[[0, 2, 1, 2]]
    expected = -(logits.exp() / logits.exp().sum(1, keepdim=True))[range(4), [0, 2, 1, 2]].log()
    torch.testing.assert_close(auxiliary_classification(logits, c).flatten(), expected)


def quadratic(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: a * x.square().flatten(1).sum(dim=1, keepdim=True)


def linear(w: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x.flatten(1) @ w.unsqueeze(1) + 0.3


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("penalty_of", [r1_penalty, r2_penalty])
def test_r1_and_r2_of_a_quadratic_discriminator(penalty_of: Callable[[Tensor, Tensor], Tensor]):
    """D(x) = a sum(x^2) has gradient 2 a x, so the penalty is 4 a^2 ||x||^2 and its derivative by a 8 a ||x||^2."""
    x = images().requires_grad_()
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    penalty = penalty_of(x, quadratic(a)(x))
    norms = x.detach().square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(penalty, 4 * a.detach() ** 2 * norms)
    (slope,) = torch.autograd.grad(penalty.sum(), a)
    torch.testing.assert_close(slope, 8 * a.detach() * norms.sum())


def test_penalties_of_a_linear_discriminator():
    """D(x) = w^T x + b has gradient w everywhere: R1 = R2 = ||w||^2, and the gradient penalty (||w|| - t)^2 / t^2."""
    w = torch.randn(48, dtype=torch.float64, requires_grad=True)
    D, real, fake = linear(w), images().requires_grad_(), images().requires_grad_()
    square, norm = w.detach().square().sum(), w.detach().norm()
    torch.testing.assert_close(r1_penalty(real, D(real)), square.expand(3))
    torch.testing.assert_close(r2_penalty(fake, D(fake)), square.expand(3))
    u = torch.rand(3, dtype=torch.float64)
    for target in (1.0, 750.0):
        penalty = gradient_penalty(D, real, fake, u, target)
        torch.testing.assert_close(penalty, ((norm - target) ** 2 / target**2).expand(3))
        (slope,) = torch.autograd.grad(penalty.mean(), w)
        torch.testing.assert_close(slope, 2 * (norm - target) / target**2 * w.detach() / norm)
        one_sided = gradient_penalty(D, real, fake, u, target, one_sided=True)
        torch.testing.assert_close(one_sided, ((norm - target).clamp(min=0) ** 2 / target**2).expand(3))


def test_gradient_penalty_looks_between_each_real_image_and_its_generated_one():
    """D(x) = sum(x^2) / 2 has gradient x, which tells where it was taken."""
    real, fake = images(), images()
    u = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    points = torch.stack([fake[0], 0.25 * real[1] + 0.75 * fake[1], real[2]])
    D = quadratic(torch.tensor(0.5, dtype=torch.float64))
    expected = (points.flatten(1).norm(dim=1) - 1).square()
    torch.testing.assert_close(gradient_penalty(D, real, fake, u), expected)


def test_gradient_penalty_does_not_reach_the_generator():
    fake = images().requires_grad_()
    w = torch.randn(48, dtype=torch.float64, requires_grad=True)
    gradient_penalty(linear(w), images(), fake, torch.rand(3, dtype=torch.float64)).sum().backward()
    assert fake.grad is None


@pytest.mark.parametrize("one_sided", [False, True])
def test_a_flat_critic_has_a_finite_penalty_and_finite_slopes(one_sided: bool):
    """The norm's derivative is infinite at 0: a critic that is flat somewhere must not turn into NaN."""
    w = torch.zeros(48, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(linear(w), images(), images(), torch.rand(3, dtype=torch.float64), one_sided=one_sided)
    assert penalty.tolist() == [0.0 if one_sided else 1.0] * 3
    (slope,) = torch.autograd.grad(penalty.sum(), w, create_graph=True)
    assert torch.equal(slope, torch.zeros_like(w))
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), w)
        assert curvature.isfinite().all()


def test_one_flat_image_leaves_the_slopes_of_others_alone():
    """A dead ReLU: D is flat at the first image, and linear at the second."""
    w = torch.ones(48, dtype=torch.float64, requires_grad=True)
    x = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 1.0)]).double()

    def D(img: Tensor) -> Tensor:
        return linear(w)(img).relu()

    penalty = gradient_penalty(D, x, x, torch.rand(2, dtype=torch.float64))
    norm = 48**0.5
    torch.testing.assert_close(penalty.detach(), torch.tensor([1.0, (norm - 1) ** 2], dtype=torch.float64))
    (slope,) = torch.autograd.grad(penalty.sum(), w)
    torch.testing.assert_close(slope, 2 * (norm - 1) / norm * w.detach())


@pytest.mark.parametrize("kind", ["r1", "r2", "two-sided", "one-sided"])
def test_slopes_by_weights_agree_with_finite_differences(kind: str):
    """What trains D: derivatives, by its weights, of a penalty that holds derivatives by its input."""
    real, fake = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    u = torch.rand(3, dtype=torch.float64)
    W1 = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    W2 = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)

    def penalty(W1: Tensor, W2: Tensor) -> Tensor:
        def D(img: Tensor) -> Tensor:
            return (img.flatten(1) @ W1).tanh() @ W2

        if kind in ("r1", "r2"):
            img = (real if kind == "r1" else fake).clone().requires_grad_()
            return (r1_penalty if kind == "r1" else r2_penalty)(img, D(img))
        return gradient_penalty(D, real, fake, u, target=0.1, one_sided=kind == "one-sided")

    assert penalty(W1, W2).min() > 0
    assert torch.autograd.gradcheck(penalty, (W1, W2))


def test_drift_is_the_squared_logit():
    torch.testing.assert_close(drift(LOGITS), LOGITS**2)


def test_clipping_bounds_every_weight_in_place():
    D = torch.nn.Linear(4, 3)
    before = [parameter.detach().clone() for parameter in D.parameters()]
    kept = [parameter.data_ptr() for parameter in D.parameters()]
    clip_weights_(D.parameters(), 0.1)
    for parameter, old, address in zip(D.parameters(), before, kept, strict=True):
        assert torch.equal(parameter, old.clamp(-0.1, 0.1))
        assert parameter.data_ptr() == address
        assert parameter.requires_grad
        assert parameter.grad_fn is None


def test_the_historical_average_is_the_mean_of_all_past_values():
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    average = HistoricalAverage(parameters)
    assert average.penalty(parameters).item() == 0  # no past yet
    past = []
    for _ in range(20):
        for parameter in parameters:
            parameter.data.add_(torch.randn_like(parameter))
        average.update_(parameters)
        past.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    mean = torch.stack(past).mean(dim=0)
    torch.testing.assert_close(average.state["mean"], mean)
    assert average.state["count"].item() == 20

    penalty = average.penalty(parameters)
    assert penalty.shape == ()
    torch.testing.assert_close(penalty.detach(), (past[-1] - mean).square().sum())
    slopes = torch.autograd.grad(penalty, parameters)
    torch.testing.assert_close(torch.cat([slope.flatten() for slope in slopes]), 2 * (past[-1] - mean))


def test_a_historical_average_goes_on_from_its_state():
    parameters = [torch.nn.Parameter(torch.randn(5))]
    first = HistoricalAverage(parameters)
    for _ in range(3):
        parameters[0].data.mul_(1.5)
        first.update_(parameters)
    second = HistoricalAverage(parameters)
    for name, tensor in second.state.items():
        tensor.copy_(first.state[name])
    parameters[0].data.mul_(-1)
    for average in (first, second):
        average.update_(parameters)
    assert torch.equal(first.penalty(parameters), second.penalty(parameters))


def test_path_length_of_a_linear_generator():
    """img = A w per layer: the gradient of sum(img * y) is A^T y, whatever w."""
    n, num_ws, w_dim, side = 2, 3, 5, 4
    A = torch.randn(num_ws, w_dim, 3 * side * side, dtype=torch.float64, requires_grad=True)
    ws = torch.randn(n, num_ws, w_dim, dtype=torch.float64, requires_grad=True)
    img = torch.einsum("nlw,lwp->np", ws, A).reshape(n, 3, side, side)
    y = torch.randn(n, 3, side, side, dtype=torch.float64)
    lengths = path_lengths(img, ws, y)
    gradient = torch.einsum("lwp,np->nlw", A.detach(), y.flatten(1)) / side
    torch.testing.assert_close(lengths.detach(), gradient.square().sum(2).mean(1).sqrt())
    assert torch.autograd.grad(lengths.sum(), A)[0].abs().sum() > 0
