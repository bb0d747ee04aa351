"""What the two networks play for: pure functions of logits, one value per image."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax, softplus


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


def auxiliary_classification(class_logits: Tensor, c: Tensor) -> Tensor:
    """Return -log P(C = c | x), the term of both networks in an auxiliary classifier GAN.

    Odena et al. 2016, arXiv:1610.09585, Eq. 3: D and G both maximize the log-likelihood of the right class, of real
    images (D) and of generated ones (both).

    Args:
        class_logits: [N, c_dim] float32, the classifier's logits of the images.
        c: [N, c_dim] float32, their classes, one-hot.

    Returns:
        [N, 1] float32.
    """
    return -(log_softmax(class_logits, dim=1) * c).sum(dim=1, keepdim=True)
