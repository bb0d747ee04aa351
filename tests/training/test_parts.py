"""Arena, moving average and schedule, each alone."""

import pytest
import torch
from torch import nn

from stylepipe.training.arena import Arena, mark_trained, trained_parameters
from stylepipe.training.ema import EMA, ema_decay
from stylepipe.training.growth import FixedResolution
from stylepipe.training.trainer import last_image


def test_parameters_and_gradients_are_views_of_the_arena():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Conv2d(2, 3, 3))
    before = [p.detach().clone() for p in module.parameters()]
    arena = Arena(module)
    for p, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.data_ptr() % 64 == arena.params.data_ptr() % 64
    module[0](torch.ones(1, 3)).sum().backward()
    assert arena.grad.sum() == module[0].weight.grad.sum() + module[0].bias.grad.sum() == 20
    with torch.no_grad():
        arena.params.zero_()
    assert module[1].weight.abs().sum() == 0
    arena.grad.zero_()
    assert module[0].weight.grad.abs().sum() == 0


def test_an_optimizer_on_the_arena_is_one_on_the_parameters():
    def train(flat):
        torch.manual_seed(1)
        module = nn.Linear(4, 4)
        arena = Arena(module) if flat else None
        optimizer = torch.optim.Adam([arena.params] if flat else module.parameters(), lr=0.1)
        for _ in range(3):
            arena.grad.zero_() if flat else optimizer.zero_grad(set_to_none=False)
            module(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        return module.weight.detach()

    torch.testing.assert_close(train(True), train(False))


def test_mark_trained():
    module = nn.Linear(2, 2)
    mark_trained(trained_parameters(module), False)
    assert trained_parameters(module) == []


def test_frozen_parameters_stay_as_they_are():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[0].requires_grad_(False)
    before = [p.detach().clone() for p in module.parameters()]
    arena = Arena(module)
    assert arena.trained == list(module[1].parameters())
    optimizer = torch.optim.Adam([arena.params], lr=0.1, betas=(0.9, 0.99))
    for _ in range(3):
        arena.grad.zero_()
        module(torch.ones(2, 3)).square().sum().backward(inputs=arena.trained)
        optimizer.step()
    changed = [not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True)]
    assert changed == [False, False, True, True]
    assert sum(window.stop - window.start for window in arena.frozen) == 12


def test_ema_halves_in_its_half_life():
    assert ema_decay(10**9, 1000, 10.0, 0.0) ** 10 == pytest.approx(0.5)
    # ramp-up 0.05: after 2,000 images the half-life is 100 images
    assert ema_decay(2000, 100, 10.0, 0.05) == pytest.approx(0.5)
    assert ema_decay(0, 32, 10.0, 0.05) == 0


def test_ema_follows_weights_and_leaves_buffers():
    source, average = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    arena = Arena(source)
    ema = EMA(average, arena)
    with torch.no_grad():
        source.weight.fill_(3.0)
        source.running_mean.fill_(7.0)
    ema.update(0.75, arena.windows(arena.trained))
    assert average.weight.tolist() == [1.5] * 4
    assert average.running_mean.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("first", "kimg", "batch_size", "last"),
    [(0, 1.1, 10, 1100), (0, 0.008, 32, 32), (0, 1e-9, 8, 8), (128, 0.14, 20, 148), (64, 0.05, 8, 64)],
)
def test_training_ends_with_the_batch_that_reaches_its_length(first, kimg, batch_size, last):
    assert last_image(FixedResolution(16, batch_size, 1), first, kimg) == last


def test_a_fixed_resolution_counts_steps():
    stage = FixedResolution(64, 32, 8).at(320)
    assert (stage.resolution, stage.alpha, stage.batch_size, stage.step) == (64, 1.0, 32, 10)
