"""What a growing network is at a stage: a smaller network, which files hold."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from stylepipe.training.growth import Stage


@torch.no_grad()
def grown_so_far(network: nn.Module, stage: Stage) -> nn.Module:
    """Return the network of the stage's resolution, itself where it is the full one, for its tensors to be saved.

    They are those of the network, nothing is copied.

    A generator whose newest level is being faded in shows it by as much: its config says so.
    """
    config: dict[str, Any] = cast(Any, network).config
    full = config["res"]
    if stage.resolution == full and not stage.fading:
        return network
    missing = full.bit_length() - stage.resolution.bit_length()
    smaller = config | {"res": stage.resolution, "half_levels": max(0, config["half_levels"] - missing)}
    if stage.fading and "z_dim" in config:
        smaller["alpha"] = stage.alpha
    with torch.device("meta"):
        grown: nn.Module = type(network)(**smaller)
    theirs = network.state_dict()
    grown.load_state_dict({name: theirs[name] for name in grown.state_dict()}, assign=True)
    return grown.train(network.training).requires_grad_(False)
