"""StyleGAN: counts, growing to the bit, what takes part in a stage, noise, layers against their definitions."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from stylepipe.errors import UserError
from stylepipe.networks.stylegan import Discriminator, Generator, SynthesisLayer, adaptive_instance_norm

SMALL = {"channel_base": 128, "channel_max": 16}
STAGES = [(4, False), (8, True), (8, False), (16, True), (16, False)]


def small_generator(res: int = 16, **options) -> Generator:
    return Generator(res, **(SMALL | {"z_dim": 8, "w_dim": 12, "mapping_layers": 2} | options))


def trained_generator(res: int = 16, **options) -> Generator:
    """Return one whose constant and noise are not those of the start, which hide what is made of them."""
    G = small_generator(res, **options)
    torch.nn.init.normal_(G.synthesis.b4.layer0.const)
    for layer in layers_of(G):
        torch.nn.init.normal_(layer.noise_strength, std=0.3)
        torch.nn.init.normal_(layer.bias, std=0.3)
    return G


def layers_of(G: Generator) -> list[SynthesisLayer]:
    return [layer for block in G.synthesis.blocks() for layer in block.layers()]


def small_discriminator(res: int = 16, **options) -> Discriminator:
    return Discriminator(res, **(SMALL | options))


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def alpha_of(fading: bool) -> torch.Tensor | None:
    return torch.tensor(0.5) if fading else None


def parameters_of(modules: list[torch.nn.Module]) -> set[torch.nn.Parameter]:
    return {p for module in modules for p in module.parameters()}


def poison_all_but(network: torch.nn.Module, modules: list[torch.nn.Module]) -> None:
    used = parameters_of(modules)
    with torch.no_grad():
        for p in network.parameters():
            if p not in used:
                p.fill_(torch.nan)


# --- construction ---


def test_both_networks_have_the_published_number_of_parameters_at_1024_px() -> None:
    with torch.device("meta"):
        G = Generator(1024)
        assert trainable(G) == pytest.approx(26.2e6, abs=0.05e6)
        assert trainable(Discriminator(1024)) == pytest.approx(23.1e6, abs=0.05e6)
    assert G.num_ws == 18


def test_images_of_every_stage_are_float32_and_channels_last() -> None:
    G, D = small_generator(), small_discriminator()
    ws = G.mapping(torch.randn(4, 8))
    for res, fading in STAGES:
        img = G.synthesis(ws, res=res, alpha=alpha_of(fading))
        assert img.shape == (4, 3, res, res)
        assert img.dtype == torch.float32
        assert img.is_contiguous(memory_format=torch.channels_last)
        logits, features, classes, direction = D.judge(img, alpha=alpha_of(fading))
        assert (logits.shape, features.shape, classes, direction) == ((4, 1), (4, 16), None, None)
    assert torch.equal(G.synthesis(ws, "const"), G.synthesis(ws, "const", res=16))


def test_activations_stay_channels_last() -> None:
    G, D = small_generator(), small_discriminator()
    outputs = []
    for network in (G.synthesis, D):
        for name, module in network.named_modules():
            if name.endswith(("layer0", "layer1", "torgb", "conv0", "conv1", "fromrgb")):
                module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    D(G(torch.randn(2, 8)))
    assert len(outputs) == 6 + 1 + 4 + 1
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in outputs)


def test_means_of_classes_need_labels() -> None:
    with pytest.raises(UserError, match="class_w_avg: expected a network with labels"):
        small_generator(class_w_avg=True)


@pytest.mark.parametrize("half_dtype", [None, torch.bfloat16, "float16"])
def test_the_config_rebuilds_the_network(half_dtype: str | torch.dtype | None) -> None:
    G = small_generator(half_levels=1, half_dtype=half_dtype, c_dim=2, class_w_avg=True, conv_clamp=256)
    D = small_discriminator(half_levels=1, half_dtype=half_dtype, c_dim=2, mbstd_group_size=2)
    for network in (G, D, small_generator(), small_discriminator(grows=False)):
        again = type(network)(**json.loads(json.dumps(network.config)))
        again.load_state_dict(network.state_dict())
        assert again.config == network.config


def test_truncation_leaves_styles_behind_the_cutoff() -> None:
    G, z = small_generator(), torch.randn(2, 8)
    full = G.mapping(z)
    cut = G.mapping(z, truncation_psi=0.0, truncation_cutoff=4)
    assert torch.equal(G(z, truncation_psi=0.0, truncation_cutoff=4), G.synthesis(cut, "const"))
    assert torch.equal(cut[:, 4:], full[:, 4:])
    assert cut[:, :4].eq(0).all()


# --- growing ---


@pytest.mark.parametrize("res", [8, 16])
@pytest.mark.parametrize("half_levels", [0, 2])
def test_a_fade_begins_and_ends_to_the_bit(res: int, half_levels: int) -> None:
    half = {"half_levels": half_levels, "half_dtype": "bfloat16"}
    G = trained_generator(**half)
    ws, noise = G.mapping(torch.randn(4, 8)), torch.randn(4, G.synthesis.noise_size())
    before, grown, halfway = (
        G.synthesis(ws, noise=noise, res=res, alpha=torch.tensor(alpha)) for alpha in (0.0, 1.0, 0.5)
    )
    lower = G.synthesis(ws, noise=noise, res=res // 2)
    assert torch.equal(before, lower.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.equal(grown, G.synthesis(ws, noise=noise, res=res))
    torch.testing.assert_close(halfway, (before + grown) / 2)


@pytest.mark.parametrize(("res", "fading"), STAGES)
def test_gradients_reach_exactly_what_a_stage_uses(res: int, fading: bool) -> None:
    G, D = trained_generator(), small_discriminator(c_dim=2)
    c = torch.eye(2).repeat(2, 1)
    ws = G.mapping(torch.randn(4, 8)).detach()
    img = G.synthesis(ws, res=res, alpha=alpha_of(fading))
    D(img, c, alpha_of(fading)).square().sum().backward()
    for network in (G.synthesis, D):
        reached = {p for p in network.parameters() if p.grad is not None}
        assert reached == parameters_of(network.used_at(res, fading))
        assert all(p.grad.isfinite().all() and p.grad.any() for p in reached)


@pytest.mark.parametrize(("res", "fading"), STAGES)
def test_a_stage_runs_no_level_that_it_does_not_use(res: int, fading: bool) -> None:
    G, D = small_generator(), small_discriminator()
    for network in (G.synthesis, D):
        poison_all_but(network, network.used_at(res, fading))
    ws = G.mapping(torch.randn(4, 8))
    ws = torch.cat([ws[:, : 2 * (res.bit_length() - 2)], torch.full_like(ws, torch.nan)], dim=1)[:, : G.num_ws]
    img = G.synthesis(ws, res=res, alpha=alpha_of(fading))
    assert img.isfinite().all()
    assert D(img, alpha=alpha_of(fading)).isfinite().all()


# --- noise ---


def test_drawn_noise_reaches_each_layer_as_its_slice() -> None:
    G = trained_generator(8)
    assert G.synthesis.noise_size() == 2 * 4 * 4 + 2 * 8 * 8
    assert G.synthesis.noise_size(4) == 2 * 4 * 4
    ws = G.mapping(torch.randn(2, 8))
    flat = torch.cat([layer.noise_const.flatten() for layer in layers_of(G)]).expand(2, -1)
    const = G.synthesis(ws, noise_mode="const")
    torch.testing.assert_close(G.synthesis(ws, noise=flat), const)
    torch.testing.assert_close(G.synthesis(ws, noise=flat, res=4), G.synthesis(ws, noise_mode="const", res=4))
    assert not torch.allclose(G.synthesis(ws, noise_mode="none"), const)
    assert not torch.allclose(G.synthesis(ws), G.synthesis(ws))
    with pytest.raises(ValueError, match="noise_mode"):
        G.synthesis(ws, noise_mode="fixed")
    with pytest.raises(ValueError, match="expected \\[N, 4, w_dim\\]"):
        G.synthesis(ws[:, :3])


def test_noise_counts_for_nothing_at_the_start() -> None:
    G = small_generator()
    ws = G.mapping(torch.randn(2, 8))
    assert torch.equal(G.synthesis(ws), G.synthesis(ws, noise_mode="none"))


def test_each_style_reaches_one_layer() -> None:
    G = trained_generator(8)
    ws = G.mapping(torch.randn(1, 8)).contiguous().requires_grad_()
    outputs = []
    for layer in layers_of(G):
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    G.synthesis(ws, noise_mode="none")
    for i, output in enumerate(outputs):
        (grad,) = torch.autograd.grad(output.square().sum(), ws, retain_graph=True)
        assert grad.abs().sum(dim=2)[0].bool().tolist() == [j <= i for j in range(4)]


# --- layers ---


def test_adain_replaces_mean_and_deviation() -> None:
    x, scale, shift = torch.randn(3, 5, 6, 4) * 4 + 7, torch.randn(3, 5), torch.randn(3, 5)
    y = adaptive_instance_norm(x, scale, shift)
    torch.testing.assert_close(y.mean(dim=(2, 3)), shift, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y.std(dim=(2, 3), correction=0), scale.abs(), rtol=1e-4, atol=1e-5)
    mean, variance = x.mean(dim=(2, 3), keepdim=True), x.var(dim=(2, 3), correction=0, keepdim=True)
    expected = scale[:, :, None, None] * (x - mean) / (variance + 1e-8).sqrt() + shift[:, :, None, None]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adaptive_instance_norm(torch.ones(3, 5, 2, 2), scale, shift)[:, :, 0, 0], shift)


def test_derivatives_of_adain_are_those_of_its_definition() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    scale, shift = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = (x, scale, shift)
    y = adaptive_instance_norm(*inputs)
    expected = F.instance_norm(x, eps=1e-8) * scale[:, :, None, None] + shift[:, :, None, None]
    weight = torch.randn_like(y)
    for f, e in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (y, expected)), strict=True):
        torch.testing.assert_close(f, e)
    assert torch.autograd.gradcheck(adaptive_instance_norm, inputs)
    assert torch.autograd.gradgradcheck(adaptive_instance_norm, inputs)


@pytest.mark.parametrize("up", [1, 2])
def test_a_layer_is_that_of_the_paper(up: int) -> None:
    """Upsampling by nearest neighbours, convolution, blur, noise, bias, leaky ReLU, AdaIN; bounds apart.

    AdaIN's statistics are over the whole image, so what stands before it is compared.
    """
    layer = SynthesisLayer(5, 7, w_dim=6, res=16, up=up)
    for parameter in (layer.bias, layer.noise_strength):
        torch.nn.init.normal_(parameter)
    x, w, noise = torch.randn(3, 5, 16 // up, 16 // up), torch.randn(3, 6), torch.randn(3, 1, 16, 16)
    y = x if up == 1 else x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    y = F.conv2d(y, layer.weight / 45**0.5, padding=1)
    if up == 2:
        taps = torch.tensor([1.0, 2, 1]) / 4
        y = F.conv2d(y, torch.outer(taps, taps).expand(7, 1, 3, 3), padding=1, groups=7)
    y = y + noise * layer.noise_strength[:, None, None] + layer.bias[:, None, None]
    expected = F.leaky_relu(y, 0.2)
    out = layer(x, w, noise)
    style = w @ layer.affine.weight.t() / 6**0.5
    scale, shift = 1 + style[:, :7, None, None], style[:, 7:, None, None]
    inside = slice(up - 1, 17 - up)
    before = ((out - shift) / scale)[:, :, inside, inside]  # up to mean and deviation
    for image in (before, expected := expected[:, :, inside, inside]):
        image -= image.mean(dim=(2, 3), keepdim=True)
        image /= image.square().mean(dim=(2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(before, expected, rtol=1e-3, atol=1e-4)


def test_the_discriminator_blurs_before_it_halves() -> None:
    """Convolution, blur, convolution, 2x2 mean; bounds apart."""
    block = small_discriminator().b16
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    taps = torch.tensor([1.0, 2, 1]) / 4
    y = F.leaky_relu(F.conv2d(x, block.conv0.weight / 72**0.5, padding=1), 0.2) * 2**0.5
    y = F.conv2d(y, torch.outer(taps, taps).expand(8, 1, 3, 3), padding=1, groups=8)
    y = F.avg_pool2d(F.conv2d(y, block.conv1.weight / 72**0.5, padding=1), 2)
    expected = F.leaky_relu(y, 0.2) * 2**0.5
    torch.testing.assert_close(block(x)[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], rtol=1e-4, atol=1e-5)


def test_the_first_layer_is_a_constant_of_ones_without_convolution() -> None:
    layer = small_generator().synthesis.b4.layer0
    assert torch.equal(layer.const, torch.ones(16, 4, 4))
    assert {name for name, _ in layer.named_parameters(recurse=False)} == {"const", "noise_strength", "bias"}


def test_conv_clamp_limits_activations_before_their_normalization() -> None:
    G, clamped = trained_generator(), small_generator(conv_clamp=0.1)
    clamped.load_state_dict(G.state_dict())
    z = torch.randn(2, 8)
    assert not torch.allclose(G(z), clamped(z))


# --- precision ---


@pytest.mark.parametrize(("half_dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_close_to_float32(half_dtype: str, tolerance: float) -> None:
    half = {"half_levels": 4, "half_dtype": half_dtype, "conv_clamp": 256}
    img = torch.randn(4, 3, 16, 16)
    for full, halved, x in (
        (trained_generator(), small_generator(**half), torch.randn(4, 8)),
        (small_discriminator(), small_discriminator(**half), img),
    ):
        halved.load_state_dict(full.state_dict())
        expected, found = full(x).detach(), halved(x)
        assert found.dtype == torch.float32
        assert 0 < float((found.detach() - expected).norm() / expected.norm()) < tolerance
        found.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in halved.parameters() if p.grad is not None)


# --- derivatives ---


def derivatives_hold(function, *inputs: torch.Tensor) -> bool:
    """Check first and second derivatives against differences."""
    first = torch.autograd.gradcheck(function, inputs, fast_mode=True)
    return first and torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def in_float64(network: torch.nn.Module) -> torch.nn.Module:
    for module in network.double().modules():
        if hasattr(module, "dtype"):
            module.dtype = torch.float64
    return network


def test_derivatives_of_the_synthesis_by_styles_hold() -> None:
    """Path length regularization takes them."""
    G = in_float64(trained_generator(8, w_dim=3, channel_base=16, channel_max=2))
    alpha = torch.tensor(0.3, dtype=torch.float64)
    ws = torch.randn(2, G.num_ws, 3, dtype=torch.float64, requires_grad=True)
    assert derivatives_hold(lambda ws: G.synthesis(ws, "const", alpha=alpha), ws)
