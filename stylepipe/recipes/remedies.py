"""Remedies that act on weights: bounds, and their mean over the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stylepipe.losses.regularizers import HistoricalAverage, clip_weights_
from stylepipe.networks.layers import Equalized
from stylepipe.networks.spectral import spectral_norms


class WeightBounds:
    """Keeps the weights of a discriminator within bounds, after each of its updates.

    Args:
        parts: of the discriminator; those that a stage of growth does not use are left alone.
        clip: keep every weight within +-clip (Arjovsky et al. 2017, arXiv:1701.07875, Algorithm 1); 0 for no such
            bound. Where scales are applied at run time, it is on what acts then.
    """

    def __init__(self, parts: Sequence[nn.Module], clip: float) -> None:
        self._spectral = [norm for part in parts for norm in spectral_norms(part)]
        self._limits: dict[float, list[nn.Parameter]] = {}
        for module in (module for part in parts for module in part.modules()) if clip > 0 else ():
            weight_gain, bias_gain = module.gains() if isinstance(module, Equalized) else (1.0, 1.0)
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:  # frozen, to be kept as it is
                    continue
                gain = bias_gain if name == "bias" else weight_gain
                self._limits.setdefault(clip / gain, []).append(parameter)

    def keep_(self) -> None:
        """Clip the weights, and let spectral normalization follow them."""
        for limit, parameters in self._limits.items():
            clip_weights_(parameters, limit)
        for norm in self._spectral:
            norm.update_()


class HistoricalAverages:
    """The historical average of each network.

    Attributes:
        state: tensors that resuming needs, by name.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self._parameters = {name: list(network.parameters()) for name, network in networks.items()}
        self._averages = {name: HistoricalAverage(parameters) for name, parameters in self._parameters.items()}
        self.state: dict[str, Tensor] = {
            f"history.{name}.{key}": tensor
            for name, average in self._averages.items()
            for key, tensor in average.state.items()
        }

    def penalty(self, name: str) -> Tensor:
        """Return the squared distance [] of a network's weights from their mean."""
        return self._averages[name].penalty(self._parameters[name])

    @torch.no_grad()
    def update_(self, name: str) -> None:
        """Let the mean follow a network's update."""
        self._averages[name].update_(self._parameters[name])
