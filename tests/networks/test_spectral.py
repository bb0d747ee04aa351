"""Spectral normalisation: singular values, derivatives, what changes u and v, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stylepipe.errors import UserError
from stylepipe.networks import dcgan, layers, r3gan, stylegan2
from stylepipe.networks.spectral import add_spectral_norm_, spectral_norms

SMALL = {"channel_base": 128, "channel_max": 16}
LAYERS = {
    "conv": lambda: nn.Conv2d(3, 5, 3),
    "linear": lambda: nn.Linear(6, 4),
    "equalized conv": lambda: layers.Conv2d(3, 5, 3, act="lrelu"),
    "equalized skip": lambda: layers.Conv2d(3, 5, 1, bias=False, down=2, gain=0.5),
    "equalized linear": lambda: layers.Linear(6, 4, lr_multiplier=0.01),
}


def normalized(layer: nn.Module) -> nn.Module:
    add_spectral_norm_(layer)
    return layer


def iterate(module: nn.Module, times: int) -> None:
    for _ in range(times):
        for norm in spectral_norms(module):
            norm.update_()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_weight_that_acts_on_x_has_a_largest_singular_value_of_1(make) -> None:
    layer = normalized(make())
    gain = layer.gains()[0] if isinstance(layer, layers.Equalized) else 1

    def largest() -> float:
        return float(torch.linalg.matrix_norm((layer.weight * gain).detach().flatten(1), ord=2))

    # Power iteration estimates from below, so the quotient is 1 or more; 15 iterations come close, 500 are exact.
    assert 1 - 1e-5 <= largest() < 1.2
    iterate(layer, 500)
    assert largest() == pytest.approx(1, abs=1e-5)
    (norm,) = spectral_norms(layer)
    stored = layer.parametrizations.weight.original.flatten(1)
    sigma = torch.dot(norm.u, stored @ norm.v)
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(stored, ord=2), rtol=1e-5, atol=0)


def test_what_a_layer_computes_is_that_of_the_quotient() -> None:
    conv, x = nn.Conv2d(3, 5, 3, bias=False), torch.randn(2, 3, 6, 6)
    y = conv(x)
    largest = torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2)
    normalized(conv)
    iterate(conv, 500)
    torch.testing.assert_close(conv(x), y / largest, rtol=1e-4, atol=1e-5)


def test_only_update_changes_u_and_v() -> None:
    D = normalized(stylegan2.Discriminator(8, **SMALL))
    before = copy.deepcopy(D.state_dict())
    img = torch.randn(2, 3, 8, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(D(img).sum(), img, create_graph=True)
    dx.square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in D.state_dict().items())
    assert torch.equal(D(img), D(img))
    with torch.no_grad():
        D.b4.fc.parametrizations.weight.original.add_(torch.randn(D.b4.fc.weight.shape))
    iterate(D, 1)
    assert not torch.equal(spectral_norms(D.b4.fc)[0].u, before["b4.fc.parametrizations.weight.0.u"])


def test_the_gradient_is_that_of_the_paper() -> None:
    """Eq. 10: with W' = W / sigma, dV/dW = (dV/dW' - <dV/dW', W'> u v^T) / sigma."""
    linear = normalized(nn.Linear(4, 3, bias=False).double())
    (norm,) = spectral_norms(linear)
    x, dy = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    (linear(x) * dy).sum().backward()
    original = linear.parametrizations.weight.original
    sigma = norm.u @ original @ norm.v
    by_normalized = dy.t() @ x
    expected = (by_normalized - (by_normalized * original / sigma).sum() * torch.outer(norm.u, norm.v)) / sigma
    torch.testing.assert_close(original.grad, expected)


@pytest.mark.parametrize("make", [LAYERS["conv"], LAYERS["linear"]])
def test_second_derivatives(make) -> None:
    layer = normalized(make().double())
    x = torch.randn(2, 3, 4, 4) if isinstance(layer, nn.Conv2d) else torch.randn(2, 6)
    name = "parametrizations.weight.original"

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {name: weight}, (x,)).square()

    inputs = (x.double().requires_grad_(), layer.get_parameter(name))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("network", [stylegan2, dcgan])
@pytest.mark.parametrize("c_dim", [0, 3])
def test_states_and_copies_of_discriminators(network, c_dim: int) -> None:
    D = network.Discriminator(8, c_dim=c_dim, spectral_norm=True, **SMALL)
    c = torch.eye(3)[:2] if c_dim else None
    img = torch.randn(2, 3, 8, 8)
    again = type(D)(**D.config)
    again.load_state_dict(D.state_dict())
    assert torch.equal(again(img, c), D(img, c))
    copied = copy.deepcopy(D)
    logits = D(img, c)
    assert torch.equal(copied(img, c), logits)
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(torch.randn_like(p))
    iterate(copied, 1)  # of its own weights, not of those it was copied from
    norms, stored = spectral_norms(copied), [m for m in copied.modules() if hasattr(m, "parametrizations")]
    for norm, layer in zip(norms, stored, strict=True):
        assert norm._matrix().data_ptr() == layer.parametrizations.weight.original.data_ptr()
    assert torch.equal(D(img, c), logits)


def test_every_layer_of_a_discriminator_trains() -> None:
    D = dcgan.Discriminator(16, norm="none", spectral_norm=True, **SMALL)
    assert len(spectral_norms(D)) == 3
    D(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in D.parameters())


def test_zero_initialised_layers_are_refused() -> None:
    D = r3gan.Discriminator(8, **SMALL)
    with pytest.raises(UserError, match=r"spectral_norm: the weights of b8\.blocks\.0\.conv2 start at zero"):
        add_spectral_norm_(D)
    assert not spectral_norms(D)  # refused as a whole
    with pytest.raises(UserError, match="spectral_norm"):
        r3gan.Discriminator(8, spectral_norm=True, **SMALL)
