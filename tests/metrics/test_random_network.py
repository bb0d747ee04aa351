"""Features that need no download: the same everywhere, and telling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stylepipe.datasets.drawn import draw_face
from stylepipe.metrics.frechet import Moments, frechet_distance
from stylepipe.metrics.random_network import RandomNetwork

DIGEST = "fbe30143317edbc17bd367fb56a4587486fa3e63607789f6e3b88f06134b2adb"


def features(images: torch.Tensor) -> torch.Tensor:
    extractor = RandomNetwork().extractor(images.shape[1], 0, True, torch.device("cpu"))
    return extractor(images, range(len(images)))["features"]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    moments = []
    for images in (a, b):
        moments.append(Moments(64))
        moments[-1].add(features(images))
    return frechet_distance(*moments)


def faces(numbers: range, side: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(draw_face(n, side)) for n in numbers]))


def test_its_weights_are_what_they_were():
    assert RandomNetwork().facts["sha256"] == DIGEST


def test_features_do_not_depend_on_the_company():
    images = faces(range(6))
    torch.testing.assert_close(features(images)[2:3], features(images[2:3]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [16, 64, 128])
def test_images_of_any_size_have_features_of_one_scale(side):
    found = features(faces(range(8), side))
    assert found.shape == (8, 64)
    assert 0.01 < found.std() < 10


def test_distances_grow_with_noise_and_stay_small_between_halves():
    real = faces(range(160))
    halves = distance(real[:80], real[80:])
    found = []
    for noise in (60, 150):
        noisy = real[80:].float() + noise * torch.randn(80, 32, 32, 3)
        found.append(distance(real[:80], noisy.clamp(0, 255).to(torch.uint8)))
    flat = distance(real[:80], real[80:].float().mean(dim=(1, 2), keepdim=True).expand(-1, 32, 32, -1).to(torch.uint8))
    assert halves < found[0] < found[1]
    assert flat > 3 * halves


def test_mirrored_faces_are_not_the_same_image(tmp_path):
    image = np.asarray(draw_face(3, 64))
    Image.fromarray(image).save(tmp_path / "face.png")
    pair = torch.from_numpy(np.stack([image, image[:, ::-1]]))
    a, b = features(pair)
    assert (a - b).norm() > 1e-3
