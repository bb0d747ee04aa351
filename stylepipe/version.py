"""Which code this is."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


@lru_cache
def code_version() -> str:
    """Return the version, and of a git checkout its commit: "0.1.0+g1a2b3c4", with ".dirty" if files have changed."""
    number = version("stylepipe")
    if not (_ROOT / ".git").exists():
        return number
    try:
        command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty=.dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of somebody else
        return number
    return f"{number}+g{found}"
