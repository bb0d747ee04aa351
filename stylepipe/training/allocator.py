"""Let glibc keep freed memory: on a CPU, page faults of large activations cost more than the arithmetic on them."""

from __future__ import annotations

import ctypes
import platform

# Names and numbers from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to reuse large blocks instead of returning them to the system; True if it does.

    Elsewhere (musl, macOS) nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = [(_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * 2**20)]
    accepted = [mallopt(name, value) == 1 for name, value in settings]
    return all(accepted)
