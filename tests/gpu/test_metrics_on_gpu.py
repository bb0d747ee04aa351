"""Metrics on a CUDA device are those of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stylepipe.metrics.extraction import Team, Wanted, collect
from stylepipe.metrics.registry import metrics_named
from stylepipe.training.exact import full_float32

NAMES = ["swd", "msssim", "fd-random", "kid-random", "pr-random", "dc-random"]


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_is_that_of_the_cpu_even_where_tf32_is_allowed(name: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, 256, (64, 8, 8, 3), generator=generator, dtype=torch.uint8) for _ in range(2))
    real, fake = (images.repeat_interleave(4, 1).repeat_interleave(4, 2) for images in (real, fake))
    (metric,) = metrics_named([name], tmp_path)
    found = []
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    try:
        for device in (torch.device("cpu"), torch.device("cuda")):
            with full_float32(device):
                rows = []
                for images, is_real in ((real, True), (fake, False)):
                    extractor = metric.extraction.extractor(32, 0, is_real, device)
                    wanted = {"rows": Wanted(extractor, 64)}
                    placed = images.to(device)
                    taken = collect(lambda n, of=placed: of[list(n)], wanted, batch=16, team=Team(), device=device)
                    rows.append(taken["rows"])
                found.append(metric.result(*rows, 0, Team()))
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)
