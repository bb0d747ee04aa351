"""Images by number: the same in any company, whatever the network."""

from __future__ import annotations

import pytest
import torch

from stylepipe.errors import UserError
from stylepipe.networks import progan, stylegan2
from stylepipe.recipes.generated import GeneratedImages
from stylepipe.training.draws import Draws

SIZES = {"z_dim": 16, "channel_base": 128, "channel_max": 16}
CPU = torch.device("cpu")


def no_labels(purpose: str, numbers) -> torch.Tensor:
    return torch.zeros(len(numbers), 0)


@pytest.fixture(params=["stylegan2", "progan"])
def make(request):
    torch.manual_seed(0)
    if request.param == "stylegan2":
        G = stylegan2.Generator(16, w_dim=16, mapping_layers=2, **SIZES)
        for name, parameter in G.named_parameters():
            if "noise" in name:
                parameter.data.fill_(0.3)  # at the start noise has no strength, and nothing would show
    else:
        G = progan.Generator(16, **SIZES)
    G.eval().requires_grad_(False)

    def generated(batch: int = 4, **options) -> GeneratedImages:
        return GeneratedImages(G, Draws(0, CPU), no_labels, resolution=16, batch=batch, **options)

    return generated


def test_an_image_depends_on_its_number_only(make):
    whole = make(batch=8).images(range(8))
    assert whole.shape == (8, 16, 16, 3)
    assert whole.dtype == torch.uint8
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 8
    for batch in (1, 3):
        part = make(batch=batch).images([5, 2])
        assert (part.int() - whole[[5, 2]].int()).abs().max() <= 1  # rounding to bytes of sums in another order


def test_noise_is_drawn_for_each_image():
    G = stylegan2.Generator(16, w_dim=16, mapping_layers=2, **SIZES).eval().requires_grad_(False)
    seen = []
    G.synthesis.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["noise"]), with_kwargs=True)
    GeneratedImages(G, Draws(0, CPU), no_labels, resolution=16, batch=4).images([0, 1])
    (noise,) = seen
    assert noise.shape == (2, G.synthesis.noise_size())
    assert not torch.equal(noise[0], noise[1])
    assert noise.std() == pytest.approx(1, abs=0.1)


def test_truncation_to_nothing_leaves_one_style():
    G = stylegan2.Generator(16, w_dim=16, mapping_layers=2, **SIZES).eval().requires_grad_(False)
    generated = GeneratedImages(G, Draws(0, CPU), no_labels, resolution=16, batch=4, truncation_psi=0.0)
    codes = generated._codes([0, 1])
    assert torch.equal(codes[0], codes[1])
    assert generated.facts() == {"truncation_psi": 0.0, "noise": "random"}


def test_paths_begin_at_the_image_and_end_near_it(make):
    generated = make()
    far, near = generated.paths([0, 1], 0.5), generated.paths([0, 1], 1e-3)
    assert far.shape == (2, 2, 3, 16, 16)
    assert torch.equal(far[:, 0], near[:, 0])
    step = (near[:, 1] - near[:, 0]).abs().mean()
    assert 0 < step < 0.02 * (far[:, 1] - far[:, 0]).abs().mean() + 1e-3


def test_a_walk_without_styles_keeps_to_the_sphere():
    G = progan.Generator(16, **SIZES).eval().requires_grad_(False)
    generated = GeneratedImages(G, Draws(0, CPU), no_labels, resolution=16, batch=4)
    here, there = torch.randn(5, 16), torch.randn(5, 16)
    for share in (0.0, 0.3, 1.0):
        between = generated._between(here, there, share)
        expected = here.norm(dim=1).lerp(there.norm(dim=1), share)
        torch.testing.assert_close(between.norm(dim=1), expected)
    torch.testing.assert_close(generated._between(here, there, 0.0), here)
    torch.testing.assert_close(generated._between(here, there, 1.0), there)
    middle = generated._between(here, there, 0.5)
    cosines = [torch.cosine_similarity(middle, z) for z in (here, there)]
    torch.testing.assert_close(*cosines)


def test_walks_are_closed_and_move_a_little_at_a_time(make):
    frames = list(make().walks(3, frames=12, stops=2))
    assert len(frames) == 12
    assert frames[0].shape == (3, 16, 16, 3)
    steps = [(a.float() - b.float()).abs().mean() for a, b in zip(frames, [*frames[1:], frames[0]], strict=True)]
    across = (frames[0].float() - frames[6].float()).abs().mean()
    assert 0 < max(steps) < across


def test_paths_of_a_half_precision_network_are_those_of_float32():
    torch.manual_seed(0)
    G = stylegan2.Generator(16, w_dim=16, mapping_layers=2, half_levels=2, half_dtype="bfloat16", **SIZES)
    exact = stylegan2.Generator(16, w_dim=16, mapping_layers=2, **SIZES)
    exact.load_state_dict(G.state_dict())
    found = []
    for network in (G, exact):
        network.eval().requires_grad_(False)
        ends = GeneratedImages(network, Draws(0, CPU), no_labels, resolution=16, batch=4).paths(range(4), 1e-4)
        found.append((ends[:, 1] - ends[:, 0]).square().mean())
    torch.testing.assert_close(*found)
    assert not torch.equal(
        *(
            GeneratedImages(g, Draws(0, CPU), no_labels, resolution=16, batch=4)._made(
                g, g.mapping(torch.ones(1, 16)), [0]
            )
            for g in (G, exact)
        )
    ), "the networks themselves differ"


def test_paths_have_facts_of_their_own(make):
    generated = make()
    assert generated.facts(paths=True)["space"] == ("w" if generated.styled else "z")
    assert generated.facts().get("noise") == ("random" if generated.styled else None)
    assert generated.facts(paths=True).get("noise") == ("const" if generated.styled else None)


def test_images_that_are_none_are_refused():
    G = progan.Generator(16, **SIZES).eval().requires_grad_(False)
    next(G.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="images that are inf or NaN"):
        GeneratedImages(G, Draws(0, CPU), no_labels, resolution=16, batch=4, checked=True).images([0])
