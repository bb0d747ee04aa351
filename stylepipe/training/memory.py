"""How much memory is in use and how much there is."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import psutil
import torch

GIB = 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has held on `device` (CPU: resident), in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB except on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error is an allocator's that got nothing; that of the CPU has no kind of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this machine or GPU has left; on a CPU also within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        cache = re.search(r"^inactive_file (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        in_use = int(used.read_text()) - (int(cache[1]) if cache else 0)  # cached files give way
        free = min(free, int(text) - in_use)
    return free
