"""rosinality's checkpoints: the same images and logits as plain networks of that structure, and the way back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import SMALL, RosinalityDiscriminator, RosinalityGenerator, golden, rosinality_checkpoint
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.interop.checkpoints import import_checkpoint
from stylepipe.interop.nvidia import networks_from_state
from stylepipe.interop.rosinality import NUM_LATENTS, export_rosinality
from stylepipe.networks.stylegan2 import Discriminator, Generator

TOLERANCE = 1e-5  # float32 in another order, relative L2
OPTIONS = {"z_dim": 8, "w_dim": 8, "mapping_layers": 3, "channel_base": 64, "channel_max": 8}


def save(path: Path, content: Any, *, archive: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    return path


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype == torch.float32, key
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key].view(torch.int32), tensor.view(torch.int32)), key


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@torch.inference_mode()
def test_images_and_logits_are_those_of_its_own_networks(archive: bool, tmp_path: Path) -> None:
    with torch.inference_mode(mode=False):
        content = rosinality_checkpoint()
    imported = import_checkpoint(save(tmp_path / "a.pt", content, archive=archive))
    z, img = torch.randn(8, 8), torch.randn(8, 3, 16, 16)
    for name, network in {"g_ema": imported.G_ema, "g": imported.beside["G"]}.items():
        theirs = RosinalityGenerator(16, 8, 3, SMALL)
        theirs.load_state_dict(content[name])
        assert relative(network.mapping(z)[:, 0], theirs.w(z)) < TOLERANCE
        assert relative(network(z, noise_mode="const"), theirs(z)) < TOLERANCE
    D = RosinalityDiscriminator(16, SMALL)
    D.load_state_dict(content["d"])
    assert relative(imported.beside["D"](img), D(img)) < TOLERANCE
    assert torch.equal(imported.G_ema.mapping.w_avg, content["latent_avg"])
    assert imported.notes == []


@pytest.mark.parametrize("size", [4, 8, 16])
def test_there_and_back_again_to_the_bit(size: int, tmp_path: Path) -> None:
    theirs = save(tmp_path / "theirs.pt", rosinality_checkpoint(size))
    first = import_checkpoint(theirs)
    export_rosinality(tmp_path / "again.pt", first.G_ema, first.beside)
    with torch.serialization.safe_globals([argparse.Namespace]):
        expected = torch.load(theirs, weights_only=True)
    found = torch.load(tmp_path / "again.pt", weights_only=True)
    for name in ("g_ema", "g", "d"):
        assert_same_bits(found[name], expected[name])
    assert_same_bits({"latent_avg": found["latent_avg"]}, {"latent_avg": expected["latent_avg"]})
    assert found.keys() == {"g_ema", "g", "d", "latent_avg"}


def test_ours_there_and_back_again_to_the_bit(tmp_path: Path) -> None:
    G, D = networks_from_state(*golden("skip_resnet_32"))
    notes = export_rosinality(tmp_path / "ours.pt", G, {"G": G, "D": D}, license="MIT")
    assert len(notes) == 1, "its widths"
    assert "channel_base 512 and channel_max 32" in notes[0]
    again = import_checkpoint(tmp_path / "ours.pt")
    assert again.license == "MIT"
    for found, ours in ((again.G_ema, G), (again.beside["G"], G), (again.beside["D"], D)):
        assert_same_bits(dict(found.state_dict()), dict(ours.state_dict()))
        assert found.config == ours.config
    _, arrays = golden("skip_resnet_32")
    with torch.inference_mode():
        img = again.G_ema.synthesis(torch.from_numpy(arrays["ws"]), noise_mode="const")
    assert relative(img, torch.from_numpy(arrays["img_noise_const"])) < TOLERANCE


def test_a_missing_latent_avg_is_computed_from_a_fixed_seed_and_said(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", rosinality_checkpoint(latent_avg=False))
    imported = import_checkpoint(path)
    (note,) = imported.notes
    assert f"mean of {NUM_LATENTS:,} latents" in note
    w_avg = imported.G_ema.mapping.w_avg
    with torch.inference_mode():
        w = imported.G_ema.mapping(torch.randn(NUM_LATENTS, 8))[:, 0]
    # Two means of n draws each are apart by a standard normal times sqrt(2 / n) of the spread; 6 of these is never.
    assert ((w.mean(dim=0) - w_avg).abs() < 6 * w.std(dim=0) * (2 / NUM_LATENTS) ** 0.5).all()
    assert torch.equal(imported.beside["G"].mapping.w_avg, w_avg)
    assert torch.equal(import_checkpoint(path).G_ema.mapping.w_avg, w_avg), "the same every time"


def test_noise_that_old_checkpoints_lack_is_drawn_and_said(tmp_path: Path) -> None:
    content = rosinality_checkpoint()
    for name in ("g", "g_ema"):
        content[name] = {key: value for key, value in content[name].items() if not key.startswith("noises.")}
    imported = import_checkpoint(save(tmp_path / "a.pt", content))
    assert [note for note in imported.notes if "no noise buffers in g_ema" in note]
    noise = imported.G_ema.synthesis.b16.conv0.noise_const
    assert 0.8 < float(noise.std()) < 1.2
    assert torch.equal(imported.beside["G"].synthesis.b16.conv0.noise_const, noise)


def test_a_checkpoint_may_hold_g_ema_alone(tmp_path: Path) -> None:
    content = rosinality_checkpoint()
    imported = import_checkpoint(save(tmp_path / "a.pt", {"g_ema": content["g_ema"]}))
    assert imported.beside == {}


def without(name: str, key: str) -> dict[str, Any]:
    content = rosinality_checkpoint()
    del content[name][key]
    return content


def without_style() -> dict[str, Tensor]:
    return {key: value for key, value in rosinality_checkpoint()["g_ema"].items() if not key.startswith("style.")}


def having(name: str, key: str, value: Any) -> dict[str, Any]:
    content = rosinality_checkpoint()
    content[name][key] = value
    return content


WRONG = {
    r"no convs\.2\.conv\.weight in g_ema": lambda: without("g_ema", "convs.2.conv.weight"),
    r"no noises\.noise_3 in g": lambda: without("g", "noises.noise_3"),
    r"d\.extra\.weight has no place": lambda: having("d", "extra.weight", torch.zeros(1)),
    r"g_ema: mapping\.fc1\.weight: shape \[4, 4\]": lambda: having("g_ema", "style.2.weight", torch.zeros(4, 4)),
    r"convs\.1\.conv\.weight has another shape": lambda: having(
        "g_ema", "convs.1.conv.weight", torch.ones(2, 8, 8, 3, 3)
    ),
    r"another filter": lambda: having("d", "convs.1.conv2.0.kernel", torch.full((4, 4), 1 / 16)),
    r"g is no dictionary of tensors": lambda: rosinality_checkpoint() | {"g": 3},
    r"no averaged generator g_ema": lambda: {"g_ema": None, "g": {}},
    r"latent_avg is no tensor": lambda: rosinality_checkpoint() | {"latent_avg": 0.5},
    r"no conv1\.activate\.bias in g_ema": lambda: {"g_ema": {}},
    r"no mapping network": lambda: {"g_ema": without_style()},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", WRONG[message]())
    with pytest.raises(UserError, match=message) as caught:
        import_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("options", [{"c_dim": 3}, {"architecture": "resnet"}, {"img_channels": 1}])
def test_a_generator_that_has_no_place_there_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    (key,) = options
    with pytest.raises(UserError, match=f"{key} {options[key]}"):
        export_rosinality(tmp_path / "a.pt", Generator(16, **(OPTIONS | options)), {})
    assert not list(tmp_path.iterdir())


def test_what_its_code_would_do_otherwise_is_said(tmp_path: Path) -> None:
    G = Generator(16, **(OPTIONS | {"channel_base": 16384, "channel_max": 512, "conv_clamp": 256, "z_dim": 4}))
    D = Discriminator(16, channel_base=64, channel_max=8, mbstd_group_size=8)
    notes = export_rosinality(tmp_path / "a.pt", G, {"D": D})
    assert [note.split(":")[0].split(" is ")[0] for note in notes] == [
        "z_dim 4 and w_dim 8", "conv_clamp 256", "mbstd_group_size 8 becomes 4, fixed in that code",
    ]  # fmt: skip
    G = Generator(16, **(OPTIONS | {"channel_base": 16384, "channel_max": 512}))
    (note,) = export_rosinality(tmp_path / "b.pt", G, {"D": Discriminator(16, architecture="skip")})
    assert "discriminator is left out: that form has no place for its architecture skip" in note
    assert "d" not in torch.load(tmp_path / "b.pt", weights_only=True)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*absent/a\.pt"):
        export_rosinality(tmp_path / "absent" / "a.pt", Generator(16, **OPTIONS), {})


def test_exported_tensors_own_their_memory(tmp_path: Path) -> None:
    """A network in training has its weights in one arena; a file must not hold all of it for each."""
    G = Generator(16, **OPTIONS)
    arena = torch.cat([p.detach().flatten() for p in G.parameters()])
    start = 0
    for p in G.parameters():
        p.data = arena[start : start + p.numel()].view_as(p)
        start += p.numel()
    export_rosinality(tmp_path / "a.pt", G, {})
    assert (tmp_path / "a.pt").stat().st_size < 3 * arena.nbytes
    found = import_checkpoint(tmp_path / "a.pt").G_ema
    assert np.array_equal(found.synthesis.b4.const.detach().numpy(), G.synthesis.b4.const.detach().numpy())
