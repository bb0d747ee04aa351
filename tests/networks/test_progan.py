"""ProGAN: counts, growing to the bit, what takes part in a stage, layers against their definitions, derivatives."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from stylepipe.errors import UserError
from stylepipe.networks.progan import Discriminator, Generator, UpsampleConv2d, enlarge, pixel_norm

SMALL = {"channel_base": 128, "channel_max": 16}
STAGES = [(4, False), (8, True), (8, False), (16, True), (16, False)]


def small_generator(res: int = 16, **options) -> Generator:
    return Generator(res, **(SMALL | {"z_dim": 8} | options))


def small_discriminator(res: int = 16, **options) -> Discriminator:
    return Discriminator(res, **(SMALL | options))


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def alpha_of(fading: bool, value: float = 0.5) -> torch.Tensor | None:
    return torch.tensor(value) if fading else None


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
        assert trainable(Generator(1024)) == pytest.approx(23.1e6, abs=0.05e6)
        assert trainable(Discriminator(1024)) == pytest.approx(23.1e6, abs=0.05e6)


def test_channels_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        G = Generator(1024)
    widths = [block.conv1.weight.shape[0] for block in G.blocks()]
    assert widths == [512, 512, 512, 512, 256, 128, 64, 32, 16]


def test_images_of_every_stage_are_float32_and_channels_last() -> None:
    G, D = small_generator(), small_discriminator()
    for res, fading in STAGES:
        img = G(torch.randn(4, 8), res=res, alpha=alpha_of(fading))
        assert img.shape == (4, 3, res, res)
        assert img.dtype == torch.float32
        assert img.is_contiguous(memory_format=torch.channels_last)
        logits, features, classes, direction = D.judge(img, alpha=alpha_of(fading))
        assert (logits.shape, features.shape, classes, direction) == ((4, 1), (4, 16), None, None)
        assert torch.equal(D(img, alpha=alpha_of(fading)), logits)
    assert torch.equal(G(torch.ones(1, 8)), G(torch.ones(1, 8), res=16))


def test_activations_stay_channels_last() -> None:
    G, D = small_generator(), small_discriminator()
    outputs = []
    for network in (G, D):
        for name, module in network.named_modules():
            if name.endswith(("conv0", "conv1", "fromrgb", "torgb")):
                module.register_forward_hook(lambda module, inputs, output: outputs.append((inputs[0], output)))
    D(G(torch.randn(2, 8)))
    assert len(outputs) == 5 + 1 + 4 + 1
    assert all(x.is_contiguous(memory_format=torch.channels_last) for pair in outputs for x in pair)


@pytest.mark.parametrize("half_dtype", [None, torch.bfloat16, "float16"])
def test_the_config_rebuilds_the_network(half_dtype: str | torch.dtype | None) -> None:
    G = small_generator(half_levels=1, half_dtype=half_dtype, c_dim=2, conv_clamp=256)
    D = small_discriminator(half_levels=1, half_dtype=half_dtype, c_dim=2, mbstd_group_size=2)
    for network in (G, D, small_discriminator(grows=False)):
        again = type(network)(**json.loads(json.dumps(network.config)))
        again.load_state_dict(network.state_dict())
        assert again.config == network.config


def test_a_discriminator_that_does_not_grow_takes_one_size() -> None:
    D = small_discriminator(grows=False)
    assert [name for name, _ in D.named_modules() if name.endswith("fromrgb")] == ["b16.fromrgb"]
    assert D(torch.randn(4, 3, 16, 16)).shape == (4, 1)
    for network, res in ((D, 8), (small_discriminator(), 32), (small_discriminator(), 2)):
        with pytest.raises(ValueError, match="expected \\[N, C, 16, 16\\]"):
            network(torch.zeros(4, 3, res, res))


def test_wrong_settings_are_named() -> None:
    for build in (Generator, Discriminator):
        with pytest.raises(UserError, match="power of two"):
            build(48)
        with pytest.raises(UserError, match="channel_base 8"):
            build(16, channel_base=8)


# --- growing ---


@pytest.mark.parametrize("res", [8, 16])
@pytest.mark.parametrize("half_levels", [0, 2])
def test_a_fade_begins_and_ends_to_the_bit(res: int, half_levels: int) -> None:
    half = {"half_levels": half_levels, "half_dtype": "bfloat16"}
    G, D = small_generator(**half), small_discriminator(**half)
    z, img = torch.randn(4, 8), torch.randn(4, 3, res, res)
    before, grown, halfway = (G(z, res=res, alpha=torch.tensor(alpha)) for alpha in (0.0, 1.0, 0.5))
    assert torch.equal(before, G(z, res=res // 2).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert torch.equal(grown, G(z, res=res))
    torch.testing.assert_close(halfway, (before + grown) / 2)
    reduced = img.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
    torch.testing.assert_close(D(img, alpha=torch.tensor(0.0)), D(reduced))


@pytest.mark.parametrize(("res", "fading"), STAGES)
def test_gradients_reach_exactly_what_a_stage_uses(res: int, fading: bool) -> None:
    G, D = small_generator(c_dim=2), small_discriminator(c_dim=2)
    c = torch.eye(2).repeat(2, 1)
    used = {network: network.used_at(res, fading) for network in (G, D)}
    D(G(torch.randn(4, 8), c, res, alpha_of(fading)), c, alpha_of(fading)).square().sum().backward()
    for network in (G, D):
        reached = {p for p in network.parameters() if p.grad is not None}
        assert reached == parameters_of(used[network])
        assert all(p.grad.isfinite().all() and p.grad.any() for p in reached)


@pytest.mark.parametrize(("res", "fading"), STAGES)
def test_a_stage_runs_no_level_that_it_does_not_use(res: int, fading: bool) -> None:
    G, D = small_generator(), small_discriminator()
    for network in (G, D):
        poison_all_but(network, network.used_at(res, fading))
    img = G(torch.randn(4, 8), res=res, alpha=alpha_of(fading))
    assert img.isfinite().all()
    assert D(img, alpha=alpha_of(fading)).isfinite().all()


# --- layers ---


def test_pixel_norm_is_that_of_the_paper() -> None:
    x = torch.randn(2, 5, 3, 4) * 7
    expected = x / (x.square().sum(dim=1, keepdim=True) / 5 + 1e-8).sqrt()
    torch.testing.assert_close(pixel_norm(x), expected)
    assert pixel_norm(torch.zeros(1, 4, 2, 2)).eq(0).all()
    y = small_generator().b4(torch.randn(4, 8))
    torch.testing.assert_close(y.square().mean(dim=1), torch.ones(4, 4, 4), rtol=1e-4, atol=1e-4)


def test_the_upsampling_convolution_is_nearest_neighbours_then_a_convolution() -> None:
    layer = UpsampleConv2d(5, 7)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    weight, bias = layer.weight / 45**0.5, layer.bias
    expected = F.leaky_relu(F.conv2d(enlarge(x), weight, bias, padding=1), 0.2) * 2**0.5
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_the_latent_counts_by_its_direction_alone() -> None:
    G, z = small_generator(), torch.randn(2, 8)
    torch.testing.assert_close(G(z), G(3 * z))


# --- precision ---


@pytest.mark.parametrize(("half_dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_is_close_to_float32(half_dtype: str, tolerance: float) -> None:
    half = {"half_levels": 4, "half_dtype": half_dtype, "conv_clamp": 256}
    img = torch.randn(4, 3, 16, 16)
    for full, halved, x in (
        (small_generator(), small_generator(**half), torch.randn(4, 8)),
        (small_discriminator(), small_discriminator(**half), img),
    ):
        halved.load_state_dict(full.state_dict())
        expected, found = full(x).detach(), halved(x)
        assert found.dtype == torch.float32
        assert 0 < float((found.detach() - expected).norm() / expected.norm()) < tolerance
        found.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in halved.parameters() if p.grad is not None)


# --- derivatives ---


def in_float64(network: torch.nn.Module) -> torch.nn.Module:
    for module in network.double().modules():
        if hasattr(module, "dtype"):
            module.dtype = torch.float64
    return network


def derivatives_hold(function, *inputs: torch.Tensor) -> bool:
    """Check first and second derivatives against differences."""
    first = torch.autograd.gradcheck(function, inputs, fast_mode=True)
    return first and torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_derivatives_of_the_generator_hold() -> None:
    G = in_float64(Generator(8, z_dim=3, channel_base=16, channel_max=2, img_channels=1))
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.3, dtype=torch.float64)
    assert derivatives_hold(lambda z: G(z, alpha=alpha), z)
