"""Draws operands for every op with compiled kernels, runs them on a CPU and compares with float64 arithmetic.

    drawn_cases.py --cases N [--kind shim|native] [--seed N] [--types ...] [--ops ...] [--sources FOLDER] [--sanitize]

runs cases and prints what was found as one line of JSON; test_shim.py imports the rest. A case follows from its seed
and number alone.

An error is measured element by element against the magnitude of what was added up: an output that is a sum of terms is
compared relative to the sum of their absolute values, since the terms may cancel (as those of the gradient by
noise_strength do). It is given in units of the type's rounding step, eps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shim_kernels import Kernels, in_torch
from torch import Tensor

from stylepipe.kernels import _epilogue, _fir, act_fir, bias_act, build, native, styled_act, styled_act_rgb, upfirdn2d
from stylepipe.kernels._activations import activation_alpha, activation_gain

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

USUAL_OPS = ("bias_act", "upfirdn2d", "upfirdn2d", "styled_act", "styled_act", "act_fir")  # by what there is to test

# What a result may be off by, in eps. The last rounding is half an eps; what is stored between two ops is rounded once
# more, and what is made of it too.
ROUNDED = 0.55
ROUNDED_BETWEEN = 3.0
# Arithmetic in the type itself: a dozen operations to a term, each half an eps at the most, and sums of up to 10^4
# terms, made in parts, whose roundings go up about as often as down.
COMPUTED = 8.0

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda u, _: u,
    "relu": lambda u, _: u.relu(),
    "lrelu": lambda u, alpha: torch.where(u > 0, u, alpha * u),
    "tanh": lambda u, _: u.tanh(),
    "sigmoid": lambda u, _: u.sigmoid(),
    "elu": lambda u, _: F.elu(u),
    "selu": lambda u, _: F.selu(u),
    "softplus": lambda u, _: _softplus(u),
    "swish": lambda u, _: u * u.sigmoid(),
}
STRAIGHT = ("linear", "relu", "lrelu")
_STEEPEST = 1.8  # selu's slope


def _softplus(u: Tensor) -> Tensor:
    """Give torch's value, which is u itself from 20 on, with the exact slope, as bias_act has it."""
    exact = torch.logaddexp(u, torch.zeros_like(u))
    return exact + (F.softplus(u) - exact).detach()


class WrongError(AssertionError):
    """A kernel's result differs from the reference."""


# --- running cases ---


@dataclasses.dataclass
class Report:
    """What cases found: how many there were, the worst errors in eps by op and type, and what is wrong."""

    cases: int = 0
    worst: dict[str, float] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Run:
    """One case: where its numbers come from, and what is compared."""

    kernels: Kernels
    rng: random.Random
    generator: torch.Generator
    dtype: torch.dtype
    worst: dict[str, float]
    about: dict[str, Any]

    @property
    def real(self) -> torch.dtype:
        """The type of small operands and sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.real)

    def maybe(self, probability: float = 0.7) -> bool:
        return self.rng.random() < probability

    def small(self, *shape: int, probability: float = 0.7) -> Tensor | None:
        """Draw a small operand, or None; its gradient may be asked for."""
        return self.draw(*shape).requires_grad_(self.maybe(0.85)) if self.maybe(probability) else None

    def activation(self, *shape: int, layout: str) -> Tensor:
        """Draw a tensor [N, C, H, W] of the case's type, laid out as asked, seldom at an address that is aligned."""
        return self.lay_out(self.draw(*shape, dtype=self.dtype), layout)

    def lay_out(self, values: Tensor, layout: str) -> Tensor:
        offset = self.rng.choice([0, 0, 0, 1, 2, 4])
        if layout == "strided":
            spread = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1])[..., ::2]
            return spread.copy_(values)
        order = [0, *range(2, values.ndim), 1] if layout == "rows" else list(range(values.ndim))
        shape = [values.shape[i] for i in order]
        storage = values.new_zeros(values.numel() + offset)[offset:].view(shape)
        return storage.permute([order.index(i) for i in range(values.ndim)]).copy_(values)

    def compare(self, name: str, found: Tensor | None, expected: Tensor, magnitude: Tensor, eps: float) -> None:
        """Compare a result of some type with its reference; raise WrongError where it is more than `eps` away."""
        assert found is not None, (name, self.about)
        assert found.shape == expected.shape, (name, found.shape, expected.shape, self.about)
        if not found.numel():
            return
        info = torch.finfo(found.dtype)
        # Below the normal numbers the step no longer shrinks.
        step = info.eps * magnitude.clamp(min=info.smallest_normal).double()
        error = ((found.detach().double() - expected).abs() / step).max().item()
        key = f"{self.about['op']} {name}"
        if not error <= eps:  # NaN neither
            raise WrongError(f"{key}: off by {error:.3g} eps of {found.dtype}, allowed {eps}: {self.about}")
        key = f"{self.about['op']} {str(found.dtype)[6:]} {'sum' if name.startswith('sum') else 'activation'}"
        if eps != ROUNDED_BETWEEN:
            self.worst[key] = max(self.worst.get(key, 0), error)

    def gradients(self, outputs: Iterable[Tensor], inputs: dict[str, Tensor | None], dys: Iterable[Tensor]) -> Any:
        """Return the gradients by those inputs that require one."""
        asked = {name: tensor for name, tensor in inputs.items() if tensor is not None and tensor.requires_grad}
        if not asked:
            return {}
        with native.use(self.kernels):
            found = torch.autograd.grad(list(outputs), list(asked.values()), list(dys), materialize_grads=True)
        for gradient, tensor in zip(found, asked.values(), strict=True):
            assert gradient.dtype == tensor.dtype
        return dict(zip(asked, found, strict=True))


def run_case(run: Run, ops: Sequence[str]) -> None:
    """Run one case; raise WrongError where it is wrong."""
    run.about["op"] = run.rng.choice(ops)
    OPS[run.about["op"]](run)


# Sizes that decide how work is cut into blocks, with what is drawn of each. An activation of 256 px gives a thread
# several rounds and long strips. Drawn ones are too small for that, unless fewer blocks are wanted.
_CUTS: dict[Any, dict[str, tuple[Any, ...]]] = {
    _epilogue: {"_BLOCKS_WANTED": (1, 2, 16, 1024), "_MOST_ROUNDS": (8, 8, 3), "_PIXELS_ON_CPU": ((16, 256), (3, 7))},
    _fir: {"_THREADS_WANTED": (1, 2**6, 2**10, 2**17)},
}


@contextmanager
def drawn_cuts(rng: random.Random, about: dict[str, Any]) -> Iterator[None]:
    """Draw how work is cut into blocks, and write down what was drawn."""
    before = [(module, name, getattr(module, name)) for module, names in _CUTS.items() for name in names]
    try:
        for module, names in _CUTS.items():
            for name, values in names.items():
                about[name] = rng.choice(values)
                setattr(module, name, about[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def run_cases(
    kernels: Kernels,
    cases: int,
    seed: int = 0,
    types: Sequence[torch.dtype] = TYPES,
    ops: Sequence[str] = USUAL_OPS,
) -> Report:
    """Run cases of these types in turn and of these ops."""
    report = Report()
    # New tensors are filled with NaN: what a kernel fails to write is found.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        for number in range(cases):
            rng = random.Random(f"{seed}/{number}")
            generator = torch.Generator().manual_seed(rng.randrange(2**31))
            about = {"seed": seed, "case": number}
            run = Run(kernels, rng, generator, types[number % len(types)], report.worst, about)
            report.cases += 1
            try:
                with drawn_cuts(random.Random(f"cuts {seed}/{number}"), about):
                    run_case(run, ops)
            except WrongError as error:
                report.wrong.append(str(error))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return report


# --- shapes ---


def draw_shape(run: Run) -> tuple[int, int, int, int]:
    """Draw N, C, H, W: mostly small and odd, at times such that a block has neighbours in every direction."""
    rng = run.rng
    kind = rng.random()
    if kind < 0.03:
        shape = [rng.randint(1, 3), rng.choice([3, 8]), rng.randint(1, 9), rng.randint(1, 9)]
        shape[rng.randrange(4)] = 0
        return tuple(shape)  # type: ignore[return-value]
    if kind < 0.08:
        return rng.randint(1, 2), rng.choice([259, 259, 520, 520, 1040, 2064]), rng.randint(1, 2), rng.randint(1, 3)
    if kind < 0.11:
        return 1, rng.choice([1, 3, 8]), rng.randint(30, 70), rng.randint(60, 140)
    channels = rng.choice([1, 2, 3, 4, 5, 8, 8, 16, 16, 24, 32, 32, 40, 64])
    return rng.randint(1, 3), channels, rng.randint(1, 20), rng.randint(1, 20)


def draw_layout(run: Run) -> str:
    return run.rng.choice(["rows", "rows", "rows", "planes", "planes", "strided"])


def draw_filter(run: Run, usual: float) -> Tensor:
    """Draw a filter: with probability `usual` four separable taps, else mostly 1 to 12 of them, or a small 2-D one."""
    if run.maybe(usual):
        return run.draw(4, dtype=torch.float32)
    if run.maybe(0.75):
        return run.draw(run.rng.randint(1, 12), dtype=torch.float32)
    return run.draw(run.rng.randint(1, 6), run.rng.randint(1, 6), dtype=torch.float32)


def draw_activation(run: Run, straight: float) -> dict[str, Any]:
    names = STRAIGHT if run.maybe(straight) else tuple(ACTIVATIONS)
    act = run.rng.choice(names)
    gain = run.rng.choice([None, None, 1.0, 1.7, -0.6])
    return {"act": act, "gain": gain, "clamp": run.rng.choice([None, None, 0.9, 1.3, 256.0])}


# --- the reference of epilogues ---


@dataclasses.dataclass
class Epilogue:
    """clamp(gain * act(u)) in float64, with what its arithmetic in a smaller type may be wrong by.

    Args:
        u: what the activation is of.
        magnitude: the sum of the absolute values of the terms of u.
    """

    u: Tensor
    magnitude: Tensor
    act: str
    gain: float | None
    clamp: float | None
    alpha: float | None = None

    def __post_init__(self) -> None:
        self.gain = activation_gain(self.act) if self.gain is None else self.gain
        self.alpha = activation_alpha(self.act) if self.alpha is None else self.alpha
        self.u = self.u.detach().requires_grad_()
        self.a = self.gain * ACTIVATIONS[self.act](self.u, self.alpha)
        self.v = self.a if self.clamp is None else self.a.clamp(-self.clamp, self.clamp)
        self.v_magnitude = _STEEPEST * abs(self.gain) * self.magnitude + self.v.detach().abs()

    def kinks(self, eps: float) -> Tensor:
        """Tell where rounding may decide on which side of a kink an element lies; `eps` is of what is clamped."""
        near = self.u.detach().abs() <= 1e-5 * self.magnitude  # float32's, with room
        if self.clamp is not None:
            distance = (self.a.detach().abs() - self.clamp).abs()
            near |= distance <= 1e-5 * self.v_magnitude + 2 * eps * self.clamp
        return near

    def backward(self, dv: Tensor, dv_magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """Return du and its magnitude."""
        (du,) = torch.autograd.grad(self.v, self.u, dv)
        assert self.gain is not None
        steepness = _STEEPEST + (0 if self.act in STRAIGHT else self.magnitude)
        return du, abs(self.gain) * dv_magnitude * steepness


def along(b: Tensor, dim: int, ndim: int) -> Tensor:
    return b.detach().double().reshape([-1 if i == dim else 1 for i in range(ndim)])


# --- the ops ---


def bias_act_case(run: Run) -> None:
    shape, dim = draw_shape(run), 1
    layout = draw_layout(run)
    if run.maybe(0.3):  # any other number of dimensions, the bias along any of them
        shape = tuple(run.rng.randint(1, 9) for _ in range(run.rng.randint(1, 5)))  # type: ignore[assignment]
        dim, layout = run.rng.randrange(len(shape)), "planes"
    options = draw_activation(run, 0.5)
    alpha = run.rng.choice([None, None, 0.0, 0.5, -0.3]) if options["act"] == "lrelu" else None
    run.about |= {"type": str(run.dtype), "shape": shape, "dim": dim, "layout": layout, "alpha": alpha, **options}
    x = run.activation(*shape, layout=layout).requires_grad_()
    b = run.small(shape[dim])
    with native.use(run.kernels):
        y = bias_act(x, b, dim=dim, alpha=alpha, **options)
    bias = torch.zeros(()).double() if b is None else along(b, dim, x.ndim)
    wide = x.detach().double()
    of = Epilogue(wide + bias, wide.abs() + bias.abs(), alpha=alpha, **options)
    run.compare("y", y, of.v.detach(), of.v_magnitude, COMPUTED if y.dtype == run.real else ROUNDED)
    dy = run.lay_out(run.draw(*shape, dtype=run.dtype).masked_fill_(of.kinks(torch.finfo(x.dtype).eps), 0), layout)
    found = run.gradients([y], {"x": x, "sum of b": b}, [dy])
    du, du_magnitude = of.backward(dy.double(), dy.double().abs())
    run.compare("x", found["x"], du, du_magnitude, COMPUTED if x.dtype == run.real else ROUNDED)
    if "sum of b" in found:
        over = [i for i in range(x.ndim) if i != dim]
        total = (du.sum(over), du_magnitude.sum(over)) if over else (du, du_magnitude)
        run.compare("sum of b", found["sum of b"], *total, COMPUTED)


def filtered(x: Tensor, f: Tensor, **options: Any) -> Tensor:
    """Filter in float64, by PyTorch's operations."""
    with native.use(in_torch):
        return upfirdn2d(x.double(), f.double(), **options)


def upfirdn2d_case(run: Run) -> None:
    rng = run.rng
    while True:
        n, c, h, w = draw_shape(run)
        c = min(c, 300)
        f = draw_filter(run, 0.3)
        unusual = [(3, 2), (2, 2), ((2, 1), (1, 3))]
        up, down = rng.choice([(1, 1), (2, 1), (1, 2)] if run.maybe(0.85) else unusual)
        padding = [rng.randint(-2, 8) for _ in range(4)] if run.maybe() else rng.randint(0, 4)
        before = padding if isinstance(padding, list) else [padding] * 4
        upx, upy = (up, up) if isinstance(up, int) else up
        padded = w * upx + before[0] + before[1], h * upy + before[2] + before[3]
        if padded[0] >= f.shape[-1] and padded[1] >= f.shape[0]:
            break
    layout, options = draw_layout(run), {"up": up, "down": down, "padding": padding}
    options |= {"flip_filter": run.maybe(0.5), "gain": rng.choice([1.0, 4.0, -0.7])}
    run.about |= {"type": str(run.dtype), "shape": (n, c, h, w), "layout": layout, "f": list(f.shape), **options}
    x = run.activation(n, c, h, w, layout=layout).requires_grad_()
    with native.use(run.kernels):
        y = upfirdn2d(x, f, **options)
    dy = run.activation(*y.shape, layout=layout)
    exact, absolute = x.detach().double().requires_grad_(), x.detach().double().abs().requires_grad_()
    expected, magnitude = filtered(exact, f, **options), filtered(absolute, f.abs(), **options)
    eps = COMPUTED if run.dtype == run.real else ROUNDED
    run.compare("y", y, expected.detach(), magnitude.detach().abs(), eps)
    (found,) = run.gradients([y], {"x": x}, [dy]).values()
    (gradient,) = torch.autograd.grad(expected, exact, dy.double())
    (magnitude,) = torch.autograd.grad(magnitude, absolute, dy.double().abs())
    run.compare("x", found, gradient, magnitude.abs(), eps)


def draw_padding(run: Run, shape: tuple[int, ...], f: Tensor, usual: list[int]) -> int:
    """Draw a padding with which every axis is at least as long as the filter."""
    missing = max(f.shape[-1] - shape[3], f.shape[0] - shape[2], 0)
    return max(run.rng.choice(usual), -(-missing // 2))


def styled_act_case(run: Run) -> None:
    shape = draw_shape(run)
    n, c, _, _ = shape
    options, layout = draw_activation(run, 0.85), draw_layout(run)
    f = draw_filter(run, 0.9) if run.maybe(0.45) and min(shape) else None
    if f is not None and f.ndim == 2:
        f = f[:, :1].expand(-1, f.shape[0]).contiguous() if f.shape[0] > 1 else None
    padding = 0 if f is None else draw_padding(run, shape, f, [1, 1, 0, 2, 3, 4])
    grown = 0 if f is None else 2 * padding + 1 - f.shape[0]
    h, w = shape[2] + grown, shape[3] + grown
    fir = {"padding": padding, "gain": run.rng.choice([1.0, 4.0])}
    scale, bias, next_scale = run.small(n, c), run.small(c), run.small(n, c)
    noise = strength = None
    if run.maybe():
        noise, strength = draw_noise(run, n, h, w), run.draw().requires_grad_(run.maybe(0.85))
    rgb_weight = run.small(n, run.rng.choice([3, 3, 3, 1, 4]), c, probability=0.4)
    operands = {"scale": scale, "noise_strength": strength, "bias": bias, "next_scale": next_scale}
    operands["noise"] = noise
    run.about |= {"type": str(run.dtype), "shape": shape, "layout": layout, "f": f is not None and list(f.shape), **fir}
    given = operands | {"rgb_weight": rgb_weight}
    run.about |= options | {"operands": {name: list(t.shape) for name, t in given.items() if t is not None}}
    x = run.activation(*shape, layout=layout).requires_grad_()

    before = Counter(run.kernels.launched)
    with native.use(run.kernels):
        fir_options = {"f": f, "padding": padding, "filter_gain": fir["gain"]}
        if rgb_weight is None:
            y, rgb = styled_act(x, **operands, **options, **fir_options), None
        else:
            y, rgb = styled_act_rgb(x, rgb_weight, **operands, **options, **fir_options)
    launched = {name for name, _ in run.kernels.launched - before}
    filtered_apart = f is not None and not any(name.startswith("fir_epilogue") for name in launched)
    in_parts = rgb is not None and not any("_rgb_" in name for name in launched)

    exact, absolute = x.detach().double().requires_grad_(), x.detach().double().abs().requires_grad_()
    z = exact if f is None else filtered(exact, f, **fir)
    z_magnitude = absolute if f is None else filtered(absolute, f.abs(), **fir)
    rounded = z.detach()
    if filtered_apart:  # by an op with a case of its own; what it has stored is what the epilogue starts from
        with native.use(run.kernels):
            rounded = upfirdn2d(x.detach(), f, **fir).double()
    of = {name: None if t is None else t.detach().double() for name, t in given.items()}
    one = torch.ones(1, 1, 1, 1).double()
    s = one if of["scale"] is None else of["scale"][:, :, None, None]
    s_next = one if of["next_scale"] is None else of["next_scale"][:, :, None, None]
    b = 0 * one if of["bias"] is None else along(of["bias"], 1, 4)
    addend = 0 * one if noise is None else of["noise"] * of["noise_strength"]
    m = z_magnitude.detach()
    v = Epilogue(rounded * s + addend + b, m * s.abs() + addend.abs() + b.abs(), **options)
    eps = ROUNDED_BETWEEN if in_parts else (COMPUTED if run.dtype == run.real else ROUNDED)
    if in_parts and run.dtype == run.real:
        eps = COMPUTED
    run.compare("y", y, v.v.detach() * s_next, v.v_magnitude * s_next.abs(), eps)

    kinks = v.kinks(0)
    dy = run.lay_out(run.draw(n, c, h, w, dtype=run.dtype).masked_fill_(kinks, 0), run.rng.choice([layout, "planes"]))
    outputs, cotangents = [y], [dy]
    dv, dv_magnitude = dy.double() * s_next, (dy.double() * s_next).abs()
    coarse = run.dtype != run.real and in_parts
    drgb = None
    if rgb is not None:
        weight = of["rgb_weight"]
        rgb_eps = COMPUTED
        # In parts, v is stored in the activations' type before it is weighted.
        scale_of_rgb = torch.finfo(run.dtype).eps / torch.finfo(rgb.dtype).eps if coarse else 1
        run.compare("rgb", rgb, torch.einsum("nchw,nkc->nkhw", v.v.detach(), weight),
                    scale_of_rgb * torch.einsum("nchw,nkc->nkhw", v.v_magnitude, weight.abs()), rgb_eps)  # fmt: skip
        drgb = run.lay_out(run.draw(n, rgb.shape[1], h, w).masked_fill_(kinks.any(1, keepdim=True), 0), layout)
        outputs, cotangents = ([y, rgb], [dy, drgb]) if run.maybe(0.8) else ([rgb], [drgb])
        if len(outputs) == 1:
            dv, dv_magnitude, dy = 0 * dv, 0 * dv_magnitude, 0 * dy
        dv = dv + torch.einsum("nkhw,nkc->nchw", drgb.double(), weight)
        dv_magnitude = dv_magnitude + torch.einsum("nkhw,nkc->nchw", drgb.double().abs(), weight.abs())
    names = ("scale", "noise_strength", "bias", "next_scale", "rgb_weight")
    found = run.gradients(outputs, {"x": x, **{f"sum of {name}": given[name] for name in names}}, cotangents)
    du, m_du = v.backward(dv, dv_magnitude)
    noise64 = of["noise"]
    sums: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "scale": lambda: ((du * rounded).sum((2, 3)), (m_du * m).sum((2, 3))),
        "bias": lambda: (du.sum((0, 2, 3)), m_du.sum((0, 2, 3))),
        "next_scale": lambda: ((dy * v.v.detach()).sum((2, 3)), (dy.abs() * v.v_magnitude).sum((2, 3))),
        "noise_strength": lambda: ((du * noise64).sum(), (m_du * noise64.abs()).sum()),
        "rgb_weight": lambda: (
            torch.einsum("nkhw,nchw->nkc", drgb.double(), v.v.detach()),
            torch.einsum("nkhw,nchw->nkc", drgb.double().abs(), v.v_magnitude),
        ),
    }
    step = torch.finfo(run.dtype).eps / torch.finfo(run.real).eps if coarse else 1
    for name, sum_of in sums.items():
        if f"sum of {name}" in found:
            expected, magnitude = sum_of()
            run.compare(f"sum of {name}", found[f"sum of {name}"], expected, step * magnitude, COMPUTED)
    if "x" in found:
        dx, m_dx = du * s, m_du * s.abs()
        if f is not None:
            (dx,) = torch.autograd.grad(z, exact, dx)
            (m_dx,) = torch.autograd.grad(z_magnitude, absolute, m_dx)
        between = f is not None or in_parts
        run.compare("x", found["x"], dx, m_dx.abs(),
                    COMPUTED if run.dtype == run.real else (ROUNDED_BETWEEN if between else ROUNDED))  # fmt: skip


def draw_noise(run: Run, n: int, h: int, w: int) -> Tensor:
    """Draw noise: shared, of each image, or with more than an image between one and the next."""
    kind = run.rng.randrange(3)
    noise = run.draw(1 if kind == 0 else n, 1 + kind // 2, h, w, dtype=run.rng.choice([run.real, run.dtype]))
    return noise[:, :1]


def act_fir_case(run: Run) -> None:
    shape = draw_shape(run)
    options, layout = draw_activation(run, 0.9), run.rng.choice(["rows", "rows", "rows", "planes"])
    f = draw_filter(run, 0.9)
    padding = draw_padding(run, shape, f, [2, 2, 3, 1, 4])
    run.about |= {"type": str(run.dtype), "shape": shape, "layout": layout, "f": list(f.shape), "padding": padding}
    run.about |= options
    b = run.small(shape[1])
    bias = torch.zeros(()).double() if b is None else along(b, 1, 4)
    values = run.draw(*shape, dtype=run.dtype)
    for _ in range(100):  # a step that is taken differently would reach many outputs
        of = Epilogue(values.double() + bias, values.double().abs() + bias.abs(), **options)
        kinks = of.kinks(torch.finfo(run.dtype).eps)
        if not kinks.any():
            break
        values = torch.where(kinks, run.draw(*shape, dtype=run.dtype), values)
    x = run.lay_out(values, layout).requires_grad_()
    before = Counter(run.kernels.launched)
    with native.use(run.kernels):
        y = act_fir(x, b, f, padding, **options)
    between = not any(name == "act_fir" for name, _ in run.kernels.launched - before)
    eps = COMPUTED if run.dtype == run.real else (ROUNDED_BETWEEN if between else ROUNDED)
    v = of.v.detach().requires_grad_()
    absolute = of.v_magnitude.detach().requires_grad_()
    expected, magnitude = filtered(v, f, padding=padding), filtered(absolute, f.abs(), padding=padding)
    run.compare("y", y, expected.detach(), magnitude.detach(), eps)
    dy = run.activation(*y.shape, layout=run.rng.choice([layout, "planes"]))
    found = run.gradients([y], {"x": x, "sum of b": b}, [dy])
    (dv,) = torch.autograd.grad(expected, v, dy.double())
    (m_dv,) = torch.autograd.grad(magnitude, absolute, dy.double().abs())
    du, m_du = of.backward(dv, m_dv)
    run.compare("x", found["x"], du, m_du, eps)
    if "sum of b" in found:
        step = torch.finfo(run.dtype).eps / torch.finfo(run.real).eps if between else 1
        run.compare("sum of b", found["sum of b"], du.sum((0, 2, 3)), step * m_du.sum((0, 2, 3)), COMPUTED)


OPS: dict[str, Callable[[Run], None]] = {
    "bias_act": bias_act_case,
    "upfirdn2d": upfirdn2d_case,
    "styled_act": styled_act_case,
    "act_fir": act_fir_case,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=["shim", "native"], default="shim")
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--types", nargs="+", default=list(build.SCALARS))
    parser.add_argument("--ops", nargs="+", default=USUAL_OPS)
    parser.add_argument("--sources", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernels = Kernels(args.kind, sanitize=args.sanitize, sources=args.sources)
    types = [getattr(torch, name) for name in args.types]
    report = run_cases(kernels, args.cases, args.seed, types, args.ops)
    print(json.dumps(dataclasses.asdict(report) | {"launches": kernels.launched.total()}))
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
