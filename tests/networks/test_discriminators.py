"""What all discriminators promise: those that grow, at every stage, and those of one resolution."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from stylepipe.networks import dcgan, progan, r3gan, stylegan, stylegan2
from stylepipe.networks.discriminator import JudgingNetwork, PyramidDiscriminator

SMALL = {"channel_base": 128, "channel_max": 16}
STAGES = [(4, False), (8, True), (8, False), (16, True), (16, False)]

GROWING: dict[str, Callable[..., PyramidDiscriminator]] = {
    "progan": progan.Discriminator,
    "stylegan": stylegan.Discriminator,
    **{
        f"stylegan2 {architecture}": lambda res, architecture=architecture, **options: stylegan2.Discriminator(
            res, architecture=architecture, grows=True, **options
        )
        for architecture in stylegan2.ARCHITECTURES
    },
}
PLAIN = {"dcgan": dcgan, "r3gan": r3gan}


def make(name: str, res: int = 16, **options: object) -> PyramidDiscriminator:
    return GROWING[name](res, **(SMALL | options))


def alpha_of(fading: bool) -> torch.Tensor | None:
    return torch.tensor(0.5) if fading else None


def parameters_of(D: JudgingNetwork, res: int, fading: bool) -> set[torch.nn.Parameter]:
    return {p for module in D.used_at(res, fading) for p in module.parameters()}


def in_float64(network: torch.nn.Module) -> torch.nn.Module:
    for module in network.double().modules():
        if hasattr(module, "dtype"):
            module.dtype = torch.float64
    return network


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("res", [8, 16])
@pytest.mark.parametrize("half_levels", [0, 2])
def test_a_fade_begins_and_ends_to_the_bit(name: str, res: int, half_levels: int) -> None:
    D = make(name, half_levels=half_levels, half_dtype="bfloat16")
    img = torch.randn(4, 3, res, res)
    logits = D(img)
    assert torch.equal(D(img, alpha=torch.tensor(0.0)), D(D.downsample(img)))
    assert torch.equal(D(img, alpha=torch.tensor(1.0)), logits)
    assert not torch.allclose(D(img, alpha=torch.tensor(0.5)), logits)


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize(("res", "fading"), STAGES)
def test_r1_moves_exactly_the_weights_that_a_stage_uses(name: str, res: int, fading: bool) -> None:
    D = make(name, c_dim=2)
    img = torch.randn(4, 3, res, res, requires_grad=True)
    (grad,) = torch.autograd.grad(D(img, torch.eye(2).repeat(2, 1), alpha_of(fading)).sum(), img, create_graph=True)
    grad.square().sum().backward()
    used = parameters_of(D, res, fading)
    assert all(p.grad is not None and p.grad.any() for p in used if p.ndim > 1)
    assert all(p.grad is None for p in set(D.parameters()) - used)


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize(("res", "fading"), STAGES)
def test_a_stage_runs_no_level_that_it_does_not_use(name: str, res: int, fading: bool) -> None:
    D = make(name)
    with torch.no_grad():
        for p in set(D.parameters()) - parameters_of(D, res, fading):
            p.fill_(torch.nan)
    assert D(torch.randn(4, 3, res, res), alpha=alpha_of(fading)).isfinite().all()


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_derivatives_hold(name: str, alpha: float | None) -> None:
    D = in_float64(make(name, 8, channel_base=16, channel_max=2, img_channels=1))
    fade = None if alpha is None else torch.tensor(alpha, dtype=torch.float64)
    img = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: D(x, alpha=fade), img, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: D(x, alpha=fade), img, fast_mode=True)


@pytest.mark.parametrize("name", GROWING)
def test_images_of_other_sizes_are_refused(name: str) -> None:
    D = make(name)
    for res in (2, 32):
        with pytest.raises(ValueError, match="expected \\[N, C, 16, 16\\] or a smaller power of two"):
            D(torch.zeros(4, 3, res, res))


@pytest.mark.parametrize("name", GROWING)
def test_the_config_rebuilds_a_growing_discriminator(name: str) -> None:
    D = make(name, c_dim=2, mbstd_group_size=2, spectral_norm=True, half_levels=1, half_dtype=torch.bfloat16)
    again = type(D)(**json.loads(json.dumps(D.config)))
    again.load_state_dict(D.state_dict())
    img, c = torch.randn(2, 3, 8, 8), torch.eye(2)
    assert torch.equal(again(img, c), D(img, c))
    assert again.config == D.config


@pytest.mark.parametrize("name", PLAIN)
def test_networks_of_one_resolution_do_not_grow(name: str) -> None:
    G, D = (network(16, **SMALL) for network in (PLAIN[name].Generator, PLAIN[name].Discriminator))
    z = torch.randn(2, G.z_dim)
    img = G(z, res=16)
    for call in (
        lambda: G(z, res=8),
        lambda: G(z, alpha=torch.ones(())),
        lambda: D(img, alpha=torch.ones(())),
        lambda: D(img[:, :, ::2, ::2]),
    ):
        with pytest.raises(ValueError, match=r"does not grow|expected \[N, C, 16, 16\]"):
            call()
    assert G.resolutions == D.resolutions == [16]
    assert G.used_at(16, False) == [G]
    assert D.used_at(16, False) == [D]


@pytest.mark.parametrize("name", [*PLAIN, "progan", "stylegan"])
def test_labels_change_images_and_logits(name: str) -> None:
    module = {**PLAIN, "progan": progan, "stylegan": stylegan}[name]
    G, D = module.Generator(8, c_dim=3, **SMALL), module.Discriminator(8, c_dim=3, **SMALL)
    z, c = torch.randn(1, G.z_dim).expand(3, -1), torch.eye(3)
    img = G(z, c)
    assert not torch.allclose(img[0], img[1])
    logits = D(img[:1].expand(3, -1, -1, -1), c)
    assert not torch.allclose(logits[0], logits[1])
    for call in (lambda: G(z), lambda: D(img)):
        with pytest.raises(ValueError, match="3 labels"):
            call()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_networks_run_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        G = PLAIN[name].Generator(1024)
        img = G(torch.empty(2, G.z_dim))
        logits = PLAIN[name].Discriminator(1024)(img)
    assert img.shape == (2, 3, 1024, 1024)
    assert logits.shape == (2, 1)
