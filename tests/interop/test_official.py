"""Official network files: made here from the golden networks, read without running them, and the images compared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import (
    Persistent,
    dump,
    golden,
    official_file,
    persistent_network,
)

from stylepipe.errors import UserError
from stylepipe.interop.checkpoints import import_checkpoint
from stylepipe.interop.network_file import load_network, save_network
from stylepipe.networks.stylegan2 import Generator

NAMES = ("skip_resnet_32", "orig_orig_16", "conditional_16")
TOLERANCE = 1e-5  # of the golden files: float32, relative L2


def assert_golden(name: str, G: Any, D: Any) -> None:
    """See that the networks give the golden file's styles, images and logits."""
    _, arrays = golden(name)
    tensors = {key: torch.from_numpy(arrays[key]) for key in ("z", "ws", "d_in")}
    c = torch.from_numpy(arrays["c"]) if "c" in arrays else None
    with torch.inference_mode():
        found = {
            "ws": G.mapping(tensors["z"], c),
            "ws_psi0.7": G.mapping(tensors["z"], c, truncation_psi=0.7),
            "img_noise_none": G.synthesis(tensors["ws"], noise_mode="none"),
            "img_noise_const": G.synthesis(tensors["ws"], noise_mode="const"),
        }
        if D is not None:
            # The file has groups twice as large as the golden numbers, so that the setting shows.
            assert D.b4.mbstd.group_size == 8
            D.b4.mbstd.group_size = 4
            found["d_logits"] = D(tensors["d_in"], c)
    for key, value in found.items():
        error = np.linalg.norm(value.numpy() - arrays[key]) / np.linalg.norm(arrays[key])
        assert error < TOLERANCE, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("protocol", "flat", "kwargs"), [(4, False, True), (3, True, True), (5, False, False)])
def test_an_official_file_gives_the_golden_images(
    name: str, protocol: int, flat: bool, kwargs: bool, tmp_path: Path
) -> None:
    path = official_file(tmp_path / "network.pkl", name, protocol=protocol, flat=flat, kwargs=kwargs)
    before = set(sys.modules)
    imported = import_checkpoint(path)
    assert not {module for module in set(sys.modules) - before if module.startswith(("torch_utils", "dnnlib"))}
    save_network(tmp_path / "n.safetensors", imported.G_ema, beside=imported.beside)
    G_ema, D = load_network(tmp_path / "n.safetensors"), load_network(tmp_path / "n.safetensors", name="D")
    assert_golden(name, G_ema, D)
    G = load_network(tmp_path / "n.safetensors", name="G")
    assert torch.equal(G.synthesis.b4.const, G_ema.synthesis.b4.const + 1), "G is not G_ema"


def test_settings_come_from_the_arguments_or_else_from_the_weights(tmp_path: Path) -> None:
    config, _ = golden("conditional_16")
    for kwargs in (True, False):
        imported = import_checkpoint(official_file(tmp_path / "network.pkl", "conditional_16", kwargs=kwargs))
        found = imported.G_ema.config
        expected = {key: config[key] for key in ("res", "z_dim", "w_dim", "c_dim", "mapping_layers", "channel_max")}
        assert {key: found[key] for key in expected} == expected
        assert (found["channel_base"], found["architecture"], found["img_channels"]) == (256, "skip", 3)
        assert found["conv_clamp"] == (256 if kwargs else None)
        assert found["half_dtype"] is None, "a file must run on a CPU"
        assert imported.metadata == ({"num_fp16_res": "4"} if kwargs else {})
        assert imported.beside["D"].config["mbstd_group_size"] == 8
    assert any("non-commercial" in note for note in imported.notes)


def test_equal_widths_leave_channel_base_to_the_arguments(tmp_path: Path) -> None:
    """An 8 px network of channel_base 256 and channel_max 8 has 8 channels everywhere, as one of 64 has."""
    G = small()
    assert import_checkpoint(save(tmp_path, G, channel_base=256, channel_max=8)).G_ema.config["channel_base"] == 256
    assert import_checkpoint(save(tmp_path, G)).G_ema.config["channel_base"] == 64, "the least that gives them"


def small() -> dict[str, np.ndarray]:
    """Return the arrays of a generator with 8 channels at 4 and 8 px."""
    G = Generator(8, z_dim=16, w_dim=16, channel_base=64, channel_max=8, mapping_layers=2)
    return {key: tensor.numpy() for key, tensor in G.state_dict().items()}


def save(tmp_path: Path, arrays: dict[str, np.ndarray], **kwargs: Any) -> Path:
    content = {"G_ema": persistent_network("Generator", arrays, kwargs), "G": None, "D": None}
    return dump(tmp_path / "network.pkl", content)


def changed(**changes: Any) -> Callable[[Path], Path]:
    """Return what writes the small generator with arrays replaced, or left out where None."""

    def write(tmp_path: Path) -> Path:
        arrays = small()
        arrays |= {key.replace("__", "."): value for key, value in changes.items()}
        return save(tmp_path, {key: value for key, value in arrays.items() if value is not None})

    return write


def said(**kwargs: Any) -> Callable[[Path], Path]:
    """Return what writes the small generator with arguments that contradict its weights."""
    return lambda tmp_path: save(tmp_path, small(), **kwargs)


def holding(content: Any) -> Callable[[Path], Path]:
    return lambda tmp_path: dump(tmp_path / "network.pkl", content)


WRONG: dict[str, Callable[[Path], Path]] = {
    r"img_resolution 1024, its weights 8": said(img_resolution=1024),
    r"z_dim 512, its weights 16": said(z_dim=512),
    r"channel_base is a str, expected a number": said(channel_base="32768"),
    r"widths 8 at 4 px, 8 at 8 px: expected min.*channel_base 32 and channel_max 8": said(channel_base=32),
    r"missing: G_ema\.synthesis\.b4\.conv1\.bias": changed(synthesis__b4__conv1__bias=None),
    r"b8\.conv1\.bias: shape \[3\], expected \[8\]": changed(synthesis__b8__conv1__bias=np.zeros(3, np.float32)),
    r"G_ema\.synthesis\.b8\.extra: unknown": changed(synthesis__b8__extra=np.zeros(3, np.float32)),
    r"no mapping\.w_avg": changed(mapping__w_avg=None),
    r"blocks for \[\] px": changed(synthesis__b4__conv1__weight=None, synthesis__b8__conv1__weight=None),
    r"blocks for \[4, 8, 64\] px": changed(synthesis__b64__conv1__weight=np.zeros((8, 8, 3, 3), np.float32)),
    r"another filter": changed(synthesis__b8__resample_filter=np.full((4, 4), 1 / 16, np.float32)),
    r"alias-free StyleGAN3": changed(synthesis__input__freqs=np.zeros((8, 2), np.float32)),
    r"empty tensor": changed(synthesis__b8__conv1__bias=np.zeros(0, np.float32)),
    r"no averaged generator G_ema": holding({"G_ema": None, "D": None}),
    r"G_ema is no network": holding({"G_ema": {"weights": 1}}),
    r"a module Generator without _parameters": holding({"G_ema": Persistent("Generator", {"training": False})}),
    r"a dictionary of a, b; expected one with G_ema": holding({"a": 1, "b": 2}),
    r"holds a list; expected a dictionary": holding([1]),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_stylegan2_gets_one_message_that_names_the_file(message: str, tmp_path: Path) -> None:
    path = WRONG[message](tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        import_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_shapes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    """Two long biases would make a convolution of 40 TB."""
    wide = {f"synthesis.b{r}.conv1.weight": np.zeros((10**6, 1, 1, 1), np.float32) for r in (4, 8)}
    with pytest.raises(UserError, match="shape"):
        import_checkpoint(save(tmp_path, small() | wide))


def test_importing_leaves_the_callers_random_generator_alone(tmp_path: Path) -> None:
    path = official_file(tmp_path / "network.pkl", "orig_orig_16")
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    import_checkpoint(path)
    assert torch.equal(torch.randn(4), expected)
