"""The pipeline at fixed quantiles against golden numbers (their rules: augment_draws.quantile)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from augment_draws import ALWAYS, quantile

from stylepipe.augment.ada import AdaPipeline
from stylepipe.augment.pipelines import NAMES, Strengths

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ada.npz", allow_pickle=False)
CASES = {case["name"]: case for case in json.loads(str(GOLDEN["cases"]))}


def test_the_file_holds_each_kind_at_two_quantiles() -> None:
    assert len(CASES) == 12
    on = {name for case in CASES.values() for name in NAMES if name in case}
    assert on == set(NAMES) - {"noise"}  # which is image-sized and has no quantile


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_case_is_met(name: str, memory_format: torch.memory_format, record_property) -> None:
    case = CASES[name]
    pipeline = AdaPipeline(Strengths(**{on: float(case.get(on, 0)) for on in NAMES}), 32)
    img = torch.tensor(GOLDEN["x"]).contiguous(memory_format=memory_format)
    result = pipeline(img, ALWAYS, *quantile(len(img), case["percentile"]))
    record_property("max_abs_error", float((result - torch.tensor(GOLDEN[name])).abs().max()))
    torch.testing.assert_close(result, torch.tensor(GOLDEN[name]), rtol=0, atol=1e-5)  # the issue asks for 1e-4
    assert result.is_contiguous(memory_format=memory_format)
