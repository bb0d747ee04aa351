"""Weights taken over by a network of another resolution or with other labels: at first it does what the source did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.interop.transfer import check_resolution, fill_discriminator, fill_generator
from stylepipe.kernels import downsample2d, upsample2d
from stylepipe.networks.layers import resample_filter
from stylepipe.networks.stylegan2 import Discriminator, Generator

CHANNELS = {"channel_base": 512, "channel_max": 16}


def generator(res: int = 16, c_dim: int = 0, **options: Any) -> Generator:
    """Make a generator as one might come out of training: no bias or strength is 0 any more."""
    return _shaken(Generator(res, z_dim=12, w_dim=8, mapping_layers=2, c_dim=c_dim, **CHANNELS, **options))


def discriminator(res: int = 16, c_dim: int = 0, **options: Any) -> Discriminator:
    return _shaken(Discriminator(res, c_dim=c_dim, **CHANNELS, **options))


def _shaken(network: Any) -> Any:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
        for name, buffer in network.named_buffers():
            if "w_avg" in name:
                buffer.normal_()
    return network.eval().requires_grad_(False)


def images(res: int, count: int = 4) -> Tensor:
    """Make images that differ in large and in small, some of their pixels beyond [-1, 1] as generated ones have."""
    return torch.randn(count, 3, 1, 1) + torch.randn(count, 3, res, res) / 2


def test_the_same_network_is_taken_over_to_the_bit() -> None:
    for make, fill in ((generator, fill_generator), (discriminator, fill_discriminator)):
        for options in ({"architecture": "skip"}, {"architecture": "resnet"}, {"architecture": "orig"}, {"c_dim": 3}):
            source, target = make(**options), make(**options)
            fill(target, source, True)
            for name, tensor in source.state_dict().items():
                assert torch.equal(target.state_dict()[name], tensor), name


@pytest.mark.parametrize("res", [32, 64])
def test_a_grown_generator_makes_the_old_image_upsampled(res: int) -> None:
    source, target, z = generator(), generator(res), torch.randn(4, 12)
    fill_generator(target, source, True)
    img = source(z)
    while img.shape[2] < res:
        img = upsample2d(img, resample_filter())
    assert torch.equal(target(z), img)
    assert torch.equal(target.mapping.w_avg, source.mapping.w_avg)


def test_a_grown_generator_learns_at_its_new_level() -> None:
    source, target = generator(), generator(32).requires_grad_()
    fill_generator(target, source, True)
    target(torch.randn(2, 12)).square().mean().backward()
    assert target.synthesis.b32.torgb.weight.grad.abs().sum() > 0


def test_a_smaller_generator_makes_the_image_of_that_level() -> None:
    source, target, z = generator(32), generator(16), torch.randn(4, 12)
    fill_generator(target, source, True)
    ws = source.mapping(z)
    img: Tensor | None = None
    source.synthesis.b32.register_forward_hook(lambda _, inputs, __: note(inputs[1]))

    def note(of_level_below: Tensor) -> None:
        nonlocal img
        img = of_level_below

    source.synthesis(ws, noise_mode="const")
    assert img is not None
    torch.testing.assert_close(target(z), img, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["resnet", "orig"])
@pytest.mark.parametrize("res", [8, 32])
def test_a_generator_with_one_image_only_keeps_its_levels(architecture: str, res: int) -> None:
    with pytest.raises(UserError, match=f"--res {res}: .* 16 px and architecture {architecture}.*keep 16 px"):
        check_resolution(generator(architecture=architecture).config, None, res)


@pytest.mark.parametrize("architecture", ["resnet", "skip", "orig"])
@pytest.mark.parametrize("res", [32, 64])
def test_a_grown_discriminator_judges_the_image_downsampled(architecture: str, res: int) -> None:
    source, target = discriminator(architecture=architecture), discriminator(res, architecture=architecture)
    fill_discriminator(target, source, True)
    img = images(res)
    small = img
    while small.shape[2] > 16:
        small = downsample2d(small, resample_filter())
    logits = source(small)
    assert logits.std() > 0.1
    torch.testing.assert_close(target(img), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["resnet", "skip", "orig"])
def test_a_grown_discriminator_learns_at_its_new_level(architecture: str) -> None:
    source, target = discriminator(architecture=architecture), discriminator(32, architecture=architecture)
    fill_discriminator(target.requires_grad_(), source, True)
    target(images(32)).sum().backward()
    assert target.b32.conv1.weight.grad[:, 6:].abs().sum() > 0, "from the feature maps that hand nothing on"


@pytest.mark.parametrize("architecture", ["resnet", "skip", "orig"])
def test_a_smaller_discriminator_keeps_the_levels_it_has(architecture: str) -> None:
    source, target = discriminator(32, architecture=architecture), discriminator(16, architecture=architecture)
    fill_discriminator(target, source, True)
    theirs, own = source.state_dict(), target.state_dict()
    other = [name for name in own if name not in theirs or not torch.equal(own[name], theirs[name])]
    assert other == ([] if architecture == "skip" else ["b16.fromrgb.weight", "b16.fromrgb.bias"])


def test_a_new_level_of_too_few_feature_maps_is_refused() -> None:
    G, D = generator(), discriminator()  # channel_base 512
    check_resolution(G.config, D.config, 64)
    with pytest.raises(UserError, match=r"--res 128: .* 4 feature maps there, and needs 6 .*channel_base 512"):
        check_resolution(G.config, D.config, 128)
    check_resolution(G.config, discriminator(architecture="skip").config, 128)
    check_resolution(G.config, None, 128)


def test_new_labels_start_as_the_network_without() -> None:
    source, target, z = generator(), generator(c_dim=3, class_w_avg=True), torch.randn(3, 12)
    fill_generator(target, source, False)
    torch.testing.assert_close(target(z, torch.eye(3)), source(z), rtol=1e-4, atol=1e-4)
    assert torch.equal(target.mapping.w_avg, source.mapping.w_avg)
    centers = target.mapping(z, torch.eye(3), truncation_psi=0)
    assert torch.equal(centers, source.mapping.w_avg.expand_as(centers))


@pytest.mark.parametrize("same_labels", [True, False])
def test_mean_styles_of_the_same_classes_are_kept(same_labels: bool) -> None:
    source, target, z = generator(c_dim=3, class_w_avg=True), generator(c_dim=3, class_w_avg=True), torch.randn(3, 12)
    source.mapping.class_w_offset.normal_()
    fill_generator(target, source, same_labels)
    found, theirs = (G.mapping(z, torch.eye(3), truncation_psi=0) for G in (target, source))
    assert torch.equal(found, theirs if same_labels else source.mapping.w_avg.expand_as(found))


@pytest.mark.parametrize("c_dim", [0, 2, 3])
def test_other_labels_start_as_the_mean_embedding_of_the_old(c_dim: int) -> None:
    source, target, z = generator(c_dim=3), generator(c_dim=c_dim), torch.randn(2, 12)
    fill_generator(target, source, False)
    # The reference: the first layer's outputs before its activation, averaged over the labels.
    before = [preactivation(source, z, label.expand(2, -1)) for label in torch.eye(3)]
    for label in torch.eye(c_dim) if c_dim else [torch.zeros(0)]:
        found = preactivation(target, z, label.expand(2, -1))
        torch.testing.assert_close(found, sum(before) / 3, rtol=1e-5, atol=1e-5)


def preactivation(G: Generator, z: Tensor, c: Tensor) -> Tensor:
    noted = []
    hook = G.mapping.fc0.register_forward_pre_hook(lambda _, inputs: noted.append(inputs[0]))
    G.mapping(z, c)
    hook.remove()
    weight, bias = G.mapping.fc0.applied()
    return noted[0] @ weight.t() + bias


def test_new_labels_are_learnt() -> None:
    source, target = generator(), generator(c_dim=3).requires_grad_()
    fill_generator(target, source, False)
    target(torch.randn(3, 12), torch.eye(3)).square().mean().backward()
    assert target.mapping.fc0.weight.grad[:, 12:].abs().sum() > 0


@pytest.mark.parametrize("conditioning", ["projection", "aux", "both"])
def test_logits_of_new_labels_start_as_those_without(conditioning: str) -> None:
    source, target = discriminator(), discriminator(c_dim=3, conditioning=conditioning)
    fill_discriminator(target, source, False)
    img = images(16)
    for label in torch.eye(3):
        torch.testing.assert_close(target(img, label.expand(4, -1)), source(img), rtol=1e-4, atol=1e-4)


def test_the_rows_that_labels_project_are_not_alike() -> None:
    """Rows of the last layer that start equal have equal gradients, and would stay equal."""
    source, target = discriminator(), discriminator(c_dim=3).requires_grad_()
    fill_discriminator(target, source, False)
    assert torch.linalg.matrix_rank(target.b4.out.weight) == 16
    target(images(16, 3), torch.eye(3)).sum().backward()
    gradient = target.mapping.fc7.weight.grad
    assert torch.linalg.matrix_rank(gradient) == 3, "one direction for each label"


@pytest.mark.parametrize(("c_dim", "conditioning"), [(0, "projection"), (2, "projection"), (3, "aux"), (2, "both")])
def test_logits_of_other_labels_start_as_the_mean_over_the_old(c_dim: int, conditioning: str) -> None:
    source, target = discriminator(c_dim=3), discriminator(c_dim=c_dim, conditioning=conditioning)
    fill_discriminator(target, source, False)
    img = images(16)
    mean = sum(source(img, label.expand(4, -1)) for label in torch.eye(3)) / 3
    for label in torch.eye(c_dim) if c_dim else [torch.zeros(0)]:
        torch.testing.assert_close(target(img, label.expand(4, -1)), mean, rtol=1e-4, atol=1e-4)


def test_a_classifier_of_the_same_labels_is_kept() -> None:
    source, target = discriminator(c_dim=3, conditioning="both"), discriminator(c_dim=3, conditioning="aux")
    fill_discriminator(target, source, True)
    img = images(16)
    assert torch.equal(target.judge(img).class_logits, source.judge(img, torch.eye(3)[[0, 1, 2, 0]]).class_logits)


def test_everything_at_once() -> None:
    """Grown, with other labels, to a network of half precision."""
    half = {"half_levels": 2, "half_dtype": "bfloat16", "conv_clamp": 256}
    G, D = generator(), discriminator()
    new_G, new_D = generator(32, c_dim=2, **half), discriminator(32, c_dim=2, **half)
    fill_generator(new_G, G, False)
    fill_discriminator(new_D, D, False)
    z, c, img = torch.randn(2, 12), torch.eye(2), images(32, 2)
    upsampled = upsample2d(G(z), resample_filter())
    assert (new_G(z, c) - upsampled).abs().max() < 0.05 * upsampled.abs().max()
    torch.testing.assert_close(new_D(img, c), D(downsample2d(img, resample_filter())), rtol=0.1, atol=0.1)
