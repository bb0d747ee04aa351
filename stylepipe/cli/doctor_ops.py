"""What `stylepipe doctor` finds of the ops: which implementation runs, and whether it computes rightly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stylepipe.cli.finding import Finding, describe
from stylepipe.errors import UserError
from stylepipe.kernels import act_fir, bias_act, build, native, setup_filter, styled_act, styled_act_rgb, upfirdn2d
from stylepipe.training.exact import full_float32

# Two images whose sizes no tile divides, in channels that fill whole vectors.
_N, _C, _H, _W = 2, 32, 19, 21
_CLAMP = 2.5  # some values are beyond it

TOLERANCES = {
    torch.float32: 1e-5,  # sums of a thousand terms, in any order; a product rounded to TF32 is off by more
    torch.bfloat16: 2.0**-6,  # a few roundings to the type, of 2^-9 each
    torch.float16: 2.0**-9,  # of 2^-12
}
"""The most that a result may be off, relative to the largest magnitude of the same tensor."""

Operands = Mapping[str, Tensor]


@dataclass(frozen=True)
class SelfTest:
    """An op, and what it is tried on."""

    name: str
    source: str
    """The compiled kernels that it runs on first of all: cuda/`source`.cu."""
    operands: tuple[str, ...]
    """Names of _SHAPES."""
    run: Callable[[Operands], list[Tensor]]
    """Return its outputs."""


_SHAPES: dict[str, tuple[int, ...]] = {
    "x": (_N, _C, _H, _W),
    "scale": (_N, _C),
    "noise": (_N, 1, _H, _W),
    "noise_strength": (),
    "bias": (_C,),
    "next_scale": (_N, _C),
    "rgb_weight": (_N, 3, _C),
}
_SIGNED = ("x", "bias", "rgb_weight")  # the others are positive, so that no sum cancels and none is nearly 0
_CONSTANTS = ("noise",)  # as in training; its gradient is PyTorch's anyway


def _run_bias_act(of: Operands) -> list[Tensor]:
    return [bias_act(of["x"], of["bias"], act="lrelu", clamp=_CLAMP)]


def _run_upfirdn2d(of: Operands) -> list[Tensor]:
    f = _filter(of["x"])
    return [
        upfirdn2d(of["x"], f, up=2, padding=(2, 1, 2, 1), gain=4),
        upfirdn2d(of["x"], f, down=2, padding=1),
        upfirdn2d(of["x"], f, padding=(2, 1, 2, 1)),
    ]


def _run_styled_act(of: Operands) -> list[Tensor]:
    """Run it with colours beside, and with a filter in front, which makes x smaller by a pixel."""
    x, scale, noise, strength, bias, next_scale, rgb_weight = (of[name] for name in _SHAPES)
    y, rgb = styled_act_rgb(x, rgb_weight, scale, noise, strength, bias, clamp=_CLAMP, next_scale=next_scale)
    noise, f = noise[:, :, 1:, 1:], _filter(x)
    filtered = styled_act(x, scale, noise, strength, bias, clamp=_CLAMP, next_scale=next_scale, f=f, padding=1)
    return [y, rgb, filtered]


def _run_act_fir(of: Operands) -> list[Tensor]:
    return [act_fir(of["x"], of["bias"], _filter(of["x"]), padding=2, clamp=_CLAMP)]


def _filter(x: Tensor) -> Tensor:
    return setup_filter([1, 3, 3, 1], separable=True).to(x.device)


SELF_TESTS = (
    SelfTest("bias_act", "epilogue", ("x", "bias"), _run_bias_act),
    SelfTest("upfirdn2d", "upfirdn2d", ("x",), _run_upfirdn2d),
    SelfTest("styled_act", "epilogue", tuple(_SHAPES), _run_styled_act),
    SelfTest("act_fir", "fused_fir", ("x", "bias"), _run_act_fir),
)


def device_of(gpus: int) -> torch.device:
    """Return the device that training takes."""
    return torch.device("cuda", 0) if gpus else torch.device("cpu")


def choices(device: torch.device) -> Finding:
    """Tell which implementation the ops have on a device, in each type that training uses, and why."""
    users: dict[str, list[str]] = {}
    types = types_of(device)
    try:
        chosen = native.mode()
        for test, dtype in itertools.product(SELF_TESTS, types):
            native.library(test.source, dtype, device)  # is remembered, so that nothing is built twice
            name = test.name if len(types) == 1 else f"{test.name} ({_name(dtype)})"
            users.setdefault(native.explain(test.source, dtype, device), []).append(name)
    except UserError as error:  # STYLEPIPE_KERNELS is no known word, or asks for what cannot be had
        return Finding("kernels", "problem", str(error))
    if chosen == "cuda" and device.type != "cuda":
        text = f"{native.VARIABLE}=cuda, and there is no GPU to train on: training stops at its start"
        return Finding("kernels", "problem", text, f"unset {native.VARIABLE} to train on the CPU")
    text = next(iter(users)) if len(users) == 1 else "; ".join(f"{', '.join(ops)} {why}" for why, ops in users.items())
    missed = any(_is_missed(test.source, dtype, device) for test, dtype in itertools.product(SELF_TESTS, types))
    if missed and device.type == "cuda" and chosen == "auto":
        return Finding("kernels", "problem", text)  # which ends with the remedy
    return Finding("kernels", "note" if missed else "ok", text)


def op(test: SelfTest, device: torch.device) -> Finding:
    """Tell how far the results of an op are off on a device."""
    try:
        compiled = [dtype for dtype in types_of(device) if native.library(test.source, dtype, device) is not None]
        errors = {dtype: worst_error(test, dtype, device) for dtype in dict.fromkeys((torch.float32, *compiled))}
    except UserError:
        return Finding(test.name, "problem", "cannot run, see kernels")
    except Exception as error:
        remedy = f"{native.VARIABLE}=torch trains without compiled kernels"
        return Finding(test.name, "problem", f"fails ({describe(error)})", remedy)
    shown = ", ".join(_shown(dtype, error) for dtype, error in errors.items())
    text = f"{_implementations(compiled, types_of(device))}, off by {shown}"
    if all(error <= TOLERANCES[dtype] for dtype, error in errors.items()):
        return Finding(test.name, "ok", text)
    remedy = "report it with the output of stylepipe doctor --json"
    if compiled:
        remedy = f"{native.VARIABLE}=torch trains without compiled kernels; {remedy}"
    return Finding(test.name, "problem", text, remedy)


def types_of(device: torch.device) -> list[torch.dtype]:
    """Return the types that training uses on a device."""
    if device.type != "cuda":
        return [torch.float32]
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return [torch.float32, torch.bfloat16 if has_bfloat16 else torch.float16]


def worst_error(test: SelfTest, dtype: torch.dtype, device: torch.device) -> float:
    """Return how far the op's outputs and gradients are off float64 arithmetic, relative to each tensor's maximum."""
    exact = {name: _operand(name) for name in test.operands}
    with native.use(lambda *_: None):
        expected = _results(test, exact)
    real = torch.float32  # of the small operands, whatever the type of x
    given = {name: value.to(device, dtype if name == "x" else real) for name, value in exact.items()}
    with full_float32(device):
        found = _results(test, given)
    return max(_relative_error(a, b) for a, b in zip(found, expected, strict=True))


def _operand(name: str) -> Tensor:
    """Draw an operand of so few bits that half precision holds it and that sums of products before the activation
    are exact in float32; none of these is nearer to 0 than 2^-15, or to the clamp. So the results that are compared
    have taken the same branches, whatever the types.
    """
    generator = torch.Generator().manual_seed(list(_SHAPES).index(name))
    value = torch.randint(1, 16, _SHAPES[name], generator=generator, dtype=torch.float64) / 8
    if name in _SIGNED:
        value -= 1
    if name == "x":
        value = (value + 1 / 16).contiguous(memory_format=torch.channels_last)
    return value + 2**-15 if name == "bias" else value


def _results(test: SelfTest, operands: Operands) -> list[Tensor]:
    """Return the outputs, and the gradients of their sums weighted with 1/8, 2/8, ..., 1, again and again."""
    wanted = {name: value.detach().requires_grad_(name not in _CONSTANTS) for name, value in operands.items()}
    outputs = test.run(wanted)
    targets = [value for value in wanted.values() if value.requires_grad]
    weights = [_weights(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, targets, weights)
    return [result.detach() for result in (*outputs, *gradients)]


def _weights(y: Tensor) -> Tensor:
    steps = torch.arange(y.numel(), device=y.device) % 8 + 1
    return (steps / 8).to(y.dtype).view(y.shape)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).abs().max() / expected.abs().max())


def _is_missed(source: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether compiled kernels are meant for the device and not used."""
    meant = device.type == "cuda" or (build.CPU_SOURCES / f"{source}.cpp").is_file()
    return meant and native.library(source, dtype, device) is None


def _implementations(compiled: list[torch.dtype], types: list[torch.dtype]) -> str:
    """Say what computes, such as `compiled in float32, PyTorch in bfloat16`."""
    if len(compiled) in (0, len(types)):
        return "compiled" if compiled else "PyTorch"
    return ", ".join(f"{'compiled' if dtype in compiled else 'PyTorch'} in {_name(dtype)}" for dtype in types)


def _shown(dtype: torch.dtype, error: float) -> str:
    """Write as `2e-07 (float32, limit 1e-05)`."""
    return f"{f'{error:.0e}' if error else 0} ({_name(dtype)}, limit {TOLERANCES[dtype]:.0e})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
