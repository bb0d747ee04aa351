"""Random numbers as pure functions of (seed, purpose, position).

No generator carries state from one step to the next, so the draws of image number p are the same on
any number of processes and after any resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """Draws for the images at given positions of the training, on one device.

    Small draws come from NumPy's Philox on the host and are the same on every kind of device. Image-sized noise
    comes from the device's own generator, reseeded for each image.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self._generator = None if device.type == "meta" else torch.Generator(device)  # nothing is drawn there

    def normal(self, purpose: str, positions: Sequence[int], size: int) -> Tensor:
        """Return standard normal [N, size] float32."""
        rows = [self._philox(purpose, p).standard_normal(size, dtype=np.float32) for p in positions]
        return self.to_device(torch.from_numpy(np.stack(rows)))

    def uniform(self, purpose: str, positions: Sequence[int]) -> Tensor:
        """Return uniform numbers in [0, 1), [N] float32."""
        numbers = [self._philox(purpose, p).random(dtype=np.float32) for p in positions]
        return self.to_device(torch.from_numpy(np.array(numbers, dtype=np.float32)))

    def uniforms(self, purpose: str, positions: Sequence[int], size: int) -> Tensor:
        """Return uniform numbers in [0, 1), [N, size] float32; the first of a row is that of `uniform`."""
        rows = [self._philox(purpose, p).random(size, dtype=np.float32) for p in positions]
        return self.to_device(torch.from_numpy(np.stack(rows)))

    def integers(self, purpose: str, positions: Sequence[int], high: int) -> list[int]:
        """Return whole numbers in 0..high - 1, on the host."""
        return [int(self._philox(purpose, p).integers(high)) for p in positions]

    def image_noise(self, purpose: str, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return standard normal [N, *shape] float32, drawn on the device."""
        noise = torch.empty(len(positions), *shape, device=self.device)
        if self._generator is None:
            return noise
        for row, position in zip(noise, positions, strict=True):
            self._generator.manual_seed(_hash(self.seed, purpose, position))
            row.normal_(generator=self._generator)
        return noise

    def _philox(self, purpose: str, position: int) -> np.random.Generator:
        # The position stands in the third word of the counter: 2^128 numbers belong to each image.
        key = np.array([self.seed, _hash(purpose)], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position, 0]))

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the host on the device, without waiting for it."""
        if self.device.type == "cuda":  # from pinned memory the copy does not wait for the device
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def _hash(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds below 2^63
