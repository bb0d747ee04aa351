"""Bytes that a training moves through memory, counted without running it.

The phases run on PyTorch's meta device, where tensors have shapes and no data. Every operation is taken to read each of
its inputs once and to write each of its outputs once. What grows with the batch is activations: a phase is counted
at two batch sizes, so that weights, whose traffic is the same for any batch, drop out exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from stylepipe.kernels import native
from stylepipe.training.arena import mark_only, trained_parameters
from stylepipe.training.phase import MicroBatch, Phase, Recipe, Record

_aten = torch.ops.aten
_CONVOLUTIONS = {_aten.convolution, _aten.convolution_backward}
# These look at nothing but their inputs' shapes; the first touch no memory at all.
_NOTHING = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_NOTHING |= {_aten._unsafe_view, _aten.detach, _aten.lift_fresh}
_WRITES_ONLY = {_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full}
_OVERWRITES = {_aten.copy_, _aten.fill_, _aten.zero_, _aten.normal_, _aten.uniform_}  # the first input


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written."""

    convolutions: float = 0
    passes: float = 0
    """All the rest: mostly passes over activations."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.convolutions + other.convolutions, self.passes + other.passes)

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(self.convolutions * factor, self.passes * factor)


@dataclass(frozen=True)
class PhaseTraffic:
    """Bytes of one phase: to compute its loss, and the gradient of the loss by the weights."""

    name: str
    interval: int
    loss: Traffic
    gradient: Traffic

    @property
    def amortised(self) -> Traffic:
        """Bytes of a step's average image: a phase counts once every `interval` steps."""
        return (self.loss + self.gradient) * (1 / self.interval)


def count_traffic(
    trial: Callable[[int], Recipe], res: int, batch_sizes: tuple[int, int] = (4, 8), *, compiled: bool
) -> list[PhaseTraffic]:
    """Return what one more image moves in each phase.

    Args:
        trial: builds the recipe on the meta device for micro-batches of so many images.
        res: of the images.
        batch_sizes: two to compare, such that what a phase does is the same but for its batch.
        compiled: with our kernels under the ops, as on a GPU; else with what they are composed of.
    """
    counts = []
    for size in batch_sizes:
        recipe = trial(size)
        trained = {name: trained_parameters(network) for name, network in recipe.networks.items()}
        counts.append([_count_phase(recipe, trained, phase, res, size, compiled) for phase in recipe.phases])
    per_image = 1 / (batch_sizes[1] - batch_sizes[0])
    return [
        PhaseTraffic(
            many.name,
            many.interval,
            loss=(many.loss + few.loss * -1) * per_image,
            gradient=(many.gradient + few.gradient * -1) * per_image,
        )
        for few, many in zip(*counts, strict=True)
    ]


def _count_phase(
    recipe: Recipe, trained: Mapping[str, list[nn.Parameter]], phase: Phase, res: int, batch_size: int, compiled: bool
) -> PhaseTraffic:
    """Return the bytes of a phase on one micro-batch, of all its images together."""
    mark_only(trained, phase.trains)
    device = torch.device("meta")
    img = torch.zeros(batch_size, 3, res, res, device=device).to(memory_format=torch.channels_last)
    batch = MicroBatch(
        list(range(batch_size)), recipe.schedule.final(), img if phase.uses_reals else None,
        torch.zeros(batch_size, 0, device=device),
    )  # fmt: skip
    loss = gradient = Traffic()
    with counting(compiled=compiled) as counter:
        for term in phase.loss(batch, Record(device)):
            loss += counter.take()
            torch.autograd.grad(term, trained[phase.trains], allow_unused=True)
            gradient += counter.take()
    return PhaseTraffic(phase.name, phase.interval, loss, gradient)


@contextmanager
def counting(*, compiled: bool) -> Iterator[Counter]:
    """Count what operations on the meta device move; see count_traffic for `compiled`."""
    with native.use(lambda *_: _OnPaper() if compiled else None), Counter(composed=not compiled) as counter:
        yield counter


class Counter(TorchDispatchMode):
    """Adds up what operations read and write.

    Args:
        composed: look into our ops, at the operations that they are composed of.
    """

    def __init__(self, *, composed: bool) -> None:
        super().__init__()
        self._composed = composed
        self._within = False
        self._moved = Traffic()

    def take(self) -> Traffic:
        """Return the bytes so far, and start anew."""
        moved, self._moved = self._moved, Traffic()
        return moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._composed and func.namespace == "stylepipe":
            before, self._within = self._within, True
            with self:
                result = func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            self._within = before
            return result
        if self._within and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        moved = _bytes_moved(func, args, kwargs, result)
        convolution = func._overloadpacket in _CONVOLUTIONS
        if convolution and not self._within:
            self._moved += Traffic(convolutions=moved)
        else:
            self._moved += Traffic(passes=moved)
        # On the meta device convolutions forget the layout; on a GPU they keep it.
        return tree_map_only(Tensor, _in_channels_last, result) if convolution else result


class _OnPaper:
    """A GPU's kernels where none is ever launched."""

    vector_bytes, threads = 16, 256

    def launch(self, kernel: str, *_: Any) -> None:
        raise AssertionError(f"{kernel} was launched on the meta device")


def _bytes_moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes that one operation reads and writes."""
    packet, schema = func._overloadpacket, func._schema
    if func.is_view or packet in _NOTHING:
        return 0
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    written = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    results = result if isinstance(result, (tuple, list)) else [result]
    if len(results) == len(schema.returns):
        results = [r for r, returned in zip(results, schema.returns, strict=True) if returned.alias_info is None]
    read = [] if packet in _WRITES_ONLY else tree_leaves(list(given.values()))
    if packet in _OVERWRITES:
        read = read[1:]
    moved = sum(_distinct(read)) + sum(_distinct(tree_leaves(written))) + sum(_distinct(tree_leaves(results)))
    if packet is torch.ops.stylepipe.styled_act_backward and given["f"] is not None:
        moved += 2 * sum(_distinct([given["dy"]]))  # the gradient behind the filter, on its way to the filter's own
    return moved


def _in_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _distinct(values: Iterable[Any]) -> Iterable[int]:
    """Return the bytes of each tensor among the values, one that comes twice once, expanded dimensions once."""
    sizes = {}
    for tensor in values:
        if isinstance(tensor, Tensor):
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
            lengths = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n]
            sizes[place] = math.prod(lengths) * tensor.itemsize
    return sizes.values()
