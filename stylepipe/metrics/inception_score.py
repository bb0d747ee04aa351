"""How sure a classifier is of each generated image, and how many classes it finds among them."""

from __future__ import annotations

from itertools import pairwise
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from stylepipe.metrics.checks import checked
from stylepipe.metrics.shuffle import permutation


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits; from 1 to the number of classes."""

    mean: float
    std: float


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> InceptionScore:
    """Return exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv:1606.03498, section 4).

    p(y) is the mean of p(y|x) over a split, so that the score rises with the samples of each. The paper takes
    50,000 in all.

    Args:
        logits: [N, classes] of any float type, a classifier's of generated images; calculated on their device, in
            float64.
        splits: how many parts of equal size, but for one, the samples are divided into.
        seed: of the order in which they are divided, the same on every device.

    Raises:
        UserError: fewer samples than splits, or logits that are not finite.
    """
    assert splits > 0, splits
    logits = checked("fake", logits, at_least=splits, reason="one of each split")
    log_p = logits[permutation(len(logits), seed).to(logits.device)].double().log_softmax(dim=1)
    bounds = [len(logits) * split // splits for split in range(splits + 1)]
    scores = torch.stack([_score(log_p[a:b]) for a, b in pairwise(bounds)])
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)))


def _score(log_p: Tensor) -> Tensor:
    """Return the score of one split, [] float64, from log p(y|x), [n, classes] float64."""
    # The log of the mean from logs: the mean itself may be 0 in float64, and 0 (log 0 - log 0) is no number.
    log_marginal = log_p.logsumexp(dim=0) - log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp()
