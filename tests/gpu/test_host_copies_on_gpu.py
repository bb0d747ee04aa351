"""Copies of a state in the host's memory: of the moment, whatever the device does to the tensors behind them."""

from __future__ import annotations

import pytest
import torch

from stylepipe.training.host_copies import HostCopies

GPU = torch.device("cuda")


@pytest.mark.parametrize("pinned", [True, False])
def test_copies_are_of_the_moment_that_they_were_taken(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pinned:  # as where a container allows no page-locked memory
        empty = torch.empty

        def refused(*size: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
            if pin_memory:
                raise RuntimeError("CUDA error: out of memory")
            return empty(*size, **options)  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(torch, "empty", refused)
    weights = torch.arange(1 << 22, dtype=torch.float32, device=GPU)
    image = torch.arange(24.0, device=GPU).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    copies, busy = HostCopies(), torch.randn(4096, 4096, device=GPU)
    for round_ in range(3):
        for _ in range(20):  # the copies queue up behind this
            busy = busy @ busy
            busy /= busy.norm()
        taken = copies.take({"weights": weights, "image": image})
        weights.add_(1)  # and this behind the copies
        image.mul_(2)
        copies.wait()
        assert taken["weights"].is_pinned() == pinned
        assert torch.equal(taken["weights"], torch.arange(1 << 22, dtype=torch.float32) + round_)
        assert taken["image"].is_contiguous()
        assert torch.equal(taken["image"], torch.arange(24.0).view(1, 2, 3, 4) * 2**round_)
