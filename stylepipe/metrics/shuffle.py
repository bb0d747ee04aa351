"""Random orders of samples that depend on a seed alone, on no device and no version of NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def permutation(count: int, seed: int, number: int = 0) -> Tensor:
    """Return 0..count - 1 in random order, [count] int64 on the host; another one for each `number`.

    By the ranks of Philox's raw words: NumPy may change `Generator.permutation`, but not those (NEP 19).
    """
    key = np.array([seed % 2**64, number], dtype=np.uint64)
    return torch.from_numpy(np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable"))
