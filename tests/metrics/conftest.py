"""What tests of metrics are compared with."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import pytest
import torch

# Operators that torchvision describes when it is imported, whether or not it could load them.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_defined: list[torch.library.Library] = []  # a definition ends with its library


@pytest.fixture(scope="session")
def fidelity() -> ModuleType:
    """Give torch-fidelity, the implementation that others compare with, or skip."""
    for package in ("torch_fidelity", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        try:
            return importlib.import_module("torch_fidelity")
        except RuntimeError as error:  # torchvision and torch are of different builds, one with CUDA and one without
            if "torchvision::" not in str(error):
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            _defined.append(library)
            for schema in SCHEMAS:
                library.define(schema)
            return importlib.import_module("torch_fidelity")
