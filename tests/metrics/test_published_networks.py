"""Feature networks through their libraries: the right files, checked, and images as each network wants them.

No weights can be had here, so files of random ones stand in for them, under digests that the tests set.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from stylepipe.errors import UserError
from stylepipe.metrics import published_networks
from stylepipe.metrics.published_networks import DINOv2, Inception, LPIPSDistance
from stylepipe.metrics.weights import WeightFile, find_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_other_weights(monkeypatch, tmp_path):
    """Let torch.hub keep its files in a folder of the test."""
    monkeypatch.delenv("STYLEPIPE_WEIGHTS", raising=False)
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield
    assert torch.hub.get_dir() == str(tmp_path / "hub"), "it is left as it was found"
    torch.hub.set_dir(before)


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_is_nowhere_is_asked_for_by_name_address_and_place(tmp_path):
    with pytest.raises(UserError) as raised:
        Inception(tmp_path / "cache")
    message = str(raised.value)
    assert "weights-inception-2015-12-05-6726825d.pth is not here: put the file from https://" in message
    assert message.endswith(f"into {tmp_path / 'cache' / 'weights'}")


@pytest.mark.parametrize("place", ["variable", "cache", "hub"])
def test_a_file_is_found_where_it_may_be(tmp_path, monkeypatch, place):
    folders = {"variable": "mine", "cache": "cache/weights", "hub": "hub/checkpoints"}
    folder = tmp_path / folders[place]
    folder.mkdir(parents=True)
    monkeypatch.setenv("STYLEPIPE_WEIGHTS", str(tmp_path / "mine"))
    torch.save({"w": torch.ones(2)}, folder / "net.pth")
    file = WeightFile("net.pth", "https://example.org/net.pth", digest(folder / "net.pth")[:8])
    found = find_weights(file, tmp_path / "cache")
    assert found.path == folder / "net.pth"
    assert found.sha256 == digest(folder / "net.pth")


def test_another_file_of_that_name_is_refused_and_seen_anew_when_replaced(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, folder / "net.pth")
    file = WeightFile("net.pth", "https://example.org/net.pth", "0123abcd")
    with pytest.raises(UserError, match=r"net\.pth: is not the published file \(SHA-256 .* instead of 0123abcd"):
        find_weights(file, tmp_path)
    torch.save({"w": torch.zeros(3)}, folder / "net.pth")
    found = find_weights(replace(file, sha256=digest(folder / "net.pth")[:8]), tmp_path)
    assert found.sha256 == digest(folder / "net.pth")


class Sting:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    (tmp_path / "weights").mkdir()
    torch.save({"w": Sting()}, tmp_path / "weights" / "net.pth")
    with pytest.raises(UserError, match="holds no plain tensors"):
        find_weights(WeightFile("net.pth", "https://example.org"), tmp_path)
    assert capsys.readouterr().out == ""


def test_inception_is_torch_fidelitys_of_the_file(fidelity, tmp_path, monkeypatch):
    module = importlib.import_module(f"{fidelity.__name__}.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    torch.save({}, tmp_path / "none.pth")
    with monkeypatch.context() as patch:  # it is made with weights only: leave it those it draws
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
        theirs = kind("mine", ["2048", "logits_unbiased"], feature_extractor_weights_path=tmp_path / "none.pth")
    folder = tmp_path / "weights"
    folder.mkdir()
    path = folder / published_networks.INCEPTION.name
    torch.save(theirs.state_dict(), path)
    monkeypatch.setattr(published_networks, "INCEPTION", replace(published_networks.INCEPTION, sha256=digest(path)[:8]))
    ours = Inception(tmp_path)
    assert ours.facts["sha256"] == digest(path)
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    found = ours.extractor(64, 0, True, CPU)(images, [0, 1])
    features, logits = theirs(images.permute(0, 3, 1, 2))
    assert torch.equal(found["features"], features)
    assert found["features"].shape == (2, 2048)
    assert torch.equal(found["logits"], logits)
    assert found["logits"].shape == (2, 1008)


@pytest.mark.slow
def test_lpips_is_torch_fidelitys_of_the_files(fidelity, tmp_path, monkeypatch):
    import torchvision

    folder = tmp_path / "weights"
    folder.mkdir()
    vgg = torchvision.models.vgg16()
    torch.save(vgg.state_dict(), folder / "vgg16-397923af.pth")
    lins = {f"lin{k}.model.1.weight": torch.rand(1, n, 1, 1) for k, n in enumerate((64, 128, 256, 512, 512))}
    torch.save(lins, folder / "weights-vgg16-lpips.pth")
    monkeypatch.setattr(
        published_networks,
        "VGG16",
        replace(published_networks.VGG16, sha256=digest(folder / "vgg16-397923af.pth")[:8]),
    )
    distance = LPIPSDistance(tmp_path)
    a, b = torch.rand(2, 3, 64, 64) * 255, torch.rand(2, 3, 64, 64) * 255
    found = distance.on(CPU)(a, b).flatten()
    # By hand, of Zhang et al. 2018, Eq. 1: unit length over channels, squared differences, weights, means over pixels.
    total = torch.zeros(2)
    x, y = (img / 127.5 - 1 for img in (a, b))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((img - shift[:, None, None]) / scale[:, None, None] for img in (x, y))
    taps = {3: 0, 8: 1, 15: 2, 22: 3, 29: 4}
    with torch.no_grad():
        for layer, module in enumerate(vgg.features[:30]):
            x, y = module(x), module(y)
            if layer in taps:
                u, v = (z / z.square().sum(dim=1, keepdim=True).sqrt() for z in (x, y))
                weight = lins[f"lin{taps[layer]}.model.1.weight"]
                total += ((u - v).square() * weight).sum(dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(found, total, rtol=1e-3, atol=1e-5)
    assert len(distance.facts["sha256"].split()) == 2


def test_a_missing_library_is_named_with_the_command(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    torch.save({}, tmp_path / "weights" / published_networks.DINOV2.name)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"timm is not installed: pip install 'stylepipe\[metrics\]'"):
        DINOv2(tmp_path)


def test_dinov2s_positions_come_from_its_own_grid(tmp_path):
    path = tmp_path / "state.pth"
    rows = torch.linspace(0, 1, 37)[:, None].expand(37, 37)
    grid = torch.stack([rows, rows.T, torch.ones(37, 37)], dim=2).reshape(1, 37 * 37, 3)
    torch.save({"pos_embed": torch.cat([torch.full((1, 1, 3), 5.0), grid], dim=1), "mask_token": torch.ones(1)}, path)
    state = published_networks._dino_state(path)
    assert list(state) == ["pos_embed"]
    assert state["pos_embed"].shape == (1, 257, 3)
    assert torch.equal(state["pos_embed"][0, 0], torch.full((3,), 5.0))
    found = state["pos_embed"][0, 1:].view(16, 16, 3)
    torch.testing.assert_close(found[..., 2], torch.ones(16, 16))
    torch.testing.assert_close(found[:, 3, 0], found[5, :, 1])
    centres = ((torch.arange(16) + 0.5) * 37 / 16.1 - 0.5) / 36
    torch.testing.assert_close(found[1:-1, 0, 0], centres[1:-1], atol=2e-3, rtol=0)


@pytest.mark.parametrize("side", [64, 512])
def test_the_resize_of_dinov2_is_pillows_bicubic(side):
    image = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3)).astype(np.float32)
    image = image.repeat(8, axis=0).repeat(8, axis=1)
    colours = [Image.fromarray(image[..., c]).resize((224, 224), Image.Resampling.BICUBIC) for c in range(3)]
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    ours = interpolate(x, 224, mode="bicubic", antialias=True)[0]
    np.testing.assert_allclose(ours.numpy(), np.stack([np.asarray(colour) for colour in colours]), atol=0.02)
