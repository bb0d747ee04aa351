"""What the two networks play for: pure functions of logits, one value per image."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def non_saturating_g(fake_logits: Tensor) -> Tensor:
    """Return -log sigmoid(D(G(z))), the generator's loss (Goodfellow et al. 2014, arXiv:1406.2661, section 3).

    Args:
        fake_logits: [N, 1] float32, D's logits of generated images.

    Returns:
        [N, 1] float32.
    """
    return softplus(-fake_logits)


def logistic_d_fake(fake_logits: Tensor) -> Tensor:
    """Return -log(1 - sigmoid(D(G(z)))), the discriminator's loss on generated images; [N, 1] float32."""
    return softplus(fake_logits)


def logistic_d_real(real_logits: Tensor) -> Tensor:
    """Return -log sigmoid(D(x)), the discriminator's loss on real images; [N, 1] float32."""
    return softplus(-real_logits)
