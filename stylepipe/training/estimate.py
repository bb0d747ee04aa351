"""What a training will cost, counted without running it: operations and memory of each phase.

The phases run on fake tensors, which have shapes and no data. So 1024 px at any batch size takes a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stylepipe.config import Config
from stylepipe.training.arena import mark_trained
from stylepipe.training.phase import MicroBatch, Phase, Recipe, Record

_COPIES = 5  # of every weight: parameter, gradient, two moments, moving average
_LARGEST_TEMPORARIES = 4  # tensors of the largest kind that live beside the kept ones, in a convolution's backward


@dataclass(frozen=True)
class Estimate:
    """Cost of one micro-batch.

    Attributes:
        flops: floating point operations of each phase, by name (a multiplication and an addition are two).
        memory_bytes: what training holds at its peak: weights in all copies, and the activations of the hungriest phase.
    """

    flops: dict[str, float]
    memory_bytes: int


def estimate(build: Callable[[int], Recipe], config: Config, c_dim: int, batch_gpu: int) -> Estimate:
    """Count the cost of the phases on micro-batches of `batch_gpu` images; `build` makes the recipe for them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        recipe = build(batch_gpu)
        weights = sum(p.numel() * p.element_size() for net in recipe.networks.values() for p in net.parameters())
        flops: dict[str, float] = {}
        activations = 0
        for phase in recipe.phases:
            flops[phase.name], kept = _cost(recipe, phase, config.res, c_dim, batch_gpu)
            activations = max(activations, kept)
    return Estimate(flops, weights * _COPIES + activations)


def flops_per_image(recipe: Recipe, cost: Estimate, batch_gpu: int) -> float:
    """Return the operations of training on one image, lazy phases at their share."""
    return sum(cost.flops[phase.name] / phase.interval for phase in recipe.phases) / batch_gpu


def format_duration(seconds: float) -> str:
    """Return a duration as people say it: "45 s", "3.2 h", "12 days", "2.1 years"."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600), (63_072_000, "days", 86_400)):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 31_536_000:.3g} years"


def _cost(recipe: Recipe, phase: Phase, res: int, c_dim: int, batch_gpu: int) -> tuple[float, int]:
    """Return operations and bytes of kept activations of one phase on one micro-batch."""
    network = recipe.networks[phase.trains]
    for other in recipe.networks.values():
        mark_trained(other, other is network)
    resident = {_storage(p)[0] for net in recipe.networks.values() for p in net.parameters()}
    kept: dict[int, int] = {}
    largest = peak = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        key, size = _storage(tensor)
        if key not in resident:
            kept[key] = size
            largest = max(largest, size)
        return tensor

    img = torch.zeros(batch_gpu, 3, res, res).to(memory_format=torch.channels_last)
    micro_batch = MicroBatch(
        list(range(batch_gpu)), recipe.schedule.at(0), img if phase.uses_reals else None, torch.zeros(batch_gpu, c_dim)
    )
    trained = list(network.parameters())
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for term in phase.loss(micro_batch, Record(img.device)):
                peak = max(peak, sum(kept.values()))
                torch.autograd.grad(term, trained, allow_unused=True)
                kept.clear()
        flops = counter.get_total_flops()
    return flops, peak + _LARGEST_TEMPORARIES * largest


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()
