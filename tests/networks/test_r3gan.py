"""R3GAN: sizes, initialisation, derivatives, precision."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from stylepipe.errors import UserError
from stylepipe.networks.levels import Levels
from stylepipe.networks.plain import Conv2d
from stylepipe.networks.r3gan import (
    CHANNEL_BASE,
    CHANNEL_MAX,
    Discriminator,
    Generator,
    ResidualBlock,
    cardinality,
)

SMALL = {"channel_base": 256, "channel_max": 32}


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def awaken_(module: torch.nn.Module) -> None:
    """Give the zero-initialised convolutions weights: as identities, blocks would hide their insides."""
    for block in module.modules():
        if isinstance(block, ResidualBlock):
            torch.nn.init.normal_(block.conv2.weight, std=0.2)


# --- construction ---


def test_widths_and_groups_at_256_px_are_the_published() -> None:
    channels = Levels(256, CHANNEL_BASE, CHANNEL_MAX, 0, None).channels
    assert list(channels.values()) == [768, 768, 768, 768, 384, 192, 96]
    assert [cardinality(c) for c in channels.values()] == [96, 96, 96, 96, 48, 24, 12]


def test_the_model_of_256_px_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert trainable(Generator(256)) == 23_057_952  # 23.058M
        assert trainable(Discriminator(256)) == 23_009_568  # 23.010M


@pytest.mark.parametrize("width", range(1, 70))
def test_any_width_has_groups_that_divide_it(width: int) -> None:
    groups = cardinality(width)
    assert groups >= 1
    assert 2 * width % groups == 0


@pytest.mark.parametrize(("res", "base"), [(4, 256), (16, 256), (32, 96)])
@pytest.mark.parametrize("c_dim", [0, 3])
def test_images_and_logits_have_their_shapes_and_train_all_parameters(res: int, base: int, c_dim: int) -> None:
    options = {"channel_base": base, "channel_max": 20, "c_dim": c_dim, "img_channels": 1}
    G, D = Generator(res, **options), Discriminator(res, **options)
    awaken_(G), awaken_(D)
    c = torch.eye(3)[[0, 1, 2, 0]] if c_dim else None
    img = G(torch.randn(4, 64), c)
    assert img.shape == (4, 1, res, res)
    assert img.dtype == torch.float32
    assert img.is_contiguous(memory_format=torch.channels_last)
    judgement = D.judge(img, c)
    assert judgement.logits.shape == (4, 1)
    assert judgement.features.shape == (4, 20)
    assert judgement.class_logits is None
    F.softplus(-judgement.logits).mean().backward()
    for network in (G, D):
        assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_options_of_the_head() -> None:
    options = {"c_dim": 3, "conditioning": "both", "mbdisc_kernels": 5, "mbstd_channels": 1, "mbstd_group_size": 2}
    D = Discriminator(8, last_layer="normalized", **options, **SMALL)
    img, c = torch.randn(4, 3, 8, 8), torch.eye(3)[[0, 1, 2, 0]]
    logits, features, class_logits, direction = D.judge(img, c)
    assert [t.shape for t in (logits, features, class_logits)] == [(4, 1), (4, 33), (4, 3)]
    assert torch.equal(logits, direction)
    D.zero_grad()
    logits.sum().backward(retain_graph=True)
    assert D.head.embed.weight.grad is None  # the logits train the features, `direction` the last layer
    assert D.pool.grad.any()
    D.zero_grad()
    direction.sum().backward()
    assert D.head.embed.weight.grad.any()
    assert D.pool.grad is None


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_a_network_can_be_built_again_from_its_config(network: type) -> None:
    options = {"c_dim": 3, "half_levels": 1, "half_dtype": torch.bfloat16, "conv_clamp": 256.0}
    if network is Discriminator:
        options |= {"conditioning": "aux", "mbdisc_kernels": 2, "last_layer": "normalized", "mbstd_channels": 2}
    net = network(16, **options, **SMALL)
    again = network(**json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    x, c = torch.randn(4, 64) if network is Generator else torch.randn(4, 3, 16, 16), torch.eye(3)[[0, 1, 2, 0]]
    assert torch.equal(again(x, c), net(x, c))
    assert again.config == net.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"res": 48}, "power of two"),
        ({"channel_base": 8}, "channel_base"),
        ({"half_dtype": "float64"}, "half_dtype"),
        ({"conditioning": "acgan"}, "conditioning"),
        ({"conditioning": "aux"}, "expected a network with labels"),
        ({"last_layer": "bilinear"}, "last_layer"),
        ({"mbstd_channels": 5}, "mbstd_channels"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Discriminator(**({"res": 16} | SMALL | options))


# --- initialisation ---


def test_a_residual_block_starts_as_the_identity() -> None:
    x = torch.randn(2, 16, 4, 4)
    block = ResidualBlock(16, 14, None)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.conv2.weight.grad.any()  # and leaves it at the first step


def test_inner_convolutions_are_scaled_down_with_the_number_of_blocks() -> None:
    gain = math.sqrt(2 / 1.04) / 14**0.25  # He et al. for a slope of 0.2; fix-up of 3 layers in 14 blocks
    block = Generator(256, channel_max=256).b64.blocks[0]
    assert float(block.conv0.weight.detach().std()) == pytest.approx(gain / math.sqrt(256), rel=0.02)
    assert float(block.conv1.weight.detach().std()) == pytest.approx(gain / math.sqrt(16 * 9), rel=0.02)
    assert not block.conv0.bias.any()


def test_images_and_logits_start_at_a_sensible_size() -> None:
    G, D = Generator(32, channel_base=1024, channel_max=64), Discriminator(32, channel_base=1024, channel_max=64)
    with torch.no_grad():
        img = G(torch.randn(16, 64))
        logits = D(torch.randn(16, 3, 32, 32).clamp(-1, 1))
    assert 0.1 < float(img.std()) < 3
    assert 0.01 < float(logits.std()) < 3


# --- what it computes ---


def test_a_generator_starts_as_its_scaled_basis_enlarged() -> None:
    """With widths all the same and blocks that are identities, only resampling remains between basis and image."""
    G = Generator(16, z_dim=4, channel_base=1024, channel_max=8)
    z = torch.randn(2, 4)
    x = G.basis * (z @ G.fc.weight.t())[:, :, None, None]
    for _ in range(2):  # bilinear: a sample, then the mean of it and its neighbour; zeros beyond the border
        for dim in (2, 3):
            before = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
            x = torch.stack([(x + before) / 2, x], dim + 1).flatten(dim, dim + 1)
    torch.testing.assert_close(G(z), F.conv2d(x, G.torgb.weight), rtol=1e-5, atol=1e-5)


def test_the_grouped_convolution_is_torchs_with_all_derivatives() -> None:
    conv = Conv2d(4, 4, 3, padding=1, groups=2, std=1).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, padding=1, groups=2))

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(conv, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, conv.weight))
    assert torch.autograd.gradgradcheck(run, (x, conv.weight))


def test_the_second_derivative_runs_no_convolution_per_group() -> None:
    conv = Conv2d(64, 64, 3, padding=1, groups=32, std=1)
    x = torch.randn(2, 64, 4, 4, requires_grad=True)
    with profile() as trace:
        (dx,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    assert sum(event.count for event in trace.key_averages() if event.key == "aten::convolution") < 8


def test_r1_has_exact_gradients() -> None:
    D = Discriminator(8, channel_base=24, channel_max=4, c_dim=2).double()
    awaken_(D)
    img = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    c = torch.eye(2, dtype=torch.float64)

    def penalty(*parameters: torch.Tensor) -> torch.Tensor:
        named = dict(zip(dict(D.named_parameters()), parameters, strict=True))
        logits = torch.func.functional_call(D, named, (img, c))
        return torch.autograd.grad(logits.sum(), img, create_graph=True)[0].square().sum()

    assert torch.autograd.gradcheck(lambda img: D(img, c), (img,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda img: D(img, c), (img,), fast_mode=True)
    assert torch.autograd.gradcheck(penalty, tuple(D.parameters()), fast_mode=True)


def test_bfloat16_levels_are_near_float32() -> None:
    G32, D32 = Generator(32, **SMALL), Discriminator(32, **SMALL)
    G16, D16 = (type(net)(**net.config | {"half_levels": 3, "half_dtype": "bfloat16"}) for net in (G32, D32))
    for half, full in ((G16, G32), (D16, D32)):
        awaken_(full)
        half.load_state_dict(full.state_dict())
    assert [getattr(G16, f"b{r}").dtype for r in (4, 8, 32)] == [torch.float32, torch.bfloat16, torch.bfloat16]
    z = torch.randn(4, 64)
    with torch.no_grad():
        img, half_img = G32(z), G16(z)
        logits, half_logits = D32(img), D16(img)
    assert half_img.dtype == half_logits.dtype == torch.float32
    # bfloat16 rounds to 2^-9, a dozen times in a row.
    assert float((half_img - img).norm() / img.norm()) < 0.03
    assert float((half_logits - logits).norm() / logits.norm()) < 0.05


def test_conv_clamp_limits_activations() -> None:
    block = ResidualBlock(8, 1, 0.5)
    seen = []
    block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().max()))
    block(torch.randn(2, 8, 4, 4) * 100)
    assert seen[0] == 0.5
