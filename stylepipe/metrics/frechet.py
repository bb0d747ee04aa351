"""The Fréchet distance between Gaussians fitted to features, which is FID for features of Inception."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.metrics.checks import check_count, check_dims, check_finite


class Moments:
    """Count, sum and sum of outer products of features, gathered batch by batch in float64.

    Sums are taken about 0, so that those of several processes add up. That costs no accuracy with features of
    float32 or less: their products are exact in float64, and what cancels when the mean is large against the
    deviation is of the order of what their own rounding adds to the covariance.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        """Begin with no samples, of `dim` features each; sums are kept on `device`."""
        self._dim = dim
        self._state = torch.zeros(1 + dim + dim * dim, dtype=torch.float64, device=device)
        self._sum = self._state[1 : 1 + dim]  # views: what is added to one is added to the other
        self._products = self._state[1 + dim :].view(dim, dim)

    @classmethod
    def from_state(cls, state: Tensor) -> Moments:
        """Return what had this `state`, which is copied, on the same device.

        Raises:
            UserError: it is not a list of 1 + dim + dim^2 numbers.
        """
        dim = (isqrt(max(0, 4 * state.numel() - 3)) - 1) // 2
        if state.ndim != 1 or dim < 1 or state.numel() != 1 + dim + dim * dim:
            raise UserError(
                f"moments of features: found numbers of shape {list(state.shape)}; expected 1 + dim + dim^2 in a row: "
                "the count, the sum and the sum of outer products; store them again"
            )
        moments = cls(dim, state.device)
        moments._state.copy_(state.detach())
        return moments

    @property
    def state(self) -> Tensor:
        """All there is to know: count, sum, outer products; [1 + dim + dim^2] float64, itself and not a copy.

        It may be all-reduced by sum in place.
        """
        return self._state

    @property
    def dim(self) -> int:
        """How many features a sample has."""
        return self._dim

    @property
    def count(self) -> int:
        """How many samples there were; waits for the device."""
        return int(self._state[0])

    @property
    def mean(self) -> Tensor:
        """[dim] float64; NaN of no samples."""
        return self._sum / self._state[0]

    @property
    def covariance(self) -> Tensor:
        """[dim, dim] float64, over N - 1; NaN of fewer than two samples."""
        return (self._products - torch.outer(self._sum, self.mean)) / (self._state[0] - 1)

    def add(self, features: Tensor) -> None:
        """Take in samples: [n, dim] of any float type, on any device."""
        assert features.ndim == 2, features.shape
        assert features.shape[1] == self._dim, features.shape
        x = features.detach().to(self._state)
        self._state[0] += len(x)
        self._sum += x.sum(dim=0)
        self._products.addmm_(x.T, x)

    def merge(self, other: Moments) -> None:
        """Take in the samples that another has seen."""
        assert other.dim == self._dim, (other.dim, self._dim)
        self._state += other.state.to(self._state.device)


def frechet_distance(real: Moments, fake: Moments) -> float:
    """Return ||mu_r - mu_f||^2 + tr(S_r + S_f - 2 (S_r S_f)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, Eq. 6).

    With S = F F^T, the trace of the root is the sum of the singular values of F_r^T F_f: their squares are the
    eigenvalues of S_r S_f. Unlike roots of computed eigenvalues, where rounding of 1e-16 becomes 1e-8, these are as
    exact as the covariances, be they singular or not.

    The number falls with more samples: compare distances of equally many. Calculated on the device of `fake`.

    Raises:
        UserError: fewer than two samples, features that are not finite, or of different dimensions.
    """
    check_dims(real.dim, fake.dim)
    for name, moments in (("real", real), ("fake", fake)):
        check_count(name, moments.count, at_least=2, reason="a covariance")
        seen = moments.mean + moments.covariance.diagonal()  # a number that is not finite is in both
        check_finite(name, seen.isfinite(), "dimensions")
    if real.state.device != fake.state.device:
        real = Moments.from_state(real.state.to(fake.state.device))
    real_covariance, fake_covariance = real.covariance, fake.covariance
    traces = real_covariance.trace() + fake_covariance.trace()
    root = torch.linalg.svdvals(_factor(real_covariance, real.count).T @ _factor(fake_covariance, fake.count)).sum()
    distance = (real.mean - fake.mean).square().sum() + traces - 2 * root
    return max(0.0, float(distance))  # of two sets that are one, rounding may leave less


def _factor(covariance: Tensor, count: int) -> Tensor:
    """Return F with F F^T = `covariance`, [dim, rank] float64."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    # The covariance of N samples has rank N - 1: any more would be rounding, and its root 1e-8.
    rank = min(len(covariance), count - 1)
    return vectors[:, -rank:] * eigenvalues[-rank:].clamp(min=0).sqrt()
