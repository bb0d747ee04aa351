"""Published feature networks, through the libraries that keep them, with weights that the user has.

Each stands for a resize filter of its own as well: the filter alone moves an FID by 1.0 (Parmar et al. 2022,
arXiv:2104.11222).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stylepipe.errors import UserError
from stylepipe.metrics.extraction import Counts, counts_of_features
from stylepipe.metrics.weights import FoundWeights, WeightFile, as_downloaded, find_weights

_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
INCEPTION = WeightFile(
    "weights-inception-2015-12-05-6726825d.pth", f"{_FIDELITY}/weights-inception-2015-12-05-6726825d.pth", "6726825d"
)
LPIPS = WeightFile("weights-vgg16-lpips.pth", f"{_FIDELITY}/weights-vgg16-lpips.pth")
VGG16 = WeightFile("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
DINOV2 = WeightFile(
    "dinov2_vitl14_pretrain.pth", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
)

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINO_SIDE, _DINO_PATCH = 224, 14


class Inception:
    """The Inception-v3 of Heusel et al. 2017, arXiv:1706.08500, with its TensorFlow weights: torch-fidelity's.

    Args:
        cache: stylepipe's cache folder.

    Raises:
        UserError: weights or library are missing.
    """

    name = "inception"
    lowest = 4
    seeded = False
    paths = False

    def __init__(self, cache: Path) -> None:
        self._weights = find_weights(INCEPTION, cache)
        self._module = library("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
        self._network: nn.Module | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its features depend on."""
        return _facts("Inception-v3 2015-12-05", self._weights, "to 299 px, bilinear as in TensorFlow 1")

    def counts(self, available: int, asked: int | None) -> Counts:
        """See `Extraction.counts`."""
        return counts_of_features(available, asked)

    def extractor(self, resolution: int, seed: int, real: bool, device: torch.device) -> InceptionFeatures:
        """See `Extraction.extractor`."""
        del resolution, seed, real
        if self._network is None:
            with as_downloaded([self._weights]):
                kind = self._module.FeatureExtractorInceptionV3
                self._network = kind("inception-v3-compat", ["2048", "logits_unbiased"], verbose=False)
        return InceptionFeatures(self._network.to(device))


class InceptionFeatures:
    """Returns the last averages [N, 2048] and the logits without bias [N, 1008] of images [N, R, R, 3] uint8."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @torch.no_grad()
    def __call__(self, images: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        """See `Extractor`."""
        del numbers
        features, logits = self._network(images.permute(0, 3, 1, 2))
        return {"features": features, "logits": logits}


class DINOv2:
    """DINOv2's ViT-L/14 as Stein et al. 2023, arXiv:2306.04675, use it: class token of images at 224 px; timm's.

    Args:
        cache: stylepipe's cache folder.

    Raises:
        UserError: weights or library are missing.
    """

    name = "dinov2"
    lowest = 4
    seeded = False
    paths = False

    def __init__(self, cache: Path) -> None:
        self._weights = find_weights(DINOV2, cache)
        self._timm = library("timm", "timm")
        self._network: nn.Module | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its features depend on."""
        return _facts("DINOv2 ViT-L/14", self._weights, f"to {_DINO_SIDE} px, bicubic with antialias")

    def counts(self, available: int, asked: int | None) -> Counts:
        """See `Extraction.counts`."""
        return counts_of_features(available, asked)

    def extractor(self, resolution: int, seed: int, real: bool, device: torch.device) -> DINOv2Features:
        """See `Extraction.extractor`."""
        del resolution, seed, real
        if self._network is None:
            network: nn.Module = self._timm.create_model(
                "vit_large_patch14_dinov2.lvd142m", pretrained=False, num_classes=0, img_size=_DINO_SIDE
            )
            network.load_state_dict(_dino_state(self._weights.path))
            self._network = network.eval().requires_grad_(False)
        return DINOv2Features(self._network.to(device))


class DINOv2Features:
    """Returns the class token after the last norm, [N, 1024] float32, of images [N, R, R, 3] uint8."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @torch.no_grad()
    def __call__(self, images: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        """See `Extractor`."""
        del numbers
        x = interpolate(images.permute(0, 3, 1, 2).float(), _DINO_SIDE, mode="bicubic", antialias=True)
        mean, std = (x.new_tensor(v)[:, None, None] * 255 for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        return {"features": self._network((x - mean) / std)}


class LPIPSDistance:
    """The perceptual distance of Zhang et al. 2018, arXiv:1801.03924, on VGG16: torch-fidelity's.

    Args:
        cache: stylepipe's cache folder.

    Raises:
        UserError: weights or library are missing.
    """

    name = "lpips"

    def __init__(self, cache: Path) -> None:
        self._weights = [find_weights(file, cache) for file in (LPIPS, VGG16)]
        self._module = library("torch_fidelity.sample_similarity_lpips", "torch-fidelity")
        self._network: nn.Module | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What its distances depend on."""
        return {"network": "LPIPS 0.1 on VGG16", "sha256": " ".join(found.sha256 for found in self._weights)}

    def on(self, device: torch.device) -> nn.Module:
        """Return what gives the distances [N] of two lots of images [N, 3, R, R] float32 in [0, 255]."""
        if self._network is None:
            with as_downloaded(self._weights):
                self._network = self._module.SampleSimilarityLPIPS("lpips-vgg16")
        return self._network.to(device)


def _dino_state(path: Path) -> dict[str, Tensor]:
    """Return the published weights for images of 224 px.

    Positions are resampled as the published code does: timm would smooth them, and so would a target size in place of
    its scale factor move them a little.
    """
    state = dict(torch.load(path, map_location="cpu", weights_only=True))
    state.pop("mask_token", None)  # of its training
    positions = state["pos_embed"]
    stored, wanted = isqrt(positions.shape[1] - 1), _DINO_SIDE // _DINO_PATCH
    grid = positions[:, 1:].unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    scale = (wanted + 0.1) / stored  # the offset keeps rounding from losing a row
    grid = interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    state["pos_embed"] = torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)
    return state


def library(module: str, package: str) -> ModuleType:
    """Import a module of a library that only some metrics need; raise UserError where that fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        what = package if error.name in (None, module, module.partition(".")[0]) else f"{package}'s {error.name}"
        raise UserError(f"{what} is not installed: pip install 'stylepipe[metrics]'") from error
    except RuntimeError as error:  # torchvision's ops, if it was built for another torch
        raise UserError(
            f"{package} cannot be imported ({error}): torchvision has to be of the same build as torch; "
            f"install both from the same place"
        ) from error


def _facts(network: str, weights: FoundWeights, resize: str) -> Mapping[str, Any]:
    return {"network": network, "sha256": weights.sha256, "resize": resize}
