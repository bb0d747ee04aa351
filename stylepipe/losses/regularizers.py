"""Penalties on derivatives, logits and weights. Each keeps its graph, so that a loss made of it trains the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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
    return _squared_gradient(real_img, real_logits)


def r2_penalty(fake_img: Tensor, fake_logits: Tensor) -> Tensor:
    """Return ||dD(x)/dx||^2 per generated image (Mescheder et al. 2018, arXiv:1801.04406, Eq. 10, without gamma/2).

    Shapes are those of `r1_penalty`. `fake_img` is detached from G, for D alone is regularized.
    """
    return _squared_gradient(fake_img, fake_logits)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real_img: Tensor,
    fake_img: Tensor,
    u: Tensor,
    target: float = 1.0,
    one_sided: bool = False,
) -> Tensor:
    """Return (||dD(x)/dx|| - target)^2 / target^2 per x on the lines between real and generated images.

    Gulrajani et al. 2017, arXiv:1704.00028, Eq. 3 without lambda; divided by target^2 as in ProGAN (Karras et al.
    2017, arXiv:1710.10196), where targets other than 1 come from.

    Args:
        critic: maps x, [N, C, H, W] float32, to logits [N, 1] float32.
        real_img: [N, C, H, W] float32.
        fake_img: [N, C, H, W] float32.
        u: [N] float32, uniform in [0, 1), the share of the real image in x.
        target: norm of the gradient to hold, positive.
        one_sided: only norms above the target cost: max(0, ||dD(x)/dx|| - target)^2 (the paper's section 4; Petzka
            et al. 2017, arXiv:1709.08894).

    Returns:
        [N] float32, differentiable.
    """
    assert target > 0
    u = u.view(-1, *(1 for _ in real_img.shape[1:]))
    x = (u * real_img + (1 - u) * fake_img).detach().requires_grad_()
    excess = _root(_squared_gradient(x, critic(x))) - target
    if one_sided:
        excess = excess.relu()
    return excess.square() / target**2


def drift(real_logits: Tensor) -> Tensor:
    """Return D(x)^2, which keeps a critic's logits near 0 (Karras et al. 2017, arXiv:1710.10196, appendix A.1).

    The paper weighs it by 0.001.

    Args:
        real_logits: [N, 1] float32.

    Returns:
        [N, 1] float32.
    """
    return real_logits.square()


@torch.no_grad()
def clip_weights_(parameters: Iterable[Tensor], limit: float) -> None:
    """Clip every weight to [-limit, limit] after a critic's step (Arjovsky et al. 2017, arXiv:1701.07875, Algorithm 1).

    The paper's limit is 0.01.
    """
    assert limit > 0
    for parameter in parameters:
        parameter.clamp_(-limit, limit)


class HistoricalAverage:
    """Holds parameters near the mean of their past values (Salimans et al. 2016, arXiv:1606.03498, section 3.3).

    The mean is kept running: it is that of all past values, yet costs one copy of the parameters. Every method takes
    the same parameters in the same order.

    Args:
        parameters: of one network, on one device, float32.

    Attributes:
        state: `mean` [P] float32 of the P numbers in all parameters, and `count` [] int64 of the values in it. A
            checkpoint copies these tensors in place.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        mean = torch.zeros_like(_flat(parameters).detach())
        self.state: dict[str, Tensor] = {
            "mean": mean,
            "count": torch.zeros((), dtype=torch.int64, device=mean.device),
        }

    def penalty(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return ||theta - 1/t sum_i theta_i||^2, [] float32, differentiable; 0 before the first `update_`."""
        distance = (_flat(parameters) - self.state["mean"]).square().sum()
        return distance * (self.state["count"] > 0)

    @torch.no_grad()
    def update_(self, parameters: Sequence[Tensor]) -> None:
        """Take the parameters' values into the mean, without waiting for the device."""
        mean, count = self.state["mean"], self.state["count"]
        count.add_(1)
        mean.add_((_flat(parameters) - mean) / count)


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


def _squared_gradient(img: Tensor, logits: Tensor) -> Tensor:
    """Return ||dD(x)/dx||^2 per image, [N] float32. Images may have any shape [N, ...]."""
    (gradient,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
    return gradient.square().sum(dim=tuple(range(1, gradient.ndim)))


def _root(square: Tensor) -> Tensor:
    """Return the square root with derivatives of 0 at 0, where the root's are infinite and would turn into NaN."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in parameters])
