"""Augmentations do not leak: a generator trained on upright images makes upright images, though D sees them rotated.

Karras et al. 2020, arXiv:2006.06676, section 2.2 and appendix C: rotations by 90 degrees leak at p = 1, where all four
directions are alike to the discriminator, and hardly at p = 0.8.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stylepipe
from stylepipe.cli.main import main

RES, COUNT = 16, 512
TRAINING = (
    f"--res {RES} --batch-size 16 --network.channel-base 512 --network.channel-max 32 --network.z-dim 32 "
    "--network.w-dim 32 --network.mapping-layers 2 --loss.r1-gamma 1 --kimg 12 --grid-kimg 100 --tick-kimg 4 "
    "--loss.pl-weight 0 --tracker none --augment fixed --aug.pipe blit --aug.xint 0"
).split()


@pytest.fixture(scope="module")
def skies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright sky over dark ground, colours and horizon drawn."""
    folder = tmp_path_factory.mktemp("skies")
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        image = np.empty((RES, RES, 3))
        horizon = rng.integers(6, 11)
        image[:horizon] = rng.uniform(150, 250, 3)
        image[horizon:] = rng.uniform(10, 100, 3)
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def share_upright(skies: Path, out: Path, p: float) -> float:
    """Train with augmentation at p; return the share of generated images whose brightest side is the top."""
    assert main(["train", "--data", str(skies), "--out", str(out), *TRAINING, "--aug.p", str(p)]) == 0
    (network,) = sorted(out.glob("network-*.safetensors"))[-1:]
    G = stylepipe.load_network(network)
    with torch.inference_mode():
        grey = G(torch.randn(256, 32)).mean(dim=1)
    sides = [grey[:, :5], grey[:, -5:], grey[..., :5], grey[..., -5:]]
    brightest = torch.stack([side.mean(dim=(1, 2)) for side in sides]).argmax(dim=0)
    return float((brightest == 0).float().mean())


@pytest.mark.slow
def test_rotations_do_not_leak_at_p_below_1(skies: Path, tmp_path: Path) -> None:
    assert share_upright(skies, tmp_path / "run", 0.8) > 0.95


@pytest.mark.slow
def test_rotations_leak_at_p_1_so_the_test_above_can_fail(skies: Path, tmp_path: Path) -> None:
    assert share_upright(skies, tmp_path / "run", 1.0) < 0.8
