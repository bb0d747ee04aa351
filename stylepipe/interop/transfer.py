"""A trained network's weights, taken over by one of another resolution or with other labels.

What both networks have is copied to the bit; what the source has not starts such that the network does at first what
the source did.

Resolution. A generator of the skip architecture grows by levels that add nothing to its image, which is at first the
source's, upsampled; a smaller one shows what the source's image was at that level. A discriminator grows by levels that
hand on the image downsampled (`_pass_on`), so D(img) is at first the source's D(downsample2d(img)), whatever the image
and the architecture. One of fewer levels has a fromRGB of its own, which is new where the architecture is not skip.

Labels, where they are not the source's. The styles and logits of every label are at first those of the source without
labels, or, of one with labels, of the mean over them: the generator takes the mean of the labels' embeddings, the
discriminator that of their projections. For a source of label vectors, its unit vectors stand for all labels. Mean
styles of classes that the source does not know start as that of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stylepipe.errors import UserError
from stylepipe.networks.layers import LRELU_SLOPE, Conv2d, Linear, normalize_second_moment
from stylepipe.networks.mapping import MappingNetwork
from stylepipe.networks.stylegan2 import Discriminator, DiscriminatorBlock, Generator

_OF_LABELS = ("mapping.", "b4.out.", "b4.aux.")  # parts of a discriminator that follow its labels
_PAIR = 1 + LRELU_SLOPE  # lrelu(x) - lrelu(-x) = (1 + slope) x


def check_resolution(generator: Mapping[str, Any], discriminator: Mapping[str, Any] | None, res: int) -> None:
    """See that networks of these settings can be taken over at resolution `res`.

    Args:
        generator, discriminator: `config` of the source's networks; None: without discriminator.

    Raises:
        UserError: the resolution changes and the generator's architecture is not skip: its image is made at the last
            level only, so that other levels have none to start from. Or a new level of the discriminator has too few
            feature maps to hand on an image.
    """
    before, architecture = generator["res"], generator["architecture"]
    if before != res and architecture != "skip":
        raise UserError(
            f"--res {res}: the generator to start from has {before} px and architecture {architecture}, where only the "
            f"last level makes an image, so that levels can be neither added nor left out; keep {before} px, or start "
            f"from one of architecture skip"
        )
    if discriminator is None or res <= before or discriminator["architecture"] == "skip":
        return
    channels = min(discriminator["channel_base"] // res, discriminator["channel_max"])
    if channels < (pairs := 2 * discriminator["img_channels"]):
        raise UserError(
            f"--res {res}: the discriminator to start from would have {channels} feature maps there, and needs {pairs} "
            f"to hand on the image (channel_base {discriminator['channel_base']}); keep to a lower resolution"
        )


@torch.no_grad()
def fill_generator(target: Generator, source: Generator, same_labels: bool) -> None:
    """Let `target` make the images that `source` makes.

    Args:
        target: freshly built, on the source's device; a res that `check_resolution` approves, c_dim and class_w_avg
            may be other than the source's, and what sets nothing but precision and clamps; changed.
        source: left as it is.
        same_labels: the labels of both mean the same, so everything of them is taken over as well.
    """
    _copy(target, source, () if same_labels else ("mapping.embed.", "mapping.fc0.", "mapping.class_w_offset"))
    for block in target.synthesis.blocks():
        if block.conv1.res > source.config["res"]:
            assert block.torgb is not None
            block.torgb.weight.zero_()
            block.torgb.bias.zero_()
    if not same_labels:
        _remake_labels(target.mapping, source.mapping)


@torch.no_grad()
def fill_discriminator(target: Discriminator, source: Discriminator, same_labels: bool) -> None:
    """Let `target` judge images as `source` does.

    Args:
        target: freshly built, on the source's device; a res that `check_resolution` approves, c_dim and conditioning
            may be other than the source's, and what sets nothing but precision, clamps and groups; changed.
        source: left as it is.
        same_labels: as for `fill_generator`.
    """
    same_head = same_labels and (target.mapping is None) == (source.mapping is None)
    _copy(target, source, () if same_head else _OF_LABELS)
    if not same_head:
        _remake_head(target, source)
        if same_labels and target.b4.aux is not None and source.b4.aux is not None:
            target.b4.aux.load_state_dict(source.b4.aux.state_dict())
    before = source.resolutions[-1]
    for res in target.resolutions:
        if res > before:
            features = source.get_submodule(f"b{before}").fromrgb if res == 2 * before else None
            assert features is None or isinstance(features, Conv2d)
            block = target.get_submodule(f"b{res}")
            assert isinstance(block, DiscriminatorBlock)
            if target.architecture == "skip":  # every level reads the image itself: the new one adds nothing to it
                for parameter in block.conv1.parameters():
                    parameter.zero_()
            else:
                _pass_on(block, features, target.config["img_channels"])


def _copy(target: nn.Module, source: nn.Module, left_out: tuple[str, ...]) -> None:
    """Copy every tensor that both networks have, but those whose names begin as one of `left_out`."""
    theirs = source.state_dict()
    for name, tensor in target.state_dict().items():
        if name in theirs and not name.startswith(left_out):
            assert tensor.shape == theirs[name].shape, (
                f"{name}: {list(tensor.shape)}, source {list(theirs[name].shape)}"
            )
            tensor.copy_(theirs[name])


def _remake_labels(target: MappingNetwork, source: MappingNetwork) -> None:
    """Make the styles of all labels what z alone makes of the source, or z and its mean embedding.

    The embedding is one more input of the first layer: its weights there are 0 at first, and what they got of the
    source's mean goes into the bias. The equalized learning rate divides by the root of the number of inputs, which
    another number of them changes: `applied` and `store_` make up for it.
    """
    first, before = target.get_submodule("fc0"), source.get_submodule("fc0")
    assert isinstance(first, Linear)
    assert isinstance(before, Linear)
    weight, bias = before.applied()
    of_z = weight[:, : source.z_dim]
    if source.c_dim > 0:
        embedded = normalize_second_moment(source.embed(torch.eye(source.c_dim, device=weight.device)))
        bias = bias + weight[:, source.z_dim :] @ embedded.mean(dim=0)
    new = torch.zeros_like(first.weight)
    new[:, : target.z_dim] = of_z
    first.store_(new, bias)


def _remake_head(target: Discriminator, source: Discriminator) -> None:
    """Make the logits of all labels the source's, or their mean over its labels.

    Logits are y m / sqrt(M), y [M] being the last layer's output and m the label's projection: linear in m, so their
    mean is that of the mean projection, and w, the last layer's rows summed with that as weights, gives it. For new
    labels all projections start as m = 1, by a last layer of the mapping with weights 0, and row k of the last layer as
    w / sqrt(M) + e_k. The e_k are random and sum to 0: without them all rows would be equal and stay so for ever.
    """
    weight, bias = source.b4.out.applied()
    if source.mapping is not None:
        labels = torch.eye(source.mapping.c_dim, device=weight.device)
        share = source.mapping(None, labels).mean(dim=0, keepdim=True) / len(weight) ** 0.5
        weight, bias = share @ weight, (share @ bias[:, None]).flatten()
    out = target.b4.out
    if target.mapping is not None:
        rows = len(out.weight)
        fresh, _ = out.applied()
        weight = weight / rows**0.5 + fresh - fresh.mean(dim=0)
        bias = (bias / rows**0.5).expand(rows)
        last = target.mapping.get_submodule(f"fc{target.mapping.num_layers - 1}")
        assert isinstance(last, Linear)
        last.store_(torch.zeros_like(last.weight), torch.ones_like(last.bias))
    out.store_(weight, bias)


def _pass_on(block: DiscriminatorBlock, features: Conv2d | None, img_channels: int) -> None:
    """Let a new level hand on the image, downsampled: as it comes, or as what the source's fromRGB made of it.

    An image passes leaky ReLUs unharmed in pairs of feature maps: lrelu(x) - lrelu(-x) = (1 + slope) x. So fromRGB
    gives +-x, the first convolution takes the differences at its centre and gives +-x again, and the second one, whose
    filter and centre together are downsample2d, gives either +-x to the next new level, or `features`. Feature maps
    beyond the pairs are random as ever, but not yet read.
    """
    signs = torch.cat([torch.eye(img_channels), -torch.eye(img_channels)]).to(block.conv0.weight.device)
    if block.fromrgb is not None:
        _mix(block.fromrgb, signs)
    _mix(block.conv0, signs @ signs.t() / _PAIR)
    if features is None:
        _mix(block.conv1, signs @ signs.t() / _PAIR, only=True)
    else:
        weight, bias = features.applied()
        _mix(block.conv1, weight.flatten(1) @ signs.t() / _PAIR, bias, only=True)
    if block.skip is not None:
        block.skip.weight.zero_()


def _mix(conv: Conv2d, matrix: torch.Tensor, bias: torch.Tensor | None = None, only: bool = False) -> None:
    """Let the first outputs of a convolution be `matrix` [out, in] times the first inputs, pixel by pixel, plus `bias`.

    With `only`, all other outputs are 0; else they stay as they are.
    """
    weight, biases = conv.applied()
    rows, columns = matrix.shape
    changed = slice(None) if only else slice(rows)
    weight[changed], biases[changed] = 0, 0
    centre = conv.weight.shape[2] // 2
    weight[:rows, :columns, centre, centre] = matrix
    if bias is not None:
        biases[:rows] = bias
    conv.store_(weight, biases)
