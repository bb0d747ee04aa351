"""Names of what a run leaves in its folder."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.txt"
STATS_FILE = "stats.jsonl"
METRICS_FILE = "metrics.jsonl"
GRIDS_FOLDER = "grids"
REAL_GRID = "real.png"
CLIPS_FOLDER = "clips"
EMA_FOLDER = "ema"
BEST_NETWORK = "network-best.safetensors"

# Not those of networks with an average made afterwards, which `stylepipe ema` may be writing now.
_HALF_FILE = re.compile(
    r"\.(\d{6,}\.\d{3}\.(png|gif|safetensors)|network-(best|\d{6,}\.\d{3})\.safetensors|real\.png"
    r"|config\.yaml|state\.json|log\.txt|stats\.jsonl|metrics\.jsonl)\.\d+\.tmp"
)
_NETWORK = re.compile(r"network-(\d{6,}\.\d{3})\.safetensors")


def clear_half_files(out: Path) -> None:
    """Delete half-written files of a run, which processes that were killed have left."""
    for path in out.rglob(".*.tmp"):
        if _HALF_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def kimg_name(images_seen: int) -> str:
    """Return the image counter as it stands in file names, which sort by it: 40,000 images are `000040.000`."""
    return f"{images_seen / 1000:010.3f}"


def network_file(images_seen: int) -> str:
    """Return the name of the network file of a moment."""
    return f"network-{kimg_name(images_seen)}.safetensors"


def network_files(out: Path) -> list[Path]:
    """Return the network files of a run by the images they have seen, ascending; not that of the best."""
    return sorted(path for path in out.glob("network-*.safetensors") if _NETWORK.fullmatch(path.name))


def images_seen_of(path: Path) -> int:
    """Return the image counter in the name of a network file, a grid or a clip."""
    kimg = path.name.removesuffix(path.suffix).rpartition("-")[2]
    return round(float(kimg) * 1000)
