"""Lets the tests of faults import what they share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for harness and others; pytest's importlib mode leaves it out
