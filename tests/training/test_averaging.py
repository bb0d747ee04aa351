"""Averaging in buckets: what is sent and when, and that early or late makes no difference to the bit.

In one process the other one is its twin: a sum over both is twice what is sent. So the mean of a gradient is itself,
and one that was sent before all of it had come would not be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stylepipe.config import Config, EMAConfig, GrowthConfig, LossConfig, NetworkConfig
from stylepipe.datasets.reader import Batch
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training import averaging
from stylepipe.training.arena import Arena
from stylepipe.training.averaging import Averaging, Exchange, cut
from stylepipe.training.engine import Engine, is_healthy

BUCKET = 256  # numbers


class Twins:
    """Starts sums with a process that has the same gradients; notes them, and which began in a backward pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Tensor] = []
        self.early: list[bool] = []
        self._in_backward = False
        backward = torch.Tensor.backward

        def noting(*args: Any, **kwargs: Any) -> None:
            self._in_backward = True
            backward(*args, **kwargs)
            self._in_backward = False

        monkeypatch.setattr(torch.Tensor, "backward", noting)

    def start(self, tensor: Tensor) -> Twins:
        self.sent.append(tensor)
        self.early.append(self._in_backward)
        tensor.mul_(2)
        return self

    def wait(self) -> None: ...

    def take(self) -> tuple[list[int], list[bool]]:
        """Return how many numbers each sum since the last call was over, and whether it began in a backward pass."""
        sizes, early = [tensor.numel() for tensor in self.sent], self.early
        self.sent, self.early = [], []
        return sizes, early


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Twins:
    monkeypatch.setattr(averaging, "BUCKET_BYTES", 4 * BUCKET)
    return Twins(monkeypatch)


@pytest.mark.parametrize(
    ("windows", "places", "buckets"),
    [
        ([(0, 32)], [0, 16], [(0, 32)]),
        ([(0, 64)], [0, 16, 32, 48], [(32, 64), (0, 32)]),
        ([(0, 80)], [0, 16, 32, 48, 64], [(48, 80), (16, 48), (0, 16)]),  # the last takes what is left
        ([(0, 300)], [0, 16], [(16, 300), (0, 16)]),  # one parameter that is larger
        ([(16, 32), (64, 112)], [16, 64, 80, 96], [(80, 112), (64, 80), (16, 32)]),  # none over a gap
        ([(0, 112)], [0, 64, 96], [(64, 112), (0, 64)]),  # what is frozen goes with what is before it
    ],
)
def test_buckets_are_cut_from_the_end_and_cover_what_is_in_use(
    windows: list[tuple[int, int]], places: list[int], buckets: list[tuple[int, int]]
) -> None:
    parts = cut([slice(*window) for window in windows], places, size=32)
    assert [(part.start, part.stop) for part in parts] == buckets


class Chain(nn.Module):
    """Four layers of a bucket each, used from the second to the last and then the first; the third never."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.full((BUCKET,), 1.0 + index) for index in range(4))

    def forward(self) -> Tensor:
        return (self.layers[1] * self.layers[3] * self.layers[0]).sum()


def run(averager: Averaging, network: Chain, terms: int = 1) -> None:
    for p in network.parameters():
        assert p.grad is not None
        p.grad.zero_()
    averager.watch("phase")
    for _ in range(terms):
        network().backward(inputs=list(network.parameters()))
    averager.finish({})


def averager_of(network: Chain, twins: Twins, **settings: Any) -> Averaging:
    arena = Arena(network)
    exchange = Exchange(start=twins.start, **{"overlap": True} | settings)
    return Averaging(arena, arena.trained, arena.windows(arena.trained), 2, exchange)


def places(network: Chain, twins: Twins) -> list[int]:
    """Return the layers of the buckets that were sent."""
    starts = [p.grad.data_ptr() for p in network.layers if p.grad is not None]
    return [starts.index(tensor.data_ptr()) for tensor in twins.sent]


def test_from_the_second_run_on_buckets_are_sent_when_they_are_complete(twins: Twins) -> None:
    network = Chain()
    averager = averager_of(network, twins)
    run(averager, network)
    assert places(network, twins) == [3, 2, 1, 0]
    assert twins.take()[1] == [False] * 4
    for _ in range(2):
        run(averager, network)
        # Layer 2, which never has a gradient, waits for none; those of a product come at once, the last factor's first.
        assert places(network, twins)[0] == 2
        assert sorted(places(network, twins)) == [0, 1, 2, 3]
        assert twins.take()[1] == [True] * 4


def test_with_several_terms_a_bucket_waits_for_the_last(twins: Twins) -> None:
    network = Chain()
    averager = averager_of(network, twins)
    for _ in range(3):
        run(averager, network, terms=3)
        a, b, _, d = (p.detach() for p in network.layers)
        for p, expected in zip(network.layers, (b * d, a * d, 0 * a, a * b), strict=True):
            assert torch.equal(p.grad, 3 * expected)


@pytest.mark.parametrize("terms", [1, 3])
def test_gradients_that_do_not_come_as_in_the_first_run_are_an_error(twins: Twins, terms: int) -> None:
    network = Chain()
    averager = averager_of(network, twins)
    run(averager, network, terms=2)
    with pytest.raises(AssertionError, match="phase: other gradients than in its first run"):
        run(averager, network, terms=terms)


def test_what_fits_one_bucket_is_sent_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    twins, network = Twins(monkeypatch), Chain()
    averager = averager_of(network, twins)
    for _ in range(2):
        run(averager, network)
        assert twins.take() == ([4 * BUCKET], [False])


def test_on_a_cpu_nothing_overlaps_unless_asked_for(twins: Twins) -> None:
    network = Chain()
    averager = averager_of(network, twins, overlap=None)
    for _ in range(2):
        run(averager, network)
    assert not any(twins.take()[1])


@pytest.mark.parametrize("overlap", [True, False])
def test_bf16_sends_half_and_rounds_once(twins: Twins, overlap: bool) -> None:
    network = Chain()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(BUCKET, generator=torch.Generator().manual_seed(p.numel())))
    averager = averager_of(network, twins, overlap=overlap, reduce_dtype="bf16")
    for _ in range(2):
        run(averager, network)
        assert {tensor.dtype for tensor in twins.sent} == {torch.bfloat16}
        a, b, _, d = (p.detach() for p in network.layers)
        for p, exact in zip(network.layers, (b * d, a * d, 0 * a, a * b), strict=True):
            assert torch.equal(p.grad, exact.bfloat16().float())
        twins.take()


def test_recorded_averages_travel_in_one_piece_as_float32(twins: Twins) -> None:
    averager = averager_of(Chain(), twins, reduce_dtype="bf16")
    averages = {"a": torch.tensor(1 / 3), "b": torch.arange(6.0).view(2, 3) / 7}
    means = averager.finish(averages)
    assert [tensor.dtype for tensor in twins.sent] == [torch.bfloat16] * 4 + [torch.float32]
    assert means.keys() == averages.keys()
    for name, mean in means.items():
        assert torch.equal(mean, averages[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
def test_what_is_not_finite_stays_so(twins: Twins, value: float, reduce_dtype: str) -> None:
    network = Chain()
    averager = averager_of(network, twins, reduce_dtype=reduce_dtype)
    with torch.no_grad():
        network.layers[3][0] = value
    run(averager, network)
    assert not network.layers[0].grad[0].isfinite()
    assert network.layers[0].grad[1:].isfinite().all()


# Losses of one term and of several, with gradients of gradients in a phase of their own or in the main one, levels that
# fade in, parts that are frozen, parts that only some phases reach.
TRAININGS: Mapping[str, dict[str, Any]] = {
    "stylegan2": {"augment": "ada", "loss": {"r1_interval": 2, "r2_gamma": 1.0, "pl_interval": 1}},
    "all of D's levels but one frozen": {"freeze_d": 2, "loss": {"r1_interval": 2}},
    "growing": {
        "network": {"kind": "progan"},
        "loss": {"kind": "wgan-gp"},
        "growth": GrowthConfig(start_res=8, stable_kimg=0.008, fade_kimg=0.016),
    },
    "relativistic": {"network": {"kind": "r3gan"}, "loss": {"kind": "relativistic", "r1_gamma": 1.0, "r2_gamma": 1.0}},
    "remedies": {
        "network": {"kind": "dcgan", "spectral_norm": True, "d_last_layer": "normalized"},
        "loss": {"kind": "hinge", "feature_matching": 1.0, "historical_weight": 0.1},
    },
}


def train(exchange: Exchange, changes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state after some steps of the first of two processes, of two micro-batches each."""
    values = {"res": 16, "batch_size": 8, "batch_gpu": 2, "ema": EMAConfig(kimg=0.1)}
    values |= changes
    network = {"channel_base": 128, "channel_max": 16, "z_dim": 16} | values.pop("network", {})
    loss = LossConfig(**values.pop("loss", {}))
    config = Config(preset="auto", network=NetworkConfig(**network), loss=loss, **values)
    config = with_precision(resolve(config, 2), "fp32")
    recipe = GANRecipe(config, torch.device("cpu"), world_size=2)
    engine = Engine(recipe, optim=config.optim, ema=config.ema, world_size=2, exchange=exchange)
    for step in range(5 if "growth" in changes else 3):
        generator, res = torch.Generator().manual_seed(step), recipe.schedule.at(engine.images_seen).resolution
        images = torch.randint(0, 256, (4, res, res, 3), dtype=torch.uint8, generator=generator)
        engine.step(Batch(images, torch.zeros(4, 0), torch.arange(4)))
    assert is_healthy(engine.state())
    return engine.state()


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_early_or_late_is_the_same_to_the_bit(twins: Twins, training: str) -> None:
    late = train(Exchange(start=twins.start), TRAININGS[training])
    sizes, early = twins.take()
    assert not any(early)
    state = train(Exchange(start=twins.start, overlap=True), TRAININGS[training])
    sizes_when_early, early = twins.take()
    assert sorted(sizes_when_early) == sorted(sizes)
    assert any(early)
    for name, tensor in late.items():
        assert torch.equal(state[name], tensor), name


def test_a_process_alone_sends_nothing(twins: Twins) -> None:
    network = NetworkConfig(channel_base=128, channel_max=16, z_dim=16, w_dim=16)
    config = Config(res=16, batch_size=4, batch_gpu=4, network=network)
    config = with_precision(resolve(config, 1), "fp32")
    recipe = GANRecipe(config, torch.device("cpu"))
    engine = Engine(recipe, optim=config.optim, ema=config.ema, exchange=Exchange(overlap=True, start=twins.start))
    for _ in range(2):
        engine.step(Batch(torch.zeros(4, 16, 16, 3, dtype=torch.uint8), torch.zeros(4, 0), torch.arange(4)))
    assert twins.take() == ([], [])
