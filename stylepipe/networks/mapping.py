"""The mapping network: latents and labels to styles.

Karras et al. 2019, arXiv:1812.04948, section 2.
"""

from __future__ import annotations

import torch
from torch import nn

from stylepipe.errors import UserError
from stylepipe.networks.layers import Linear, normalize_second_moment

_LR_MULTIPLIER = 0.01


class MappingNetwork(nn.Module):
    """Maps z and c to `num_ws` copies of one w; `num_ws` None gives w itself, and no running mean of it.

    `w_avg` [w_dim] is the centre of truncation. `class_w_offset` [c_dim, w_dim], where the network keeps mean styles of
    classes, is how far the mean of each class lies from it: w_avg + c class_w_offset is the centre of label c. They are
    not touched here: the trainer updates them from statistics that are averaged over all processes.
    """

    w_avg: torch.Tensor
    class_w_offset: torch.Tensor | None

    def __init__(
        self, z_dim: int, c_dim: int, w_dim: int, num_ws: int | None, num_layers: int = 8, class_w_avg: bool = False
    ) -> None:
        super().__init__()
        if class_w_avg and c_dim == 0:
            raise UserError("class_w_avg: expected a network with labels, found c_dim 0")
        self.z_dim = z_dim
        self.c_dim = c_dim
        self.num_ws = num_ws
        self.num_layers = num_layers
        if c_dim > 0:
            self.embed = Linear(c_dim, w_dim)
        features = z_dim + (w_dim if c_dim > 0 else 0)
        for i in range(num_layers):
            self.add_module(f"fc{i}", Linear(features, w_dim, act="lrelu", lr_multiplier=_LR_MULTIPLIER))
            features = w_dim
        if num_ws is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("class_w_offset", torch.zeros(c_dim, w_dim) if class_w_avg else None)

    def forward(
        self,
        z: torch.Tensor | None,
        c: torch.Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        class_centers: bool = True,
    ) -> torch.Tensor:
        """Return ws [N, num_ws, w_dim] float32, or w [N, w_dim] where num_ws is None.

        Args:
            z: [N, z_dim] float32 normal; None where z_dim is 0.
            c: [N, c_dim] float32, one-hot or any vector; ignored where c_dim is 0.
            truncation_psi: 1 for none, 0 for the mean style (section 2.1 and appendix B).
            truncation_cutoff: number of leading ws that are truncated; None for all.
            class_centers: truncate towards the mean style of the class where the network keeps it, not of all images.
        """
        parts = []
        if self.z_dim > 0:
            assert z is not None
            parts.append(normalize_second_moment(z.float()))
        if self.c_dim > 0:
            if c is None:
                raise ValueError(f"c: a network with {self.c_dim} labels needs c [N, {self.c_dim}], found None")
            parts.append(normalize_second_moment(self.embed(c.float())))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for i in range(self.num_layers):
            x = self.get_submodule(f"fc{i}")(x)
        if self.num_ws is None:
            return x
        ws = x[:, None].expand(-1, self.num_ws, -1)
        if truncation_psi == 1:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        center = self.w_avg
        if class_centers and self.class_w_offset is not None:
            assert c is not None
            center = (center + c.float() @ self.class_w_offset)[:, None]
        return torch.cat([center.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], dim=1)
