"""Losses and regularizers against their closed forms."""

import math

import pytest
import torch

from stylepipe.losses.adversarial import logistic_d_fake, logistic_d_real, non_saturating_g
from stylepipe.losses.regularizers import path_lengths, r1_penalty

LOGITS = torch.tensor([[-30.0], [-1.0], [0.0], [2.0], [30.0]], dtype=torch.float64)


def test_losses_are_the_logarithms_of_the_papers():
    sigmoid = LOGITS.sigmoid()
    torch.testing.assert_close(non_saturating_g(LOGITS), -sigmoid.log())
    torch.testing.assert_close(logistic_d_real(LOGITS), -sigmoid.log())
    torch.testing.assert_close(logistic_d_fake(LOGITS)[:4], -(1 - sigmoid).log()[:4])


def test_losses_stay_finite_where_the_logarithm_does_not():
    extreme = torch.tensor([[-1e4], [1e4]])
    for loss in (non_saturating_g, logistic_d_fake, logistic_d_real):
        assert loss(extreme).isfinite().all()


def test_an_undecided_discriminator_costs_two_ln_2():
    zero = torch.zeros(3, 1)
    assert (logistic_d_fake(zero) + logistic_d_real(zero)).mean() == pytest.approx(2 * math.log(2))


def test_r1_of_a_quadratic_discriminator():
    """D(x) = a sum(x^2) has gradient 2 a x, so the penalty is 4 a^2 ||x||^2 and its derivative by a 8 a ||x||^2."""
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(x, a * x.square().sum(dim=(1, 2, 3)).unsqueeze(1))
    norms = x.detach().square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(penalty, 4 * a.detach() ** 2 * norms)
    (slope,) = torch.autograd.grad(penalty.sum(), a)
    torch.testing.assert_close(slope, 8 * a.detach() * norms.sum())


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
