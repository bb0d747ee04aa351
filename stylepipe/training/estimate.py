"""What a training will cost, counted without running it: operations and memory of each phase.

The phases run on PyTorch's meta device, where tensors have shapes and no data. So 1024 px at any batch size takes a few
seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from stylepipe.training.arena import mark_only, mark_trained, trained_parameters
from stylepipe.training.growth import Stage
from stylepipe.training.phase import MicroBatch, Phase, Recipe, Record

_COPIES = 4  # of every weight: parameter, gradient, two moments
_AVERAGES = 3  # of averaged networks: the moving average, and two for `stylepipe ema`
_LARGEST_TEMPORARIES = 4  # tensors of the largest kind that live beside the kept ones, in a convolution's backward


@dataclass(frozen=True)
class Estimate:
    """Cost of one micro-batch.

    Attributes:
        flops: floating point operations of each phase, by name (a multiplication and an addition are two).
        memory_bytes: what training holds at its peak: all copies of the weights, activations of the hungriest phase.
    """

    flops: dict[str, float]
    memory_bytes: int


def estimate(recipe: Recipe, c_dim: int, batch_gpu: int, stage: Stage | None = None) -> Estimate:
    """Count the cost of the phases of a recipe on the meta device, on micro-batches of `batch_gpu` images.

    That of a stage; by default of the last, which takes the most.
    """
    stage = recipe.schedule.final() if stage is None else stage
    trained = {name: trained_parameters(network) for name, network in recipe.networks.items()}
    costs = {phase.name: _cost(recipe, trained, phase, stage, c_dim, batch_gpu) for phase in recipe.phases}
    for parameters in trained.values():
        mark_trained(parameters, True)
    flops = {name: cost[0] for name, cost in costs.items()}
    held = _COPIES * _bytes(recipe.networks) + _AVERAGES * _bytes(recipe.averaged)
    return Estimate(flops, held + max(cost[1] for cost in costs.values()))


def _bytes(networks: Mapping[str, nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for network in networks.values() for p in network.parameters())


def peak_memory(recipe: Recipe, c_dim: int, stages: Sequence[Stage]) -> int:
    """Return what training holds at its peak, in bytes, over all stages of a schedule."""
    return max(estimate(recipe, c_dim, stage.batch_gpu, stage).memory_bytes for stage in stages)


def flops_per_image(recipe: Recipe, cost: Estimate, batch_gpu: int) -> float:
    """Return the operations of training on one image, lazy phases at their share."""
    return sum(cost.flops[phase.name] / phase.interval for phase in recipe.phases) / batch_gpu


def format_duration(seconds: float) -> str:
    """Return a duration as people say it: "45 s", "3.2 h", "12 days", "2.1 years"."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600), (63_072_000, "days", 86_400)):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 31_536_000:.3g} years"


def _cost(
    recipe: Recipe, trained: Mapping[str, list[nn.Parameter]], phase: Phase, stage: Stage, c_dim: int, batch_gpu: int
) -> tuple[float, int]:
    """Return operations and bytes of kept activations of one phase on one micro-batch."""
    mark_only(trained, phase.trains)
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

    device = torch.device("meta")
    img = torch.zeros(batch_gpu, 3, stage.resolution, stage.resolution, device=device).to(
        memory_format=torch.channels_last
    )
    labels = torch.zeros(batch_gpu, c_dim, device=device)
    micro_batch = MicroBatch(list(range(batch_gpu)), stage, img if phase.uses_reals else None, labels)
    with FlopCounter() as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for term in phase.loss(micro_batch, Record(device)):
            peak = max(peak, sum(kept.values()))
            torch.autograd.grad(term, trained[phase.trains], allow_unused=True)
            kept.clear()
    return counter.flops, peak + _LARGEST_TEMPORARIES * largest


class FlopCounter(TorchDispatchMode):
    """Adds up what matrix products and convolutions do; PyTorch's own counter fails on R1's inner gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()
