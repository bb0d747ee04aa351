"""What the tests on a CUDA device share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stylepipe.kernels import native

sys.path.append(str(Path(__file__).parent))  # for gpu_ops; pytest's importlib mode leaves it out


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Give the device, with PyTorch's own operations in full precision."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let new tensors be full of NaN, so that what a kernel fails to write is found."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which that setting wants for matrix products
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def forget() -> Iterator[None]:
    """Let what runs be chosen anew, in this test and behind it."""
    native.forget()
    yield
    native.forget()
