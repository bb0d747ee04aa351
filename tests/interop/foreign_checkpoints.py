"""Checkpoints in the forms of other projects, made here: their structure, none of their code.

`official_file` pickles objects as NVIDIA's network files hold them. `RosinalityGenerator` and `RosinalityDiscriminator`
are the networks of Karras et al. 2020 (arXiv:1912.04958), written once more and as plainly as possible: dense
convolutions with a weight per sample, zeros inserted before filtering. Their parameters have rosinality's names.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden"
_BUFFERS = ("resample_filter", "noise_const", "w_avg")
_SLOPE = 0.2


@cache
def golden(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return config and arrays of one of the golden files."""
    with np.load(GOLDEN / f"stylegan2_{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("config"))), arrays


class EasyDict(dict):
    """A dictionary whose entries are attributes too; its class is pickled by name."""

    __module__ = "dnnlib.util"


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("a test's file has been unpickled")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """An object that is pickled as its class's source code, name and state."""

    def __init__(self, class_name: str, state: dict[str, Any], source: str = "raise SystemExit('run')") -> None:
        self.meta = EasyDict(type="class", version=6, module_src=source, class_name=class_name, state=state)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,)


@contextmanager
def _importable() -> Iterator[None]:
    """Let pickle find what it only writes down by name."""
    persistence, util = ModuleType("torch_utils.persistence"), ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = EasyDict  # type: ignore[attr-defined]
    modules = {"torch_utils": ModuleType("torch_utils"), "dnnlib": ModuleType("dnnlib")}
    modules |= {"torch_utils.persistence": persistence, "dnnlib.util": util}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def persistent_network(
    class_name: str, arrays: Mapping[str, np.ndarray], kwargs: Mapping[str, Any], **attributes: Mapping[str, Any]
) -> Persistent:
    """Return a network of these arrays as a tree of persistent objects.

    Args:
        class_name: of the outermost object.
        arrays: by official names.
        kwargs: what it says it was made with.
        attributes: of modules, by their name with `__` for dots, such as b4__mbstd.
    """
    named = {name.replace("__", "."): values for name, values in attributes.items()}
    tree: dict[str, Any] = {}
    for name in (*arrays, *(f"{module}." for module in named)):
        node = tree
        *modules, leaf = name.split(".")
        for module in modules:
            node = node.setdefault(module, {})
        if leaf:
            node[leaf] = torch.from_numpy(np.array(arrays[name]))
    return _persistent(tree, "", class_name, EasyDict(kwargs), named)


def _persistent(
    tree: Mapping[str, Any], path: str, class_name: str, kwargs: EasyDict, named: Mapping[str, Mapping[str, Any]]
) -> Persistent:
    tensors = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    parameters = OrderedDict((key, nn.Parameter(value)) for key, value in tensors.items() if key not in _BUFFERS)
    modules = {
        key: _persistent(value, f"{path}.{key}".strip("."), "Layer", EasyDict(), named)
        for key, value in tree.items()
        if isinstance(value, dict)
    }
    return Persistent(
        class_name,
        {
            "training": False,
            "_parameters": OrderedDict(parameters, absent=None),
            "_buffers": OrderedDict((key, value) for key, value in tensors.items() if key in _BUFFERS),
            "_non_persistent_buffers_set": set(),
            "_backward_hooks": OrderedDict(),
            "_modules": OrderedDict(modules, plain=nn.Identity()),
            "_init_args": (),
            "_init_kwargs": kwargs,
            "act_gain": np.sqrt(2),
            "size": torch.Size([1, 2]),
            **named.get(path, {}),
        },
    )


def dump(path: Path, content: Any, protocol: int = 4) -> Path:
    """Pickle `content` in which there may be Persistent objects."""
    with _importable():
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def official_kwargs(config: Mapping[str, Any], flat: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what G and D of a golden file say they were made with: StyleGAN2-ADA's way, or StyleGAN3's, flat."""
    widths = {key: config[key] for key in ("channel_base", "channel_max")} | {"num_fp16_res": 4, "conv_clamp": 256}
    common = {"c_dim": config["c_dim"], "img_resolution": config["res"], "img_channels": 3}
    G = common | {"z_dim": config["z_dim"], "w_dim": config["w_dim"]}
    G["mapping_kwargs"] = EasyDict(num_layers=config["mapping_layers"])
    G |= widths if flat else {"synthesis_kwargs": EasyDict(widths)}
    D = common | widths | {"epilogue_kwargs": EasyDict(mbstd_group_size=config["mbstd_group"] * 2)}
    return G, D


def official_file(path: Path, name: str, *, protocol: int = 4, flat: bool = False, kwargs: bool = True) -> Path:
    """Write a golden file's networks as an official network file; G is G_ema with another constant.

    Args:
        path, protocol: of the pickle.
        name: of the golden file.
        flat: as StyleGAN3's code does.
        kwargs: False leaves the arguments out; then attributes tell what shapes do not.
    """
    config, arrays = golden(name)
    G = {key.removeprefix("G."): array for key, array in arrays.items() if key.startswith("G.")}
    D = {key.removeprefix("D."): array for key, array in arrays.items() if key.startswith("D.")}
    of_G, of_D = official_kwargs(config, flat) if kwargs else ({}, {})
    mbstd = {"group_size": config["mbstd_group"] * 2, "num_channels": 1}
    other = G | {"synthesis.b4.const": G["synthesis.b4.const"] + 1}
    content = {
        "G": persistent_network("Generator", other, of_G),
        "D": persistent_network("Discriminator", D, of_D, b4__mbstd=mbstd),
        "G_ema": persistent_network("Generator", G, of_G),
        "augment_pipe": None,
        "training_set_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", path="faces.zip"),
    }
    return dump(path, content, protocol)


def filters(gain: float = 1) -> Tensor:
    """Return [1, 3, 3, 1] along both axes, with a sum of `gain`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 64 * gain


def resample(x: Tensor, kernel: Tensor, up: int, down: int, before: int, after: int) -> Tensor:
    """Insert zeros, pad, convolve each channel, and keep every down-th pixel."""
    n, c, h, w = x.shape
    spread = x.new_zeros(n, c, h * up, w * up)
    spread[:, :, ::up, ::up] = x
    y = F.pad(spread, (before, after, before, after)).reshape(n * c, 1, h * up + before + after, -1)
    y = F.conv2d(y, kernel.flip(0, 1)[None, None])
    return y.reshape(n, c, *y.shape[2:])[:, :, ::down, ::down]


def _lrelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(x + bias.view(1, -1, *[1] * (x.ndim - 2)), _SLOPE) * math.sqrt(2)


class _Holder(nn.Module):
    """Parameters and buffers under given names, as deep as the names go."""

    def put(self, name: str, tensor: Tensor, buffer: bool = False) -> None:
        first, _, rest = name.partition(".")
        if rest:
            if first not in self._modules:
                self.add_module(first, _Holder())
            self.get_submodule(first).put(rest, tensor, buffer)  # type: ignore[operator]
        elif buffer:
            self.register_buffer(first, tensor)
        else:
            self.register_parameter(first, nn.Parameter(tensor))

    def named(self, name: str) -> Tensor:
        """Find a tensor by its full name."""
        return self.state_dict(keep_vars=True)[name]

    def linear(self, name: str, x: Tensor, lr_mul: float = 1) -> Tensor:
        weight, bias = self.named(f"{name}.weight"), self.named(f"{name}.bias")
        return F.linear(x, weight * (lr_mul / math.sqrt(weight.shape[1])), bias * lr_mul)


class RosinalityGenerator(_Holder):
    """z [N, dim] to img [N, 3, size, size], with the noise of its buffers."""

    def __init__(self, size: int, dim: int, n_mlp: int, channels: Mapping[int, int]) -> None:
        super().__init__()
        self.size, self.n_mlp = size, n_mlp
        for i in range(1, n_mlp + 1):
            self.put(f"style.{i}.weight", torch.randn(dim, dim) / 0.01)
            self.put(f"style.{i}.bias", torch.randn(dim))
        self.put("input.input", torch.randn(1, channels[4], 4, 4))
        self._styled("conv1", channels[4], channels[4], dim)
        self._to_rgb("to_rgb1", channels[4], dim)
        self.put("noises.noise_0", torch.randn(1, 1, 4, 4), buffer=True)
        for i, r in enumerate(self.levels()):
            self._styled(f"convs.{2 * i}", channels[r // 2], channels[r], dim)
            self.put(f"convs.{2 * i}.conv.blur.kernel", filters(4), buffer=True)
            self._styled(f"convs.{2 * i + 1}", channels[r], channels[r], dim)
            self._to_rgb(f"to_rgbs.{i}", channels[r], dim)
            self.put(f"to_rgbs.{i}.upsample.kernel", filters(4), buffer=True)
            for k in (2 * i + 1, 2 * i + 2):
                self.put(f"noises.noise_{k}", torch.randn(1, 1, r, r), buffer=True)

    def levels(self) -> list[int]:
        return [2**i for i in range(3, self.size.bit_length())]

    def w(self, z: Tensor) -> Tensor:
        x = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
        for i in range(1, self.n_mlp + 1):
            x = F.leaky_relu(self.linear(f"style.{i}", x, lr_mul=0.01), _SLOPE) * math.sqrt(2)
        return x

    def forward(self, z: Tensor) -> Tensor:
        w = self.w(z)
        x = self._convolve("conv1", self.named("input.input").expand(len(z), -1, -1, -1), w, noise=0)
        img = self._colours("to_rgb1", x, w)
        for i, _ in enumerate(self.levels()):
            x = self._convolve(f"convs.{2 * i}", x, w, noise=2 * i + 1, up=True)
            x = self._convolve(f"convs.{2 * i + 1}", x, w, noise=2 * i + 2)
            img = resample(img, filters(4), 2, 1, 2, 1) + self._colours(f"to_rgbs.{i}", x, w)
        return img

    def _styled(self, name: str, inputs: int, outputs: int, dim: int) -> None:
        self.put(f"{name}.conv.weight", torch.randn(1, outputs, inputs, 3, 3))
        self.put(f"{name}.conv.modulation.weight", torch.randn(inputs, dim))
        self.put(f"{name}.conv.modulation.bias", 1 + 0.1 * torch.randn(inputs))
        self.put(f"{name}.noise.weight", torch.randn(1))
        self.put(f"{name}.activate.bias", torch.randn(outputs))

    def _to_rgb(self, name: str, inputs: int, dim: int) -> None:
        self.put(f"{name}.bias", torch.randn(1, 3, 1, 1))
        self.put(f"{name}.conv.weight", torch.randn(1, 3, inputs, 1, 1))
        self.put(f"{name}.conv.modulation.weight", torch.randn(inputs, dim))
        self.put(f"{name}.conv.modulation.bias", 1 + 0.1 * torch.randn(inputs))

    def _modulated(self, name: str, w: Tensor, demodulate: bool) -> Tensor:
        """Return each sample's weight, Eq. 1 to 3."""
        weight = self.named(f"{name}.conv.weight")
        style = self.linear(f"{name}.conv.modulation", w)
        weight = weight * style[:, None, :, None, None] / math.sqrt(weight[0, 0].numel())
        if demodulate:
            weight = weight * torch.rsqrt(weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        return weight

    def _convolve(self, name: str, x: Tensor, w: Tensor, noise: int, up: bool = False) -> Tensor:
        weights = self._modulated(name, w, demodulate=True)
        if up:
            each = [F.conv_transpose2d(x[n : n + 1], k.transpose(0, 1), stride=2) for n, k in enumerate(weights)]
            x = resample(torch.cat(each), filters(4), 1, 1, 1, 1)
        else:
            x = torch.cat([F.conv2d(x[n : n + 1], k, padding=1) for n, k in enumerate(weights)])
        x = x + self.named(f"{name}.noise.weight") * self.named(f"noises.noise_{noise}")
        return _lrelu(x, self.named(f"{name}.activate.bias"))

    def _colours(self, name: str, x: Tensor, w: Tensor) -> Tensor:
        weights = self._modulated(name, w, demodulate=False)
        rgb = torch.cat([F.conv2d(x[n : n + 1], k) for n, k in enumerate(weights)])
        return rgb + self.named(f"{name}.bias")


class RosinalityDiscriminator(_Holder):
    """img [N, 3, size, size] to logits [N, 1]; minibatch stddev in groups of 4."""

    def __init__(self, size: int, channels: Mapping[int, int]) -> None:
        super().__init__()
        self.blocks = size.bit_length() - 3
        self._conv("convs.0.0", "convs.0.1", 3, channels[size], 1)
        for i in range(1, self.blocks + 1):
            here, below = channels[size >> (i - 1)], channels[size >> i]
            self._conv(f"convs.{i}.conv1.0", f"convs.{i}.conv1.1", here, here, 3)
            self._conv(f"convs.{i}.conv2.1", f"convs.{i}.conv2.2", here, below, 3)
            self.put(f"convs.{i}.conv2.0.kernel", filters(), buffer=True)
            self.put(f"convs.{i}.skip.0.kernel", filters(), buffer=True)
            self.put(f"convs.{i}.skip.1.weight", torch.randn(below, here, 1, 1))
        top = channels[4]
        self._conv("final_conv.0", "final_conv.1", top + 1, top, 3)
        for i, (inputs, outputs) in enumerate([(top * 16, top), (top, 1)]):
            self.put(f"final_linear.{i}.weight", torch.randn(outputs, inputs))
            self.put(f"final_linear.{i}.bias", torch.randn(outputs))

    def forward(self, img: Tensor) -> Tensor:
        x = _lrelu(self._convolved("convs.0.0", img), self.named("convs.0.1.bias"))
        for i in range(1, self.blocks + 1):
            skip = self._convolved(f"convs.{i}.skip.1", resample(x, filters(), 1, 1, 1, 1), stride=2)
            x = _lrelu(self._convolved(f"convs.{i}.conv1.0", x, padding=1), self.named(f"convs.{i}.conv1.1.bias"))
            x = self._convolved(f"convs.{i}.conv2.1", resample(x, filters(), 1, 1, 2, 2), stride=2)
            x = (_lrelu(x, self.named(f"convs.{i}.conv2.2.bias")) + skip) / math.sqrt(2)
        groups = x.unflatten(0, (4, -1))  # image n is in group n mod (N / 4)
        stddev = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))
        x = torch.cat([x, stddev.repeat(4).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)], dim=1)
        x = _lrelu(self._convolved("final_conv.0", x, padding=1), self.named("final_conv.1.bias"))
        x = F.leaky_relu(self.linear("final_linear.0", x.flatten(1)), _SLOPE) * math.sqrt(2)
        return self.linear("final_linear.1", x)

    def _conv(self, weight: str, bias: str, inputs: int, outputs: int, kernel: int) -> None:
        self.put(f"{weight}.weight", torch.randn(outputs, inputs, kernel, kernel))
        self.put(f"{bias}.bias", torch.randn(outputs))

    def _convolved(self, name: str, x: Tensor, **settings: int) -> Tensor:
        weight = self.named(f"{name}.weight")
        return F.conv2d(x, weight / math.sqrt(weight[0].numel()), **settings)


SMALL = {4: 8, 8: 8, 16: 4}
"""Channels of a small network, those of channel_base 64 and channel_max 8."""


def rosinality_checkpoint(size: int = 16, dim: int = 8, latent_avg: bool = True) -> dict[str, Any]:
    """Return a checkpoint as its training writes it; latent_avg as its conversion of TensorFlow's files adds it."""
    g_ema, g = (RosinalityGenerator(size, dim, 3, SMALL) for _ in range(2))
    d = RosinalityDiscriminator(size, SMALL)
    optimizer = torch.optim.Adam(d.parameters())
    sum(p.sum() for p in d.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    content = {"g": g.state_dict(), "d": d.state_dict(), "g_ema": g_ema.state_dict()}
    content |= {"g_optim": optimizer.state_dict(), "d_optim": optimizer.state_dict()}
    content["args"] = argparse.Namespace(size=size, channel_multiplier=2, lr=0.002, path="data.lmdb", wandb=False)
    return content | ({"latent_avg": torch.randn(dim)} if latent_avg else {})
