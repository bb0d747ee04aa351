"""Agreement with the reference mathematics: every quantity of golden/stylegan2_*.npz, and what is refused.

Run as a script for the table of errors: python tests/interop/test_nvidia.py
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from stylepipe.errors import UserError
from stylepipe.interop.nvidia import networks_from_state

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = ("stylegan2_skip_resnet_32", "stylegan2_orig_orig_16", "stylegan2_conditional_16")
TOLERANCE = 1e-5  # of the files: float32, relative L2
SECOND_ORDER_TOLERANCE = 1e-4


@cache
def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("config"))), arrays


def quantities(name: str) -> dict[str, torch.Tensor]:
    """Compute everything that the file holds beside weights and inputs."""
    config, arrays = load(name)
    G, D = networks_from_state(config, arrays)
    z, ws_in, d_in, pl_noise = (torch.from_numpy(arrays[key]) for key in ("z", "ws", "d_in", "pl_noise"))
    c = torch.from_numpy(arrays["c"]) if "c" in arrays else None
    found = {
        "ws": G.mapping(z, c),
        "ws_psi0.7": G.mapping(z, c, truncation_psi=0.7),
        "ws_psi0.5_cutoff4": G.mapping(z, c, truncation_psi=0.5, truncation_cutoff=4),
        "img_noise_none": G.synthesis(ws_in, noise_mode="none"),
        "img_noise_const": G.synthesis(ws_in, noise_mode="const"),
    }

    d_in.requires_grad_()
    found["d_logits"] = D(d_in, c)
    (found["d_input_grad"],) = torch.autograd.grad(found["d_logits"].sum(), d_in, create_graph=True)
    found["r1_per_sample"] = found["d_input_grad"].square().sum(dim=(1, 2, 3))
    parameters = [key.removeprefix("r1_grad.") for key in arrays if key.startswith("r1_grad.")]
    grads = torch.autograd.grad(found["r1_per_sample"].mean(), [D.get_parameter(key) for key in parameters])
    found |= {f"r1_grad.{key}": grad for key, grad in zip(parameters, grads, strict=True)}

    ws_in.requires_grad_()
    img = G.synthesis(ws_in, noise_mode="const")
    (grad,) = torch.autograd.grad((img * pl_noise).sum(), ws_in)
    found["pl_lengths"] = grad.square().sum(dim=2).mean(dim=1).sqrt()
    return found


def errors(name: str) -> dict[str, float]:
    """Return the relative L2 error of each quantity."""
    _, arrays = load(name)
    return {
        key: float(np.linalg.norm(value.detach().numpy() - arrays[key]) / np.linalg.norm(arrays[key]))
        for key, value in quantities(name).items()
    }


@pytest.mark.parametrize("name", FILES)
def test_every_quantity_of_the_golden_file_is_met(name: str) -> None:
    _config, arrays = load(name)
    found = errors(name)
    inputs = {"z", "c", "d_in", "pl_noise"}
    assert set(found) == {key for key in arrays if not key.startswith(("G.", "D."))} - inputs
    for key, error in found.items():
        assert error < (SECOND_ORDER_TOLERANCE if key.startswith("r1_grad.") else TOLERANCE), key


def test_an_unknown_array_is_named() -> None:
    config, arrays = load(FILES[1])
    with pytest.raises(UserError, match=r"G\.synthesis\.b8\.conv7\.weight"):
        networks_from_state(config, arrays | {"G.synthesis.b8.conv7.weight": np.zeros(1)})


def test_a_missing_array_is_named() -> None:
    config, arrays = load(FILES[1])
    with pytest.raises(UserError, match=r"missing: D\.b4\.out\.bias"):
        networks_from_state(config, {key: value for key, value in arrays.items() if key != "D.b4.out.bias"})


def test_an_array_of_another_shape_is_named_with_both_shapes() -> None:
    config, arrays = load(FILES[1])
    with pytest.raises(UserError, match=r"G\.mapping\.w_avg: shape \[3\], expected \[16\]"):
        networks_from_state(config, arrays | {"G.mapping.w_avg": np.zeros(3, np.float32)})


def test_weights_trained_with_another_filter_are_refused() -> None:
    config, arrays = load(FILES[1])
    with pytest.raises(UserError, match="another filter"):
        networks_from_state(config, arrays | {"D.b8.resample_filter": np.full((4, 4), 1 / 16, np.float32)})


@pytest.mark.parametrize("change", [{"res": None}, {"batch": 4}])
def test_a_config_with_missing_or_unknown_keys_is_refused(change: dict) -> None:
    config, arrays = load(FILES[1])
    changed = {key: value for key, value in (config | change).items() if value is not None or key == "conv_clamp"}
    with pytest.raises(UserError, match="network config"):
        networks_from_state(changed, arrays)


def test_loading_leaves_the_callers_random_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    networks_from_state(*load(FILES[1]))
    assert torch.equal(torch.randn(4), expected)


if __name__ == "__main__":
    for file in FILES:
        for quantity, value in errors(file).items():
            print(f"{file:28} {quantity:28} {value:.1e}")
