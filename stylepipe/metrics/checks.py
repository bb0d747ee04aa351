"""What is asked of features before a metric is calculated from them."""

from __future__ import annotations

from torch import Tensor

from stylepipe.errors import UserError


def checked(name: str, features: Tensor, *, at_least: int, reason: str) -> Tensor:
    """Return features, [N, dim] of any float type, without their gradient; waits for the device.

    Args:
        name: what they are features of, such as `real`.
        features: what is checked.
        at_least: the least N.
        reason: what for, told with the error.

    Raises:
        UserError: fewer samples, or numbers that are not finite.
    """
    assert features.ndim == 2, features.shape
    check_count(name, len(features), at_least=at_least, reason=reason)
    check_finite(name, features.isfinite().all(dim=1), "images")
    return features.detach()


def checked_pair(real: Tensor, fake: Tensor, *, at_least: tuple[int, int], reason: str) -> tuple[Tensor, Tensor]:
    """Return both sets, checked, on the device of `fake`; `at_least` has the least N of either."""
    check_dims(real.shape[1], fake.shape[1])
    real = checked("real", real, at_least=at_least[0], reason=reason)
    return real.to(fake.device), checked("fake", fake, at_least=at_least[1], reason=reason)


def check_count(name: str, count: int, *, at_least: int, reason: str) -> None:
    """Raise UserError where a set has fewer samples than a metric needs."""
    if count < at_least:
        raise UserError(
            f"{name} features: of {count} images; expected at least {at_least} ({reason}); take more images"
        )


def check_dims(real: int, fake: int) -> None:
    """Raise UserError where two sets cannot be features of one network."""
    if real != fake:
        raise UserError(
            f"real features: {real} dimensions; expected {fake}, as fake features have; "
            "take both from one layer of one network"
        )


def check_finite(name: str, finite: Tensor, unit: str) -> None:
    """Raise UserError where not all of `finite` is true: [n] bool, of as many `unit` (images, dimensions)."""
    bad = finite.numel() - int(finite.sum())
    if bad:
        raise UserError(
            f"{name} features: not finite in {bad} of {finite.numel()} {unit}; expected finite numbers: "
            "look for NaN in the images and in the network that the features are of"
        )
