"""Lets the tests of augmentations import what they share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for augment_draws; pytest's importlib mode leaves it out
