"""DCGAN: sizes, initialisation, normalisation, derivatives, precision."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from stylepipe.errors import UserError
from stylepipe.networks.dcgan import D_NORMS, G_NORMS, Discriminator, Generator
from stylepipe.networks.norms import VirtualBatchNorm2d, batch_norms

SMALL = {"channel_base": 128, "channel_max": 16}


def small_generator(res: int = 16, **options) -> Generator:
    return Generator(res, **(SMALL | {"z_dim": 8, "reference_size": 5} | options))


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- construction ---


def test_widths_at_64_px_are_the_papers() -> None:
    with torch.device("meta"):
        G, D = Generator(64), Discriminator(64)
    assert [getattr(G, f"b{r}").conv.out_channels for r in (4, 8, 16, 32, 64)] == [1024, 512, 256, 128, 3]
    assert [getattr(D, f"b{r}").conv.out_channels for r in (64, 32, 16, 8)] == [128, 256, 512, 1024]
    widths = [100, 1024, 512, 256, 128, 3]
    convolutions = sum(16 * a * b for a, b in pairwise(widths))
    normed = 1024 + 512 + 256 + 128
    assert trainable(G) == convolutions + 2 * normed + 3 == 12_658_435
    widths = [3, 128, 256, 512, 1024, 1]
    convolutions = sum(16 * a * b for a, b in pairwise(widths))
    assert trainable(D) == convolutions + 2 * (256 + 512 + 1024) + 128 == 11_036_288


@pytest.mark.parametrize("res", [8, 16, 64])
@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("norm", G_NORMS)
def test_images_and_logits_have_their_shapes_and_train_all_parameters(norm: str, res: int, c_dim: int) -> None:
    G = small_generator(res, norm=norm, c_dim=c_dim, img_channels=1)
    d_norm = norm if norm in D_NORMS else "none"
    D = Discriminator(res, norm=d_norm, c_dim=c_dim, img_channels=1, **SMALL)
    c = torch.eye(3)[[0, 1, 2, 0]] if c_dim else None
    img = G(torch.randn(4, 8), c)
    assert img.shape == (4, 1, res, res)
    assert img.dtype == torch.float32
    assert img.is_contiguous(memory_format=torch.channels_last)
    assert bool((img.abs() <= 1).all())
    judgement = D.judge(img, c)
    assert judgement.logits.shape == (4, 1)
    assert judgement.features.shape == (4, 16 * 16)
    F.softplus(-judgement.logits).mean().backward()
    for network in (G, D):
        assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def test_logits_are_the_last_4x4_convolution_of_the_features() -> None:
    D = Discriminator(8, **SMALL)
    img = torch.randn(4, 3, 8, 8)
    logits, features, _, _ = D.judge(img)
    last = F.conv2d(features.unflatten(1, (16, 4, 4)), D.b4.out.weight.view(1, 16, 4, 4))
    torch.testing.assert_close(logits, last.flatten(1))


def test_weights_start_with_a_deviation_of_002() -> None:
    G, D = Generator(16, channel_base=512), Discriminator(16, channel_base=512)
    for weight in (G.b4.conv.weight, G.b8.conv.weight, D.b16.conv.weight, D.b8.conv.weight, D.b4.out.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
        assert float(weight.detach().mean()) == pytest.approx(0, abs=0.002)
    assert all(bool((norm.weight == 1).all()) for norm in batch_norms(G) + batch_norms(D))


def test_all_layers_but_gs_last_and_ds_first_are_normalised() -> None:
    assert len(batch_norms(small_generator(64))) == 4
    assert len(batch_norms(Discriminator(64, **SMALL))) == 3
    assert not batch_norms(Discriminator(64, norm="none", **SMALL))
    virtual = small_generator(64, norm="virtual")
    assert sum(isinstance(m, VirtualBatchNorm2d) for m in virtual.modules()) == 4


def test_options_of_the_head() -> None:
    options = {"c_dim": 3, "conditioning": "aux", "mbdisc_kernels": 5, "mbstd_channels": 1, "mbstd_group_size": 2}
    D = Discriminator(8, last_layer="normalized", **options, **SMALL)
    img, c = torch.randn(4, 3, 8, 8), torch.eye(3)[[0, 1, 2, 0]]
    logits, features, class_logits, direction = D.judge(img, c)
    assert [t.shape for t in (logits, features, class_logits)] == [(4, 1), (4, 17 * 16), (4, 3)]
    assert torch.equal(logits, direction)
    assert torch.equal(D(img, c.roll(1, 0)), logits)  # aux: logits do not see labels
    logits.sum().backward(retain_graph=True)
    assert D.b4.direction.grad is None
    direction.sum().backward()
    assert D.b4.direction.grad.any()
    # A step along the direction itself changes nothing: its length is not seen.
    assert float((D.b4.direction.grad * D.b4.direction.detach()).sum()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_a_network_can_be_built_again_from_its_config(network: type) -> None:
    options = {"c_dim": 3, "half_levels": 1, "half_dtype": torch.bfloat16}
    if network is Discriminator:
        options |= {"conditioning": "both", "mbdisc_kernels": 2, "last_layer": "normalized", "mbstd_channels": 2}
    else:
        options |= {"norm": "virtual", "reference_size": 5}  # whose reference comes with the state
    net = network(16, **options, **SMALL)
    again = network(**json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    x, c = torch.randn(4, 100) if network is Generator else torch.randn(4, 3, 16, 16), torch.eye(3)[[0, 1, 2, 0]]
    assert torch.equal(again(x, c), net(x, c))
    assert again.config == net.config


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (Generator, {"res": 4}, "from 8 up"),
        (Generator, {"res": 48}, "power of two"),
        (Generator, {"channel_base": 8}, "channel_base"),
        (Generator, {"norm": "instance"}, "batch, virtual, none"),
        (Discriminator, {"norm": "virtual"}, "batch, none"),
        (Discriminator, {"conditioning": "aux"}, "expected a network with labels"),
        (Discriminator, {"last_layer": "bilinear"}, "last_layer"),
        (Discriminator, {"mbstd_channels": 5}, "mbstd_channels"),
    ],
)
def test_wrong_settings_are_named(network: type, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        network(**({"res": 16} | SMALL | options))


# --- normalisation ---


def test_batch_statistics_are_noted_and_used_once_followed() -> None:
    G, z = small_generator(), torch.randn(16, 8)
    before = copy.deepcopy(G.state_dict())
    trained = G(z)
    assert all(torch.equal(value, before[name]) for name, value in G.state_dict().items())
    assert not torch.allclose(G.eval()(z), trained, atol=1e-2)
    G.train()(z)
    for norm in batch_norms(G):
        norm.follow_(norm.noted, 1)
    # The same batch, but by variances of n - 1: at 4 px n is 256.
    torch.testing.assert_close(G.eval()(z), trained, rtol=0, atol=0.01)


def test_with_virtual_batch_norm_no_image_depends_on_the_others() -> None:
    G, z = small_generator(norm="virtual", c_dim=3), torch.randn(3, 8)
    c = torch.eye(3)
    together = G(z, c)
    alone = torch.cat([G(z[i : i + 1], c[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)  # batches of other sizes may add up differently
    assert torch.equal(G.eval()(z, c), together)
    assert G.reference_z.shape == (5, 8)
    assert G.reference_c.sum(dim=1).eq(1).all()


# --- derivatives and precision ---


@pytest.mark.parametrize("norm", D_NORMS)
def test_r1_has_exact_gradients(norm: str) -> None:
    D = Discriminator(8, channel_base=32, channel_max=4, norm=norm, c_dim=2).double()
    for p in D.parameters():
        torch.nn.init.normal_(p, std=0.3)  # 0.02 would leave derivatives below the check's tolerance
    img = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    c = torch.eye(2, dtype=torch.float64)

    def penalty(*parameters: torch.Tensor) -> torch.Tensor:
        named = dict(zip(dict(D.named_parameters()), parameters, strict=True))
        logits = torch.func.functional_call(D, named, (img, c))
        return torch.autograd.grad(logits.sum(), img, create_graph=True)[0].square().sum()

    assert torch.autograd.gradcheck(lambda img: D(img, c), (img,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda img: D(img, c), (img,), fast_mode=True)
    assert torch.autograd.gradcheck(penalty, tuple(D.parameters()), fast_mode=True)


@pytest.mark.parametrize("norm", G_NORMS)
def test_bfloat16_levels_are_near_float32(norm: str) -> None:
    G32 = small_generator(32, norm=norm)
    D32 = Discriminator(32, norm=norm if norm in D_NORMS else "none", **SMALL)
    for network in (G32, D32):
        for name, p in network.named_parameters():
            if "conv.weight" in name:
                torch.nn.init.normal_(p, std=0.15)
    G16, D16 = (type(net)(**net.config | {"half_levels": 2, "half_dtype": "bfloat16"}) for net in (G32, D32))
    G16.load_state_dict(G32.state_dict()), D16.load_state_dict(D32.state_dict())
    z = torch.randn(4, 8)
    with torch.no_grad():
        img, half_img = G32(z), G16(z)
        logits, half_logits = D32(img), D16(img)
    assert half_img.dtype == half_logits.dtype == torch.float32
    # bfloat16 rounds to 2^-9, a few times in a row.
    assert float((half_img - img).norm() / img.norm()) < 0.03
    assert float((half_logits - logits).norm() / logits.norm()) < 0.05
