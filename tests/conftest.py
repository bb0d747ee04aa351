"""What all tests share."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
"""The repository's root."""

# For foreign_checkpoints, which makes files that three folders' tests read, watchdog, which two folders' tests keep,
# poisoned_train and tiny_runs; pytest's importlib mode leaves them out.
sys.path += [str(ROOT / "tests" / folder) for folder in ("cli", "interop", "training")]

os.environ["WANDB_MODE"] = "offline"  # no test reaches a server, whoever is logged in on this machine
os.environ["WANDB_SILENT"] = "true"
os.environ.pop("STYLEPIPE_DEBUG", None)  # tests expect messages where it would show tracebacks

_OWN_KERNEL_CACHE = None
if "STYLEPIPE_KERNEL_CACHE" not in os.environ:  # workers inherit it: what one compiles, all have
    _OWN_KERNEL_CACHE = os.environ["STYLEPIPE_KERNEL_CACHE"] = tempfile.mkdtemp(prefix="stylepipe-test-kernels-")


def pytest_unconfigure() -> None:
    if _OWN_KERNEL_CACHE is not None:
        shutil.rmtree(_OWN_KERNEL_CACHE, ignore_errors=True)


def pytest_configure() -> None:
    # Trainings take all cores they are allowed, and two that share cores wait for one another actively: they would slow
    # one another many times.
    if (worker := os.environ.get("PYTEST_XDIST_WORKER", "")) and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    # A shell that runs the tests in the background ignores Ctrl-C for them and all that they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (ROOT / "tests" / "gpu") in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_thread_per_worker() -> None:
    """Leave the other cores to the other workers, where a training within an earlier test has taken all for good."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """Give the repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder of shared material (golden numbers, photographs) beside the repository, or skip."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the shared material in {folder}")
    return folder


@pytest.fixture(autouse=True)
def _same_randomness_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def bound_by_permissions() -> Iterator[None]:
    """Let files and folders without write permission refuse even root: take its capabilities to pass them away."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capabilities(7): version 3, this thread
    before, fewer = ((ctypes.c_uint32 * 6)() for _ in range(2))  # effective, permitted, inheritable; twice 32 bits
    libc = ctypes.CDLL(None, use_errno=True)
    for sets in (before, fewer):
        assert libc.capget(header, sets) == 0
    fewer[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    yield
    assert libc.capset(header, before) == 0
