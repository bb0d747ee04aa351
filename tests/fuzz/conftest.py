"""Helpers of these tests can be imported, and hypothesis draws the same cases every time and keeps nothing."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, configuration, settings

sys.path.append(str(Path(__file__).parent))

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "stylepipe-hypothesis")
settings.register_profile(
    "stylepipe",
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # of what fails it looks for no smaller case: that takes minutes
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("stylepipe")
