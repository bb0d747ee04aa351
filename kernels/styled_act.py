"""The epilogue of a synthesis layer in one op: demodulation, noise, bias, activation, and what the next layers need.

Karras et al. 2020, arXiv:1912.04958, section 2.2: of x, a convolution's output,

    u = x * scale + noise_strength * noise + bias,   v = clamp(gain * act(u)),   y = v * next_scale.

Widened at both ends, so that no activation makes a trip of its own through memory: x may first pass a FIR filter (that
of an up-convolution), and v may be weighted to colours beside (toRGB).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stylepipe.kernels._epilogue import makes_rgb, run_backward, run_forward, view_of
from stylepipe.kernels._fir import Geometry, fits_fused, plain_geometry, run_fir_epilogue, run_fir_epilogue_backward
from stylepipe.kernels._library import (
    ANY_DEVICE,
    LIBRARY,
    STRAIGHT,
    check_device,
    check_floating,
    compiled,
    memory_format_of,
    register_gradient,
    traits_for,
)
from stylepipe.kernels._operands import Operands, real_of
from stylepipe.kernels._styled_composed import (
    StyledOptions,
    StyledTensors,
    composed,
    filtered,
    gradient_of,
    modulated,
    per_pixel_dot,
    transposed_filter,
)
from stylepipe.kernels.bias_act import check_clamp
from stylepipe.kernels.native import Library


def styled_act(
    x: Tensor,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "lrelu",
    gain: float | None = None,
    clamp: float | None = None,
    next_scale: Tensor | None = None,
    *,
    f: Tensor | None = None,
    padding: int = 0,
    filter_gain: float = 1,
) -> Tensor:
    """Return y, differentiable any number of times.

    Args:
        x: [N, C, H, W], any floating type; contiguous or channels_last. The arithmetic is in float32 (float64 for
            float64) wherever compiled kernels run, and the small operands stay in that type; autocast changes nothing.
        scale: [N, C], the demodulation, times whatever joins it.
        noise: [N or 1, 1, H', W'], with the scalar `noise_strength` [].
        bias: [C].
        act, gain, clamp: as bias_act has them.
        next_scale: [N, C], the next layer's modulation.
        f, padding, filter_gain: x is first filtered by upfirdn2d(x, f, padding=padding, gain=filter_gain).

    Returns:
        [N, C, H', W'] of x's type and in its memory format. H' and W' are those behind the filter.

    Raises:
        ValueError: a shape does not fit, or noise comes without its strength.
    """
    tensors = StyledTensors(x, scale, noise, noise_strength, bias, next_scale, None, f)
    return _run(tensors, StyledOptions.of(act, gain, clamp, padding, filter_gain))[0]


def styled_act_rgb(
    x: Tensor,
    rgb_weight: Tensor,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "lrelu",
    gain: float | None = None,
    clamp: float | None = None,
    next_scale: Tensor | None = None,
    *,
    f: Tensor | None = None,
    padding: int = 0,
    filter_gain: float = 1,
) -> tuple[Tensor, Tensor]:
    """Return y as styled_act does, and rgb beside it, the sum over channels of v * rgb_weight.

    Args:
        rgb_weight: [N, K, C], read as float32 (float64 for float64); with K = 3 colours the sum joins the pass.
        x, scale, noise, noise_strength, bias, act, gain, clamp, next_scale, f, padding, filter_gain: as there.

    Returns:
        y, and rgb [N, K, H', W'] float32 (float64 for float64), channels_last.
    """
    tensors = StyledTensors(x, scale, noise, noise_strength, bias, next_scale, rgb_weight, f)
    y, rgb = _run(tensors, StyledOptions.of(act, gain, clamp, padding, filter_gain))
    assert rgb is not None
    return y, rgb


def _run(of: StyledTensors, options: StyledOptions) -> tuple[Tensor, Tensor | None]:
    """Run the op on what kernels join, and other ops on the rest; rgb is None without a weight."""
    _check(of, options)
    if of.rgb_weight is not None:  # whose type is that of rgb, whatever runs
        of = of._replace(rgb_weight=of.rgb_weight.to(real_of(of.x.dtype)))
    traits = traits_for("epilogue", of.x, options.act)
    if traits is None:
        return composed(of, options)
    straight = options.act in STRAIGHT
    if of.f is not None and not (straight and of.rgb_weight is None and _filters(of.x, of.f, options)):
        of = of._replace(x=filtered(of, options), f=None)
    if of.rgb_weight is not None and not (straight and makes_rgb(traits, of.x, of.rgb_weight)):
        v, _ = torch.ops.stylepipe.styled_act(*of._replace(next_scale=None, rgb_weight=None), *options)
        return modulated(v, of.next_scale), per_pixel_dot(v, of.rgb_weight)
    y, rgb = torch.ops.stylepipe.styled_act(*of, *options)
    return y, None if of.rgb_weight is None else rgb


def _check(of: StyledTensors, options: StyledOptions) -> None:
    """Raise ValueError where an operand does not fit x: kernels would read beyond its end."""
    if of.x.ndim != 4:
        raise ValueError(f"styled_act: x of shape {list(of.x.shape)}: expected [N, C, H, W]")
    check_floating("styled_act", of.x)
    if (of.noise is None) != (of.noise_strength is None):
        raise ValueError("styled_act: noise and noise_strength go together; give both or neither")
    check_clamp("styled_act", options.clamp)
    check_device("styled_act", "f", of.f, of.x)
    n, c, h, w = of.x.shape
    if of.f is not None:
        grown = 2 * options.padding + 1
        h, w = h + grown - of.f.shape[0], w + grown - of.f.shape[-1]
    shapes: dict[str, list[list[Any]]] = {
        "scale": [[n, c]],
        "noise": [[n, 1, h, w], [1, 1, h, w]],
        "noise_strength": [[]],
        "bias": [[c]],
        "next_scale": [[n, c]],
        "rgb_weight": [[n, "K", c]],
    }
    for name, accepted in shapes.items():
        tensor = getattr(of, name)
        if tensor is None:
            continue
        check_device("styled_act", name, tensor, of.x)
        found = list(tensor.shape)
        if name == "rgb_weight" and len(found) == 3:
            found[1] = "K"  # any number of colours
        if found not in accepted:
            expected = " or ".join(str(shape).replace("'", "") for shape in accepted)
            raise ValueError(f"styled_act: {name} of shape {list(tensor.shape)}: expected {expected}")


# --- the op ---

_ARGUMENTS = (
    "Tensor x, Tensor? scale, Tensor? noise, Tensor? noise_strength, Tensor? bias, Tensor? next_scale,"
    " Tensor? rgb_weight, Tensor? f, int padding, float filter_gain, str act, float alpha, float gain, float? clamp"
)
LIBRARY.define(f"styled_act({_ARGUMENTS}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    f"styled_act_backward(Tensor? dy, Tensor? drgb, {_ARGUMENTS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)

_N_TENSORS = len(StyledTensors._fields)
_FIELDS = StyledTensors._fields[:-1]  # those that have gradients; f is a constant


@torch.library.impl(LIBRARY, "styled_act", ANY_DEVICE)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    of, options = _split(arguments)
    kernels = compiled("epilogue", of.x, options.act) if of.x.numel() else None
    if kernels is None:
        y, rgb = composed(of, options)
    else:
        of = of._replace(x=of.x.contiguous(memory_format=memory_format_of(of.x)))
        if of.f is None:
            y, rgb = run_forward(kernels, of.x, view_of(of.x), _operands(of, options))
            rgb = None if rgb is None else rgb.unflatten(1, y.shape[2:]).permute(0, 3, 1, 2)
        else:
            y, rgb = run_fir_epilogue(_fused(of.x), of.x, of.f, _geometry(of, options), _operands(of, options)), None
    return y, of.x.new_empty(0) if rgb is None else rgb


@torch.library.register_fake("stylepipe::styled_act", lib=LIBRARY)
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    of, options = _split(arguments)
    n, c, h, w = of.x.shape
    if of.f is not None:
        grown = 2 * options.padding + 1 - of.f.shape[0]
        h, w = h + grown, w + grown
    y = torch.empty((n, c, h, w), dtype=of.x.dtype, device=of.x.device, memory_format=memory_format_of(of.x))
    if of.rgb_weight is None:
        return y, of.x.new_empty(0)
    return y, of.rgb_weight.new_empty(n, h, w, of.rgb_weight.shape[1]).permute(0, 3, 1, 2)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS])
    ctx.options = inputs[_N_TENSORS:]
    ctx.set_materialize_grads(False)


def _forward_autograd(ctx: Any, dy: Tensor | None, drgb: Tensor | None) -> tuple[Any, ...]:
    of = StyledTensors(*ctx.saved_tensors)
    wanted = list(ctx.needs_input_grad[: len(_FIELDS)])
    if of.rgb_weight is None:
        drgb = None
    gradients = torch.ops.stylepipe.styled_act_backward(dy, drgb, *of, *ctx.options, wanted)
    asked = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    return *asked, *[None] * (1 + len(ctx.options))


register_gradient("styled_act", _forward_setup, _forward_autograd)


@torch.library.impl(LIBRARY, "styled_act_backward", ANY_DEVICE)
def _backward(dy: Tensor | None, drgb: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *arguments_of_forward, wanted = arguments
    of, options = _split(tuple(arguments_of_forward))
    if dy is None:
        dy = torch.zeros_like(filtered(of, options))
    dy = dy.contiguous(memory_format=memory_format_of(of.x))
    names = {name for name, want in zip(_FIELDS, wanted, strict=True) if want}
    kernels = compiled("epilogue", of.x, options.act) if of.x.numel() else None
    if kernels is None or "noise" in names:  # no kernel adds up over channels
        found = gradient_of(dy, drgb, of, options, names)
    else:
        found = _run_backward(kernels, dy, drgb, of, options, names - ({"rgb_weight"} if drgb is None else set()))
    gradients = []
    for name in _FIELDS:
        tensor = getattr(of, name)
        if name not in names or tensor is None:
            gradients.append(dy.new_empty(0))
        else:
            gradients.append(found[name].to(tensor.dtype) if name in found else torch.zeros_like(tensor))
    return tuple(gradients)


def _run_backward(
    kernels: Library, dy: Tensor, drgb: Tensor | None, of: StyledTensors, options: StyledOptions, names: set[str]
) -> dict[str, Tensor]:
    x = of.x.contiguous(memory_format=memory_format_of(of.x))
    if of.f is not None:
        geometry = _geometry(of, options)
        dz, sums = run_fir_epilogue_backward(_fused(x), dy, x, of.f, geometry, _operands(of, options), names)
        dx = transposed_filter(dz, of, options)
    else:
        if drgb is not None:
            drgb = drgb.permute(0, 2, 3, 1).contiguous()  # as it lies, where channels_last
        dx, sums = run_backward(kernels, dy, x, view_of(x), _operands(of, options), names, drgb=drgb)
    found = {"x": dx, **sums}
    if "bias" in found:
        found["bias"] = found["bias"].sum(0)
    if "noise_strength" in found:
        found["noise_strength"] = found["noise_strength"].sum()
    if "next_scale" in found:  # its sums lie beside those of scale, and outputs of an op may share no memory
        found["next_scale"] = found["next_scale"].clone()
    return found


@torch.library.register_fake("stylepipe::styled_act_backward", lib=LIBRARY)
def _backward_fake(dy: Tensor | None, drgb: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, wanted = *arguments[: len(_FIELDS)], arguments[-1]
    x = tensors[0]
    return tuple(
        torch.empty_like(tensor, memory_format=memory_format_of(tensor) if tensor is x else torch.contiguous_format)
        if want and tensor is not None
        else x.new_empty(0)
        for tensor, want in zip(tensors, wanted, strict=True)
    )


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: 2 + _N_TENSORS])
    *ctx.options, ctx.wanted = inputs[2 + _N_TENSORS :]
    ctx.set_materialize_grads(False)


def _backward_autograd(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    """Differentiate gradient_of."""
    create_graph = torch.is_grad_enabled()
    asked = zip(_FIELDS, cotangents, ctx.wanted, strict=True)
    given = {name: cotangent for name, cotangent, want in asked if want and cotangent is not None}
    with torch.enable_grad():
        # By aliases: what one saved tensor owes to another is not to be counted here.
        saved: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
        dy, drgb, *tensors = saved
        of, options = StyledTensors(*tensors), StyledOptions(*ctx.options)
        dy = torch.zeros_like(filtered(of, options)) if dy is None else dy
        found = gradient_of(dy, drgb, of, options, set(given))
        outputs = [name for name in found if name in given and found[name].requires_grad]
        inputs = [i for i, alias in enumerate(saved) if alias is not None and ctx.needs_input_grad[i]]
        gradients: dict[int, Tensor | None] = {}
        if outputs:
            by_inputs = torch.autograd.grad(
                [found[name] for name in outputs], [saved[i] for i in inputs], [given[name] for name in outputs],
                create_graph=create_graph, allow_unused=True,
            )  # fmt: skip
            gradients = dict(zip(inputs, by_inputs, strict=True))
    return tuple(gradients.get(i) for i in range(len(ctx.needs_input_grad)))


register_gradient("styled_act_backward", _backward_setup, _backward_autograd)


def _split(arguments: tuple[Any, ...]) -> tuple[StyledTensors, StyledOptions]:
    return StyledTensors(*arguments[:_N_TENSORS]), StyledOptions(*arguments[_N_TENSORS:])


def _operands(of: StyledTensors, options: StyledOptions) -> Operands:
    return Operands(
        scale=of.scale,
        bias=of.bias,
        next_scale=of.next_scale,
        noise=None if of.noise is None else of.noise.flatten(1),
        noise_strength=of.noise_strength,
        rgb_weight=of.rgb_weight,
        **options.activation(),
    )


def _geometry(of: StyledTensors, options: StyledOptions) -> Geometry:
    assert of.f is not None
    return plain_geometry(of.x, of.f, options.padding, options.filter_gain)


def _filters(x: Tensor, f: Tensor, options: StyledOptions) -> bool:
    """Tell whether a fused kernel filters x."""
    traits = traits_for("fused_fir", x)
    return traits is not None and fits_fused(traits, x, f) and min(x.shape[2:]) + 2 * options.padding >= f.numel()


def _fused(x: Tensor) -> Library:
    kernels = compiled("fused_fir", x)
    assert kernels is not None
    return kernels
