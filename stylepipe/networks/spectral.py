"""Spectral normalisation of a discriminator's layers.

Miyato et al. 2018, arXiv:1802.05957: each weight, as a matrix [out, in * kh * kw], is divided by its largest singular
value (Eq. 8), estimated by power iteration (Alg. 1); its gradient is that of the quotient (Eq. 10).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from stylepipe.errors import UserError
from stylepipe.networks.layers import Conv2d, Equalized, Linear

_INITIAL_ITERATIONS = 15
_LAYERS = (Conv2d, Linear, nn.Conv2d, nn.Linear)


class SpectralNorm(nn.Module):
    """Parametrization of a layer's `weight` that gives what then acts on x a largest singular value of 1.

    That is the stored weight, times the gain that a layer with equalized learning rate applies. No forward pass changes
    u and v: processes must agree on them, and a graph differentiated twice must be of one function. The trainer calls
    `update_` once per step of D.

    Attributes:
        u, v: [out] and [in * kh * kw], the singular vectors as far as they are known.
    """

    u: torch.Tensor
    v: torch.Tensor

    def __init__(self, layer: nn.Module, iterations: int = _INITIAL_ITERATIONS) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple: a submodule of its own submodule it cannot be
        self._gain = layer.gains()[0] if isinstance(layer, Equalized) else 1.0
        matrix = self._matrix().detach()
        self.register_buffer("u", torch.randn_like(matrix[:, 0]))
        self.register_buffer("v", torch.zeros_like(matrix[0]))
        for _ in range(iterations):
            self.update_()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the stored weight [out, in, ...] over its spectral norm u^T W v and over the layer's gain."""
        sigma = torch.dot(self.u, torch.mv(weight.flatten(1), self.v))
        return weight / (sigma * self._gain)

    @torch.no_grad()
    def update_(self) -> None:
        """Do one power iteration with the weight as it is now."""
        matrix = self._matrix()
        self.v.copy_(F.normalize(torch.mv(matrix.t(), self.u), dim=0))
        self.u.copy_(F.normalize(torch.mv(matrix, self.v), dim=0))

    def _matrix(self) -> torch.Tensor:
        """Return the stored weight as [out, in * kh * kw]; from the layer, which may have been moved meanwhile."""
        (layer,) = self._layer
        name = "parametrizations.weight.original" if parametrize.is_parametrized(layer, "weight") else "weight"
        return layer.get_parameter(name).flatten(1)


def add_spectral_norm_(module: nn.Module) -> None:
    """Normalise every convolution and fully connected layer of a discriminator, those of labels included.

    Raises:
        UserError: a layer starts from zeros, which no factor brings to a norm of 1.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _LAYERS)}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        if not weight.is_meta and not weight.any():
            raise UserError(
                f"spectral_norm: the weights of {name} start at zero, as those of R3GAN's residual branches do, and "
                "have no norm to divide by; choose another network or leave it out"
            )
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", SpectralNorm(layer))


def spectral_norms(module: nn.Module) -> list[SpectralNorm]:
    """Return the spectral normalisations in `module`, in their order there."""
    return [m for m in module.modules() if isinstance(m, SpectralNorm)]
