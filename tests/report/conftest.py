"""Lets the tests of the report import what they share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for made_runs; pytest's importlib mode leaves it out
