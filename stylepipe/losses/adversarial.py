"""What the two networks play for: pure functions of logits, one value per image.

A logit is D's last output, positive for an image that looks real. `objective` gives the losses that belong together,
and what D's loss tells about how far apart real and generated images are.

l, l_r, l_f: logits; logits of real images; logits of generated images.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log

from torch import Tensor
from torch.nn.functional import log_softmax, relu, softplus

from stylepipe.errors import UserError

OBJECTIVES = ("minimax", "non-saturating", "wgan", "wgan-gp", "lsgan", "hinge", "relativistic", "ebgan")
_SMOOTHABLE = ("minimax", "non-saturating", "lsgan")


@dataclass(frozen=True)
class Divergence:
    """How far p, the distribution of real images, is from q, that of generated ones, as D's loss tells.

    `estimate` maps (real_logits, fake_logits), both [N, 1] float32, to [N, 1] float32. Over images
    that D was not trained on, its expectation is the divergence for the best of all D and less for any other: a lower
    bound, as good as D is. Two things lift it: a D that knows the training images by heart, and one that compares the
    images of a batch, which bounds the divergence of batches. `wasserstein` is in units of D's slope, which nothing
    holds at 1 exactly.
    """

    name: str
    estimate: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """Losses that see an image at a time. Each maps logits [N, 1] float32 to [N, 1] float32, to be minimized."""

    d_real: Callable[[Tensor], Tensor]
    """D's loss on logits of real images."""
    d_fake: Callable[[Tensor], Tensor]
    """D's loss on logits of generated images."""
    g: Callable[[Tensor], Tensor]
    """G's loss on logits of generated images."""
    divergence: Divergence
    """What D's loss bounds."""
    anchored: bool = True
    """0 separates real from generated, so that sign(D(x)) means something by itself."""


@dataclass(frozen=True)
class PairedObjective:
    """Losses of pairs: (real_logits, fake_logits), both [N, 1] float32, to [N, 1] float32, to be minimized."""

    d: Callable[[Tensor, Tensor], Tensor]
    """D's loss."""
    g: Callable[[Tensor, Tensor], Tensor]
    """G's loss."""
    divergence: Divergence
    """What D's loss bounds."""
    anchored: bool = False
    """Whether sign(D(x)) means something by itself. Here only differences do."""


def objective(name: str, *, real_label: float = 1.0, margin: float = 10.0) -> Objective | PairedObjective:
    """Return the losses called `name`, one of OBJECTIVES.

    `wgan` and `wgan-gp` share them: they differ in what keeps D Lipschitz (`regularizers.clip_weights_`,
    `regularizers.gradient_penalty`).

    Args:
        name: which.
        real_label: D's target for real images, 1 or a little less: one-sided label smoothing (Salimans et al. 2016,
            arXiv:1606.03498, section 3.4, has 0.9). The target for generated images stays: smoothed as well, D would
            be content with samples far from all data, and G with leaving them there.
        margin: of `ebgan`, the energy above which D leaves generated images alone; others ignore it.

    Raises:
        UserError: an unknown name, a label or margin out of range, or a label for losses without one.
    """
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--loss {name}: unknown; expected one of {', '.join(OBJECTIVES)}{hint}")
    if not 0.5 < real_label <= 1:
        raise UserError(
            f"--loss.real-label {real_label}: expected a number above 0.5, where real and generated would be alike, "
            "up to 1 (no smoothing); try 0.9"
        )
    if real_label != 1 and name not in _SMOOTHABLE:
        raise UserError(
            f"--loss.real-label {real_label}: --loss {name} has no label to smooth; leave it at 1, "
            f"or choose one of --loss {', '.join(_SMOOTHABLE)}"
        )
    match name:
        case "minimax" | "non-saturating":
            d_real = logistic_d_real if real_label == 1 else partial(smoothed_d_real, real_label=real_label)
            g = minimax_g if name == "minimax" else non_saturating_g
            return Objective(d_real, logistic_d_fake, g, Divergence("jensen_shannon", jensen_shannon))
        case "wgan" | "wgan-gp":
            critic = Divergence("wasserstein", wasserstein)
            return Objective(wasserstein_real, wasserstein_fake, wasserstein_real, critic, anchored=False)
        case "lsgan":
            real = partial(least_squares, target=2 * real_label - 1)
            fake = partial(least_squares, target=-1.0)
            return Objective(real, fake, real, Divergence("triangular", triangular))
        case "hinge":
            return Objective(
                hinge_d_real, hinge_d_fake, wasserstein_real, Divergence("total_variation", hinge_variation)
            )
        case "relativistic":
            return PairedObjective(relativistic_d, relativistic_g, Divergence("relativistic", relativistic))
        case _:
            if not 0 < margin < float("inf"):
                raise UserError(f"--loss.margin {margin}: expected a positive number; try 10")
            # Not anchored: energies lie between 0 and the margin, and an undecided D may give any of them. A logit of
            # 0 is the energy ln 2, next to the end for real images, not the middle.
            d_fake, variation = partial(energy_d_fake, margin=margin), partial(energy_variation, margin=margin)
            return Objective(energy, d_fake, energy, Divergence("total_variation", variation), anchored=False)


# The logistic game: D maximizes log sigmoid(l_r) + log(1 - sigmoid(l_f)) (Goodfellow et al. 2014, arXiv:1406.2661,
# Eq. 1). Its best D has l = log(p_data / p_G).


def minimax_g(fake_logits: Tensor) -> Tensor:
    """Return log(1 - sigmoid(D(G(z)))), the generator's loss in the zero-sum game (Eq. 1).

    Its gradient vanishes (saturates) where D is sure, which is where G has most to learn.

    Args:
        fake_logits: [N, 1] float32, D's logits of generated images.

    Returns:
        [N, 1] float32.
    """
    return -softplus(fake_logits)


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


def smoothed_d_real(real_logits: Tensor, real_label: float) -> Tensor:
    """Return -a log sigmoid(D(x)) - (1 - a) log(1 - sigmoid(D(x))) with a = `real_label`; [N, 1] float32.

    One-sided label smoothing (Salimans et al. 2016, arXiv:1606.03498, section 3.4). The best D becomes
    a p_data / (p_data + p_G), which a logit of 0 still separates, at p_G = (2 a - 1) p_data.
    """
    return real_label * softplus(-real_logits) + (1 - real_label) * softplus(real_logits)


def jensen_shannon(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return an estimate of JS(p, q), from 0 to log 2: D's value is at most 2 JS - log 4 (Theorem 1); [N, 1] float32.

    Of unsmoothed labels, whichever D was trained with.
    """
    return log(2) - (logistic_d_real(real_logits) + logistic_d_fake(fake_logits)) / 2


# The Wasserstein-1 distance: D maximizes l_r - l_f among Lipschitz functions (Arjovsky et al. 2017, arXiv:1701.07875,
# Eq. 2). A constant added to D changes nothing, so that 0 is no boundary.


def wasserstein_real(logits: Tensor) -> Tensor:
    """Return -D(x): of the critic on real images, and of G on generated ones; [N, 1] float32."""
    return -logits


def wasserstein_fake(fake_logits: Tensor) -> Tensor:
    """Return D(G(z)), the critic's loss on generated images; [N, 1] float32."""
    return fake_logits


def wasserstein(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return D(x) - D(G(z)): in expectation at most K times the distance, for a D of Lipschitz constant K; [N, 1]."""
    return real_logits - fake_logits


def least_squares(logits: Tensor, target: float) -> Tensor:
    """Return (D(x) - target)^2 / 2, every loss of LSGAN (Mao et al. 2017, arXiv:1611.04076, Eq. 2).

    Targets are those of the paper's Eq. 9 (G aims at D's target for real images, c = b), recoded from 0 and 1 to
    a = -1 for generated and b = c = 1 for real images, so that 0 is the boundary. This only moves and doubles D's
    output. A smoothed label moves b and c together.

    Args:
        logits: [N, 1] float32.
        target: what D, or G through it, aims at.

    Returns:
        [N, 1] float32.
    """
    return (logits - target).square() / 2


def triangular(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return an estimate of the triangular discrimination, the integral of (p - q)^2 / (p + q), from 0 to 2; [N, 1].

    At the best D, (p - q) / (p + q), D's loss is 1 less half of it. (It is the Pearson divergence of Mao et al.'s
    Eq. 8, written without the mixture.)
    """
    return 2 - 2 * (least_squares(real_logits, 1.0) + least_squares(fake_logits, -1.0))


# The hinge game (Lim and Ye 2017, arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957, Eq. 16 and 17): D ignores
# images beyond a margin of 1 on their right side of 0. G minimizes -D(G(z)), `wasserstein_real`.


def hinge_d_real(real_logits: Tensor) -> Tensor:
    """Return max(0, 1 - D(x)), the discriminator's loss on real images; [N, 1] float32."""
    return relu(1 - real_logits)


def hinge_d_fake(fake_logits: Tensor) -> Tensor:
    """Return max(0, 1 + D(G(z))), the discriminator's loss on generated images; [N, 1] float32."""
    return relu(1 + fake_logits)


def hinge_variation(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return an estimate of the total variation, half the integral of |p - q|, from 0 to 1; [N, 1] float32.

    At the best D, sign(p - q), D's loss is twice the integral of min(p, q) (Lim and Ye 2017, arXiv:1705.02894).
    """
    return 1 - (hinge_d_real(real_logits) + hinge_d_fake(fake_logits)) / 2


# The relativistic pairing game, RpGAN (Jolicoeur-Martineau 2018, arXiv:1807.00734; Huang et al. 2024,
# arXiv:2501.05441, Eq. 2, non-saturating): is this real image more real than this generated one?


def relativistic_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return -log sigmoid(D(x) - D(G(z))), the discriminator's loss on pairs; [N, 1] float32."""
    return softplus(fake_logits - real_logits)


def relativistic_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return -log sigmoid(D(G(z)) - D(x)), the generator's loss on pairs; [N, 1] float32."""
    return softplus(real_logits - fake_logits)


def relativistic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return an estimate of the paired relativistic divergence, from 0 to 2 log 2; [N, 1] float32.

    Jolicoeur-Martineau 2019, arXiv:1901.02474: sup_D 2 E[f(D(x) - D(G(z)))] with f(t) = log sigmoid(t) + log 2.
    """
    return 2 * (log(2) - relativistic_d(real_logits, fake_logits))


# The energy game, EBGAN (Zhao et al. 2016, arXiv:1609.03126, Eq. 1 and 2).


def energy(logits: Tensor) -> Tensor:
    """Return E(x) = log(1 + e^-D(x)) >= 0: D's loss on real images, and G's on generated ones; [N, 1] float32.

    The paper's energy is an autoencoder's error. This one serves any D. It must be bounded below: with E = -D(x),
    the energy of real images could fall without end, and pay for any energy of generated ones.
    """
    return softplus(-logits)


def energy_d_fake(fake_logits: Tensor, margin: float) -> Tensor:
    """Return max(0, margin - E(G(z))), the discriminator's loss on generated images; [N, 1] float32."""
    return relu(margin - energy(fake_logits))


def energy_variation(real_logits: Tensor, fake_logits: Tensor, margin: float) -> Tensor:
    """Return an estimate of the total variation, from 0 to 1; [N, 1] float32.

    At the best D, whose energy is 0 where p > q and the margin elsewhere, D's loss is the margin times the integral of
    min(p, q) (Zhao et al. 2016, Lemma 1).
    """
    return 1 - (energy(real_logits) + energy_d_fake(fake_logits, margin)) / margin


# SAN (Takida et al. 2023, arXiv:2301.12811): with a last layer of unit norm, D(x) = <w, h(x)>. The losses above train
# h by <stopgrad(w), h>; the Wasserstein loss of the `direction` <w, stopgrad(h)> trains w, whichever they are.


def san_d_real(direction: Tensor) -> Tensor:
    """Return -<w, stopgrad(h(x))>, added to D's loss on real images; [N, 1] float32."""
    return wasserstein_real(direction)


def san_d_fake(direction: Tensor) -> Tensor:
    """Return <w, stopgrad(h(G(z)))>, added to D's loss on generated images; [N, 1] float32."""
    return wasserstein_fake(direction)


def feature_matching(real_features: Tensor, fake_features: Tensor) -> Tensor:
    """Return ||mean f(x) - mean f(G(z))||^2, a loss of G (Salimans et al. 2016, arXiv:1606.03498, section 3.1).

    Means are those of the images given: smaller micro-batches compare noisier ones.

    Args:
        real_features: [N, F] float32, of an intermediate layer of D.
        fake_features: [N, F] float32, of the same layer.

    Returns:
        [] float32.
    """
    return (real_features.mean(dim=0) - fake_features.mean(dim=0)).square().sum()


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
