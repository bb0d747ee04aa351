"""What only a CUDA device can show; `make gpu-check` runs these."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from stylepipe.config import Config, LossConfig, NetworkConfig
from stylepipe.datasets.reader import Batch
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe, build_networks, trial
from stylepipe.training.engine import Engine
from stylepipe.training.growth import Stage
from stylepipe.training.probe import largest_batch_gpu

SMALL = Config(
    res=64,
    batch_size=16,
    batch_gpu=8,
    network=NetworkConfig(channel_base=2048, channel_max=64, mapping_layers=2),
    loss=LossConfig(r1_interval=2, pl_interval=2, r1_gamma=1.0),
)
GPU = torch.device("cuda")


def make_engine(precision: str, c_dim: int = 0) -> Engine:
    config = with_precision(resolve(SMALL, 1), precision)
    labels = torch.eye(c_dim)
    recipe = GANRecipe(config, GPU, c_dim, lambda rows: labels[rows], c_dim or 1)
    return Engine(recipe, optim=config.optim, ema=config.ema)


def batch(c_dim: int = 0) -> Batch:
    images = torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images.pin_memory(), torch.zeros(16, c_dim).pin_memory(), torch.arange(16))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("c_dim", [0, 3])
def test_a_step_never_waits_for_the_device(precision, c_dim):
    engine, data = make_engine(precision, c_dim), batch(c_dim)
    engine.step(data)  # the first may initialise libraries
    engine.step(data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            engine.step(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, tensor in engine.state().items():
        assert tensor.isfinite().all(), name


def test_a_state_continues_to_the_bit():
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        straight, first, second = (make_engine("fp32") for _ in range(3))
        for _ in range(3):
            straight.step(batch())
        first.step(batch())
        second.load_state({name: tensor.clone() for name, tensor in first.state().items()}, first.images_seen)
        for _ in range(2):
            second.step(batch())
    finally:
        torch.backends.cudnn.deterministic = deterministic
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, second.state()[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_networks_agree_with_the_cpu(precision, monkeypatch):
    """bf16 carries 8 bits through the convolutions of four levels, fp16 11; TF32 is off for the comparison."""
    tolerance = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}[precision]
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    G, D = build_networks(with_precision(resolve(SMALL, 1), precision), 0, GPU)
    reference_G, reference_D = build_networks(with_precision(resolve(SMALL, 1), "fp32"), 0, torch.device("cpu"))
    z = torch.randn(8, 512)
    img, reference = G(z.to(GPU)).cpu(), reference_G(z)
    assert float((img - reference).norm() / reference.norm()) < tolerance
    logits, expected = D(reference.to(GPU)).cpu(), reference_D(reference)
    assert float((logits - expected).norm() / expected.norm()) < tolerance


def test_the_largest_micro_batch_is_found_by_trying():
    config = with_precision(resolve(dataclasses.replace(SMALL, batch_gpu="auto"), 1), "bf16")

    def build(device: torch.device, batch_gpu: int) -> GANRecipe:
        return trial(config, 0, device, batch_gpu)

    def stages(batch_gpu: int) -> Sequence[Stage]:
        return build(torch.device("meta"), batch_gpu).schedule.stages()

    assert largest_batch_gpu(build, stages, config, 0, 16, GPU) == 16
