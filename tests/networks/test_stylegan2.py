"""StyleGAN2: shapes, settings, determinism, precision, derivatives. Golden numbers: tests/interop/test_nvidia.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from stylepipe.errors import UserError
from stylepipe.networks import layers, stylegan2
from stylepipe.networks.layers import MinibatchStdDev, SynthesisLayer
from stylepipe.networks.stylegan2 import ARCHITECTURES, Discriminator, Generator

SMALL = {"channel_base": 128, "channel_max": 16}


def small_generator(res: int = 16, **options) -> Generator:
    return Generator(res, **(SMALL | {"z_dim": 8, "w_dim": 12, "mapping_layers": 2} | options))


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- construction ---


def test_config_f_at_1024_px_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert trainable(Generator(1024)) == pytest.approx(30.0e6, abs=0.4e6)
        assert trainable(Discriminator(1024)) == pytest.approx(29.0e6, abs=0.05e6)


def test_networks_run_on_the_meta_device() -> None:
    with torch.device("meta"):
        G, D = Generator(64), Discriminator(64)
        img = G(torch.empty(4, 512))
        logits = D(img)
    assert img.shape == (4, 3, 64, 64)
    assert logits.shape == (4, 1)
    assert logits.is_meta


@pytest.mark.parametrize("res", [4, 8, 32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("c_dim", [0, 3])
def test_every_architecture_gives_images_and_logits_and_trains_all_parameters(
    architecture: str, res: int, c_dim: int
) -> None:
    G = small_generator(res, architecture=architecture, c_dim=c_dim)
    D = Discriminator(res, architecture=architecture, c_dim=c_dim, **SMALL)
    c = torch.eye(3)[[0, 1, 2, 0]] if c_dim else None
    img = G(torch.randn(4, 8), c)
    assert img.shape == (4, 3, res, res)
    assert img.dtype == torch.float32
    logits = D(img, c)
    assert logits.shape == (4, 1)
    F.softplus(-logits).mean().backward()
    for network in (G, D):
        without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not without


def test_labels_change_images_and_logits() -> None:
    G, D = small_generator(c_dim=3), Discriminator(16, c_dim=3, **SMALL)
    z, c = torch.randn(1, 8).expand(3, -1), torch.eye(3)
    img = G(z, c)
    assert not torch.allclose(img[0], img[1])
    logits = D(img[:1].expand(3, -1, -1, -1), c)
    assert not torch.allclose(logits[0], logits[1])
    with pytest.raises(ValueError, match="3 labels"):
        G(z)


def test_an_auxiliary_classifier_stands_beside_the_projection_or_replaces_it() -> None:
    img, c = torch.randn(3, 3, 16, 16), torch.eye(3)
    for conditioning, sees_labels in (("aux", False), ("both", True)):
        D = Discriminator(16, c_dim=3, conditioning=conditioning, **SMALL)
        logits, _, classes, _ = D.judge(img, c)
        assert (logits.shape, classes.shape) == ((3, 1), (3, 3))
        assert torch.equal(D(img, c), logits)
        assert torch.equal(D(img, c.roll(1, 0)), logits) != sees_labels
        assert torch.equal(D.judge(img, c.roll(1, 0)).class_logits, classes)
        (logits.sum() + classes.logsumexp(dim=1).sum()).backward()
        assert all(p.grad is not None for p in D.parameters())
    assert Discriminator(16, c_dim=3, **SMALL).judge(img, c).class_logits is None


def test_without_their_options_networks_are_what_they_were() -> None:
    """Names, draws and settings alike, so that files and golden numbers hold."""
    torch.manual_seed(3)
    G, D = small_generator(c_dim=3), Discriminator(16, c_dim=3, **SMALL)
    torch.manual_seed(3)
    more = small_generator(c_dim=3, class_w_avg=True), Discriminator(16, c_dim=3, conditioning="both", **SMALL)
    added = {"mapping.class_w_offset": G, "b4.aux.weight": D, "b4.aux.bias": D}
    for plain, extended in zip((G, D), more, strict=True):
        state, larger = plain.state_dict(), extended.state_dict()
        assert larger.keys() - state.keys() == {name for name, network in added.items() if network is plain}
        assert all(torch.equal(state[name], larger[name]) for name in state)
        assert {"class_w_avg", "conditioning"}.isdisjoint(plain.config)


@pytest.mark.parametrize("half_dtype", [None, torch.bfloat16, "float16"])
def test_the_config_rebuilds_the_network(half_dtype: str | torch.dtype | None) -> None:
    G = small_generator(half_levels=1, half_dtype=half_dtype, architecture="resnet", conv_clamp=256)
    D = Discriminator(16, half_levels=1, half_dtype=half_dtype, mbstd_group_size=2, **SMALL)
    labelled = small_generator(c_dim=2, class_w_avg=True), Discriminator(16, c_dim=2, conditioning="aux", **SMALL)
    for network in (G, D, *labelled):
        config = json.loads(json.dumps(network.config))
        again = type(network)(**config)
        again.load_state_dict(network.state_dict())
        assert again.config == network.config


def test_initialisation_follows_torchs_seed() -> None:
    for build in (small_generator, lambda: Discriminator(16, **SMALL)):
        states = []
        for _ in range(2):
            torch.manual_seed(5)
            states.append(build().state_dict())
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"res": 48}, "power of two"),
        ({"res": 2}, "power of two"),
        ({"architecture": "unet"}, "skip, resnet, orig"),
        ({"half_dtype": "float64"}, "float16, bfloat16"),
        ({"channel_base": 8}, "channel_base"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    for build in (Generator, Discriminator):
        with pytest.raises(UserError, match=message):
            build(**({"res": 16} | SMALL | options))


def test_options_of_labels_need_labels() -> None:
    with pytest.raises(UserError, match="class_w_avg: expected a network with labels"):
        small_generator(class_w_avg=True)
    with pytest.raises(UserError, match="conditioning 'aux': expected a network with labels"):
        Discriminator(16, conditioning="aux", **SMALL)
    with pytest.raises(UserError, match="conditioning 'acgan': expected one of projection, aux, both"):
        Discriminator(16, c_dim=2, conditioning="acgan", **SMALL)


# --- mapping and truncation ---


def test_truncation_pulls_the_leading_styles_to_their_mean() -> None:
    G = small_generator()
    G.mapping.w_avg.copy_(torch.randn(12))
    z = torch.randn(3, 8)
    ws = G.mapping(z)
    assert ws.shape == (3, G.num_ws, 12)
    torch.testing.assert_close(G.mapping(z, truncation_psi=0), G.mapping.w_avg.expand_as(ws))
    half = G.mapping(z, truncation_psi=0.5, truncation_cutoff=2)
    torch.testing.assert_close(half[:, :2], (ws[:, :2] + G.mapping.w_avg) / 2)
    torch.testing.assert_close(half[:, 2:], ws[:, 2:])


def test_truncation_pulls_towards_the_class_where_its_mean_is_kept() -> None:
    G = small_generator(c_dim=3, class_w_avg=True)
    G.mapping.w_avg.copy_(torch.randn(12))
    z, c = torch.randn(2, 8), torch.eye(3)[[2, 0]]
    ws = G.mapping(z, c)
    torch.testing.assert_close(G.mapping(z, c, 0), G.mapping.w_avg.expand_as(ws), msg="nothing is known of classes yet")
    G.mapping.class_w_offset.copy_(torch.randn(3, 12))
    centers = G.mapping.w_avg + G.mapping.class_w_offset[[2, 0]]
    torch.testing.assert_close(G.mapping(z, c, 0), centers[:, None].expand_as(ws))
    torch.testing.assert_close(G.mapping(z, c, 0, class_centers=False), G.mapping.w_avg.expand_as(ws))
    cut = G.mapping(z, c, truncation_psi=0.25, truncation_cutoff=1)
    torch.testing.assert_close(cut[:, 0], 0.25 * ws[:, 0] + 0.75 * centers)
    torch.testing.assert_close(cut[:, 1:], ws[:, 1:])


def test_forward_leaves_the_mean_style_to_the_trainer() -> None:
    G = small_generator()
    G(torch.randn(4, 8))
    assert G.mapping.w_avg.count_nonzero() == 0


# --- noise ---


def test_drawn_noise_reaches_each_layer_as_its_slice() -> None:
    G = small_generator(8)
    layers = [G.synthesis.b4.conv1, G.synthesis.b8.conv0, G.synthesis.b8.conv1]
    for layer in layers:
        torch.nn.init.constant_(layer.noise_strength, 0.5)
    assert G.synthesis.noise_size() == 4 * 4 + 8 * 8 + 8 * 8
    ws = G.mapping(torch.randn(2, 8))
    flat = torch.cat([layer.noise_const.flatten() for layer in layers]).expand(2, -1)
    const = G.synthesis(ws, noise_mode="const")
    torch.testing.assert_close(G.synthesis(ws, noise_mode="random", noise=flat), const)
    assert not torch.allclose(G.synthesis(ws, noise_mode="none"), const)
    assert not torch.allclose(G.synthesis(ws), G.synthesis(ws))
    with pytest.raises(ValueError, match="noise_mode"):
        G.synthesis(ws, noise_mode="fixed")


# --- layers ---


@pytest.mark.parametrize("up", [1, 2])
def test_modulated_convolution_is_that_of_the_paper(up: int) -> None:
    """Equations 1 to 3 with one weight per sample; the upsampling as zero insertion, filter and convolution."""
    torch.manual_seed(0)
    layer = SynthesisLayer(5, 7, w_dim=6, res=8, up=up)
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.constant_(layer.noise_strength, 0.3)
    x, w, noise = torch.randn(3, 5, 8 // up, 8 // up), torch.randn(3, 6), torch.randn(3, 1, 8, 8)
    style = w @ layer.affine.weight.t() / 6**0.5 + layer.affine.bias
    weights = layer.weight / 45**0.5 * style[:, None, :, None, None]
    weights = weights / (weights.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    if up == 2:
        taps = torch.tensor([1.0, 3, 3, 1]) / 4
        y = [F.conv_transpose2d(x[n : n + 1], weights[n].transpose(0, 1), stride=2) for n in range(3)]
        fir = torch.outer(taps, taps).expand(7, 1, 4, 4)
        y = F.conv2d(F.pad(torch.cat(y), [1, 1, 1, 1]), fir, groups=7)
    else:
        y = torch.cat([F.conv2d(x[n : n + 1], weights[n], padding=1) for n in range(3)])
    expected = F.leaky_relu(y + 0.3 * noise + layer.bias[:, None, None], 0.2) * 2**0.5
    modulation = layer.modulate(w, x.dtype)
    x = (x * modulation.style[:, :, None, None]).contiguous(memory_format=torch.channels_last)
    y, rgb = layer(x, modulation, noise)
    assert rgb is None
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    next_style, rgb_weight = torch.randn(3, 7), torch.randn(3, 3, 7)
    y, rgb = layer(x, modulation, noise, next_style, rgb_weight)
    torch.testing.assert_close(y, expected * next_style[:, :, None, None], rtol=1e-4, atol=1e-5)
    colours = torch.einsum("nchw,nkc->nkhw", expected, rgb_weight)
    torch.testing.assert_close(rgb, colours, rtol=1e-4, atol=1e-4)


def test_minibatch_stddev_is_that_of_the_groups() -> None:
    x = torch.randn(6, 4, 3, 3)
    y = MinibatchStdDev(3, num_channels=2)(x)
    assert y.shape == (6, 6, 3, 3)
    torch.testing.assert_close(y[:, :4], x)
    # Images n, n + 2 and n + 4 are a group; the second feature channel covers channels 2 and 3.
    expected = x[1::2, 2:].std(dim=0, unbiased=False).mean()
    torch.testing.assert_close(y[3, 5], expected.expand(3, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "group"), [(3, 3), (6, 3), (8, 4), (5, 1), (2, 2)])
def test_minibatch_stddev_takes_the_largest_group_that_divides_the_batch(batch: int, group: int) -> None:
    x = torch.randn(batch, 4, 2, 2)
    assert torch.equal(MinibatchStdDev(4)(x), MinibatchStdDev(group)(x))


def test_conv_clamp_limits_activations() -> None:
    G = small_generator(conv_clamp=0.25)
    outputs = []
    for block in G.synthesis.blocks():
        # What it returns comes times the next layer's style: without, it is to be called anew.
        block.conv1.register_forward_hook(lambda module, inputs, _: outputs.append(module.forward(*inputs[:3])[0]))
    G(torch.randn(2, 8))
    assert len(outputs) == 3
    assert all(0.2 < float(output.detach().abs().max()) <= 0.25 for output in outputs)


# --- precision and layout ---


def first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_half_levels_are_the_highest_and_borders_stay_float32() -> None:
    G = small_generator(32, half_levels=2, half_dtype="bfloat16")
    D = Discriminator(32, half_levels=2, half_dtype="bfloat16", **SMALL)
    seen: dict[str, torch.dtype] = {}
    for prefix, network in (("G", G.synthesis), ("D", D)):
        for name, module in network.named_modules():
            if name.endswith(("conv0", "conv1", "conv", "torgb", "fromrgb")):
                module.register_forward_hook(
                    lambda module, inputs, output, key=f"{prefix}.{name}": seen.update({key: first(output).dtype})
                )
    logits = D(G(torch.randn(4, 8)))
    assert logits.dtype == torch.float32
    half = {key for key, dtype in seen.items() if dtype == torch.bfloat16}
    assert half == {f"{n}.b{r}.conv{i}" for n in "GD" for r in (16, 32) for i in (0, 1)}
    assert all(p.dtype == torch.float32 for network in (G, D) for p in network.parameters())


@pytest.mark.parametrize(("half_dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_close_to_float32(half_dtype: str, tolerance: float) -> None:
    G, G_half = small_generator(), small_generator(half_levels=4, half_dtype=half_dtype, conv_clamp=256)
    G_half.load_state_dict(G.state_dict())
    z = torch.randn(4, 8)
    img, img_half = G(z), G_half(z)
    assert float((img - img_half).detach().norm() / img.detach().norm()) < tolerance
    D = Discriminator(16, **SMALL)
    D_half = Discriminator(16, half_levels=4, half_dtype=half_dtype, **SMALL)
    D_half.load_state_dict(D.state_dict())
    img = img.detach()
    assert float((D(img) - D_half(img)).detach().norm() / D(img).detach().norm()) < tolerance


def test_float16_survives_weights_and_styles_of_any_scale() -> None:
    G = small_generator(half_levels=4, half_dtype="float16", conv_clamp=256)
    z = torch.randn(2, 8)
    expected = G(z)
    with torch.no_grad():
        for block in G.synthesis.blocks():
            for layer in block.layers():
                layer.weight.mul_(1e4)
                layer.affine.weight.mul_(1e3)
                layer.affine.bias.mul_(1e3)
    torch.testing.assert_close(G(z), expected, rtol=0.02, atol=0.02)


def test_activations_stay_channels_last() -> None:
    G, D = small_generator(), Discriminator(16, **SMALL)
    outputs = []
    for network in (G.synthesis, D):
        for name, module in network.named_modules():
            if name.endswith(("conv0", "conv1", "skip", "fromrgb")):
                module.register_forward_hook(lambda module, inputs, output: outputs.append(first(output)))
    D(G(torch.randn(2, 8)))
    D(torch.randn(2, 3, 16, 16))
    assert outputs
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)


# --- derivatives ---


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    """Raise where a tensor's value is read by Python."""

    class Guard(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with Guard():
        yield


def path_length_penalty(G: Generator, ws: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    ws = ws.detach().requires_grad_()
    (grad,) = torch.autograd.grad((G.synthesis(ws, noise_mode="const") * noise).sum(), ws, create_graph=True)
    return grad.square().sum(dim=2).mean(dim=1).sqrt().mean()


def r1_penalty(D: Discriminator, img: torch.Tensor) -> torch.Tensor:
    img = img.detach().requires_grad_()
    (grad,) = torch.autograd.grad(D(img).sum(), img, create_graph=True)
    return grad.square().sum(dim=(1, 2, 3)).mean()


def use_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the kernels by compositions of torch's own differentiable functions."""

    def conv2d(x, weight, bias=None, *, stride=1, padding=0, transposed=False):
        op = F.conv_transpose2d if transposed else F.conv2d
        return op(x, weight, bias, stride=stride, padding=padding)

    def bias_act(x, b=None, *, act, gain, clamp):
        x = x if b is None else x + b[:, None, None]
        return (F.leaky_relu(x, 0.2) if act == "lrelu" else x) * gain

    def styled_act_rgb(
        x, rgb_weight, scale, noise, strength, bias, act, gain, clamp, next_scale, f=None, padding=0, filter_gain=1
    ):
        x = x if f is None else upfirdn2d(x, f, padding=padding, gain=filter_gain)
        v = bias_act(x * scale[:, :, None, None] + noise * strength, bias, act=act, gain=gain, clamp=clamp)
        rgb = None if rgb_weight is None else torch.einsum("nchw,nkc->nkhw", v, rgb_weight)
        return v if next_scale is None else v * next_scale[:, :, None, None], rgb

    def styled_act(x, *style, **filters):
        return styled_act_rgb(x, None, *style, **filters)[0]

    def act_fir(x, b, f, padding, *, act, gain, clamp):
        return upfirdn2d(bias_act(x, b, act=act, gain=gain, clamp=clamp), f, padding=padding)

    def upfirdn2d(x, f, up=1, down=1, padding=0, gain=1):
        x0, x1, y0, y1 = [padding] * 4 if isinstance(padding, int) else padding
        n, c, h, w = x.shape
        zeros = x.new_zeros(n, c, h, up, w, up)
        zeros[:, :, :, 0, :, 0] = x
        x = F.pad(zeros.view(n, c, h * up, w * up), (x0, x1, y0, y1))
        f = torch.outer(f, f) * gain
        return F.conv2d(x, f.flip([0, 1]).expand(c, 1, 4, 4), groups=c)[:, :, ::down, ::down]

    def upsample2d(x, f):
        return upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1), gain=4)

    def downsample2d(x, f):
        return upfirdn2d(x, f, down=2, padding=1)

    for module in (layers, stylegan2):
        for replacement in (conv2d, bias_act, styled_act, styled_act_rgb, act_fir, upfirdn2d, upsample2d, downsample2d):
            if hasattr(module, replacement.__name__):
                monkeypatch.setattr(module, replacement.__name__, replacement)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_penalties_differentiate_as_a_composition_of_torchs_functions(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences of the penalty cannot tell: it jumps wherever an activation changes sign."""
    torch.manual_seed(2)
    G, D = small_generator(architecture=architecture), Discriminator(16, architecture=architecture, **SMALL)
    for block in G.synthesis.blocks():
        for layer in block.layers():
            torch.nn.init.constant_(layer.noise_strength, 0.1)
    ws, noise, img = G.mapping(torch.randn(4, 8)), torch.randn(4, 3, 16, 16) / 16, torch.randn(4, 3, 16, 16)
    parameters = [*G.synthesis.parameters(), *D.parameters()]

    def gradients() -> list[torch.Tensor]:
        total = path_length_penalty(G, ws, noise) + r1_penalty(D, img)
        return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)

    with no_host_synchronisation():
        found = gradients()
    use_plain_torch(monkeypatch)
    expected = gradients()
    assert sum(bool(g.any()) for g in found) > len(parameters) // 2
    for f, e in zip(found, expected, strict=True):
        assert float((f - e).norm()) <= 1e-5 * float(e.norm()) + 1e-7


def test_a_step_reads_no_value_from_the_device() -> None:
    G, D = small_generator(c_dim=3), Discriminator(16, c_dim=3, **SMALL)
    c = torch.eye(3)[[0, 1, 2, 0]]
    with no_host_synchronisation():
        ws = G.mapping(torch.randn(4, 8), c, truncation_psi=0.7)
        F.softplus(-D(G.synthesis(ws), c)).mean().backward()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected \\[N, C, 16, 16\\]"):
        Discriminator(16, **SMALL)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="expected \\[N, 6, w_dim\\]"):
        small_generator().synthesis(torch.zeros(2, 12))


def test_minibatch_stddev_can_be_switched_off_and_must_divide() -> None:
    D = Discriminator(8, **SMALL, mbstd_channels=0)
    assert D.b4.conv.weight.shape[1] == 16
    logits = D(torch.randn(3, 3, 8, 8).repeat(2, 1, 1, 1))
    torch.testing.assert_close(logits[:3], logits[3:])  # no image sees its neighbours
    with pytest.raises(UserError, match="mbstd_channels 5: expected a divisor of the 16 channels"):
        Discriminator(8, **SMALL, mbstd_channels=5)
