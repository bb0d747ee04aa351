"""Gradients through the whole pipeline, to second order, and what a step demands: no synchronisation, compilable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from augment_draws import random
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from stylepipe.augment.ada import AdaPipeline
from stylepipe.augment.diff import DiffAugment
from stylepipe.augment.pipelines import PIPELINES
from stylepipe.losses.regularizers import path_lengths, r1_penalty

RES = 8
KINDS = ("bgcfnc", "diff")


def augmentation(kind: str, n: int, dtype: torch.dtype = torch.float64) -> Callable[[Tensor], Tensor]:
    """Return a pipeline of n images with draws of its own, at a p of 0.8."""
    pipeline = DiffAugment(RES) if kind == "diff" else AdaPipeline(PIPELINES[kind], RES)
    pipeline = pipeline.to(dtype)
    draws = [draw.to(dtype) for draw in random(pipeline, n)]
    p, noise = torch.tensor(0.8, dtype=dtype), torch.randn(n, 3, RES, RES, dtype=dtype)
    return lambda img: pipeline(img, p, *draws, noise)


@pytest.mark.parametrize("kind", [*PIPELINES, "diff"])
def test_gradients_are_numerical_ones_to_second_order(kind: str) -> None:
    augment = augmentation(kind, 2)
    img = torch.randn(2, 3, RES, RES, dtype=torch.float64, requires_grad=True)
    assert gradcheck(augment, img, fast_mode=True)
    assert gradgradcheck(lambda x: augment(x).sin(), img, fast_mode=True)


def central_difference(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> float:
    step = 1e-5
    return float((function(at + step * along) - function(at - step * along)).detach() / (2 * step))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient_of", ["r1", "path length"])
def test_regularizers_through_it_train_as_finite_differences_say(kind: str, gradient_of: str) -> None:
    """The derivative by the weights of a norm of derivatives by what lies before the augmentation."""
    augment = augmentation(kind, 3)
    if gradient_of == "r1":
        real = torch.randn(3, 3, RES, RES, dtype=torch.float64, requires_grad=True)

        def penalty(weight: Tensor) -> Tensor:
            hidden = nn.functional.conv2d(augment(real), weight).tanh()
            return r1_penalty(real, hidden.sum(dim=(1, 2, 3)).unsqueeze(1)).mean()

        weight = torch.randn(4, 3, 3, 3, dtype=torch.float64) * 0.3
    else:
        ws = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
        noise = torch.randn(3, 3, RES, RES, dtype=torch.float64)

        def penalty(weight: Tensor) -> Tensor:
            img = (ws.flatten(1) @ weight).tanh().unflatten(1, (3, RES, RES))
            return path_lengths(augment(img), ws, noise).mean()

        weight = torch.randn(10, 3 * RES * RES, dtype=torch.float64) * 0.3
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(weight), weight)
    along = torch.randn_like(weight)
    expected = central_difference(penalty, weight.detach(), along)
    assert float((gradient * along).sum()) == pytest.approx(expected, rel=1e-6)
    assert expected != 0


def test_a_generator_gets_gradients_through_it() -> None:
    augment = augmentation("bgc", 4, torch.float32)
    img = torch.randn(4, 3, RES, RES, requires_grad=True)
    (gradient,) = torch.autograd.grad(augment(img).square().sum(), img)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


# --- what a step demands ---


class _NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or a shape depend on data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, f"{func} waits for the device"
        self.seen.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    augment = augmentation(kind, 2, torch.float32)
    img = torch.randn(2, 3, RES, RES, requires_grad=True)
    with _NoSync() as mode:
        torch.autograd.grad(augment(img).sum(), img)
    assert "gather" in mode.seen if kind == "diff" else "grid_sampler_2d_backward" in mode.seen


def test_the_check_for_waiting_sees_it() -> None:
    with _NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_on_the_meta_device_to_second_order(kind: str) -> None:
    with torch.device("meta"):
        pipeline = DiffAugment(RES) if kind == "diff" else AdaPipeline(PIPELINES[kind], RES)
        img = torch.empty(2, 3, RES, RES).contiguous(memory_format=torch.channels_last).requires_grad_()
        draws = torch.empty(2, pipeline.num_uniform), torch.empty(2, pipeline.num_normal), torch.empty(2, 3, RES, RES)
        result = pipeline(img, torch.empty(()), *draws)
        penalty = r1_penalty(img, result.square().sum(dim=(1, 2, 3)))
        (gradient,) = torch.autograd.grad(penalty.sum(), img)
    assert result.is_meta
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert gradient.shape == img.shape


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_as_one_graph(kind: str) -> None:
    augment = augmentation(kind, 2, torch.float32)
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager")
    img = torch.randn(2, 3, RES, RES, requires_grad=True)
    torch.testing.assert_close(compiled(img), augment(img), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(f(img).square().sum(), img)[0] for f in (compiled, augment)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
