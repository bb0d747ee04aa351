"""Batch normalisation against torch's, virtual batch normalisation against its definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stylepipe.networks.norms import BatchNorm2d, VirtualBatchNorm2d, batch_norms


def drawn_like(norm: nn.Module) -> nn.Module:
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm


def test_batch_norm_is_torchs_in_training_and_evaluation() -> None:
    ours = drawn_like(BatchNorm2d(5))
    theirs = nn.BatchNorm2d(5, momentum=0.1)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for _ in range(3):
        x = (torch.randn(4, 5, 6, 6) * 3 + 2).to(memory_format=torch.channels_last)
        # Two ways of adding up 144 numbers in float32.
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
        assert ours(x).is_contiguous(memory_format=torch.channels_last)
        ours.follow_(ours.noted, 0.1)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-6, atol=1e-6)


def test_batch_norm_leaves_its_running_statistics_to_the_trainer() -> None:
    norm = BatchNorm2d(3)
    assert torch.equal(norm.noted, torch.tensor([[0.0] * 3, [1.0] * 3]))
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    norm(x)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert not norm.noted.requires_grad
    torch.testing.assert_close(norm.noted, torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3))]).detach())
    noted = norm.noted
    norm.eval()(x + 1)
    assert norm.noted is noted
    assert norm(torch.full((1, 3, 2, 2), 2.0)).shape == (1, 3, 2, 2)


def test_statistics_that_are_not_finite_are_not_followed() -> None:
    norm = BatchNorm2d(2)
    norm.follow_(torch.tensor([[1.0, float("nan")], [float("inf"), 3.0]]), 0.5)
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(norm.running_var, torch.tensor([1.0, 2.0]))


def test_batch_norms_are_found_in_order() -> None:
    network = nn.Sequential(BatchNorm2d(1), nn.Sequential(nn.ReLU(), BatchNorm2d(2)), VirtualBatchNorm2d(1, 2))
    assert [norm.weight.numel() for norm in batch_norms(network)] == [1, 2]


def test_virtual_batch_norm_is_its_definition() -> None:
    norm = drawn_like(VirtualBatchNorm2d(3, 4)).double()
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64) * 2 + 1
    y = norm(x)
    weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]

    def normalized(image: torch.Tensor, mean: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
        return (image - mean) / (mean_square - mean.square() + 1e-5).sqrt() * weight + bias

    mean_ref, square_ref = (m.mean((0, 2, 3), keepdim=True)[0] for m in (x[:4], x[:4].square()))
    for i in range(4):
        torch.testing.assert_close(y[i], normalized(x[i], mean_ref, square_ref))
    for i in (4, 5):
        own = (m.mean((1, 2), keepdim=True) for m in (x[i], x[i].square()))
        mean, square = ((4 * r + o) / 5 for r, o in zip((mean_ref, square_ref), own, strict=True))
        torch.testing.assert_close(y[i], normalized(x[i], mean, square))


def test_virtual_batch_norm_of_an_image_depends_on_no_other() -> None:
    norm = VirtualBatchNorm2d(3, 4)
    reference, x = torch.randn(4, 3, 5, 5), torch.randn(3, 3, 5, 5)
    together = norm(torch.cat([reference, x]))
    alone = torch.cat([norm(torch.cat([reference, image[None]]))[4:] for image in x])
    assert torch.equal(together[4:], alone)
    assert torch.equal(norm.eval()(torch.cat([reference, x])), together)


@pytest.mark.parametrize("norm", [BatchNorm2d(3), VirtualBatchNorm2d(3, 2)])
def test_norms_calculate_in_float32_whatever_comes(norm: nn.Module) -> None:
    x = (
        torch.randn(4, 3, 8, 8).add(100).bfloat16()
    )  # at 100, bfloat16 is spaced by 0.5: no variance could be taken in it
    y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm(x.float()), rtol=2**-8, atol=1e-3)  # the output's own rounding


@pytest.mark.parametrize("norm", [BatchNorm2d(2), VirtualBatchNorm2d(2, 2)])
def test_norms_have_second_derivatives(norm: nn.Module) -> None:
    norm = drawn_like(copy.deepcopy(norm)).double()
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, dict(zip(("weight", "bias"), parameters, strict=True)), (x,))

    inputs = (x, norm.weight, norm.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
