"""Penalties on derivatives. Each keeps its graph, so that a loss made of it trains the network."""

from __future__ import annotations

import torch
from torch import Tensor


def r1_penalty(real_img: Tensor, real_logits: Tensor) -> Tensor:
    """Return ||dD(x)/dx||^2 per real image (Mescheder et al. 2018, arXiv:1801.04406, Eq. 9, without gamma/2).

    Args:
        real_img: [N, C, H, W] float32 that requires grad.
        real_logits: [N, 1] float32, computed from `real_img`.

    Returns:
        [N] float32, differentiable.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_img, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3))


def path_lengths(img: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """Return ||J_w^T y|| per image (Karras et al. 2020, arXiv:1912.04958, Eq. 4).

    The norm is taken over w_dim and its square averaged over the layers. y, `noise` divided by
    sqrt(H * W), makes the length independent of resolution.

    Args:
        img: [N, C, H, W] float32, generated from `ws`.
        ws: [N, num_ws, w_dim] float32 that requires grad.
        noise: [N, C, H, W] float32, standard normal.

    Returns:
        [N] float32, differentiable.
    """
    resolution = (img.shape[2] * img.shape[3]) ** 0.5
    (gradient,) = torch.autograd.grad((img * noise).sum() / resolution, ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()
