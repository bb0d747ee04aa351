"""What varies with the resolution: channels, activation type, and the modules in use."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from stylepipe.errors import UserError

LOWEST_RES = 4
_HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Levels:
    """Channels and activation type of every resolution from 4 to `res`."""

    def __init__(
        self, res: int, channel_base: int, channel_max: int, half_levels: int, half_dtype: str | torch.dtype | None
    ) -> None:
        if res < LOWEST_RES or res & (res - 1):
            raise UserError(f"res {res}: expected a power of two from {LOWEST_RES} up, such as 256 or 1024")
        self.res = res
        self.resolutions = [2**i for i in range(2, res.bit_length())]
        self.channels = {r: min(channel_base // r, channel_max) for r in self.resolutions}
        if min(self.channels.values()) < 1:
            raise UserError(f"channel_base {channel_base}: leaves no channel at {res} px; expected at least {res}")
        name = half_dtype_name(half_dtype)
        if name is not None and name not in _HALF_DTYPES:
            raise UserError(f"half_dtype {name!r}: expected one of {', '.join(_HALF_DTYPES)}, or None for float32")
        half = self.resolutions[1:][-half_levels:] if half_levels > 0 and name is not None else []
        self.dtypes = {r: _HALF_DTYPES[name] if name and r in half else torch.float32 for r in self.resolutions}


def half_dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """Return the name that a network's JSON config holds for a type given either way."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype


def used_modules(
    network: nn.Module, resolutions: Iterable[int], res: int, rgb: str, shown: Collection[int]
) -> list[nn.Module]:
    """Return the parts of the blocks b4, b8, ... that an image of `res` pixels takes, in the order of `resolutions`.

    Those named `rgb`, toRGB or fromRGB, only of the resolutions in `shown`.
    """
    parts = [(r, *part) for r in resolutions if r <= res for part in network.get_submodule(f"b{r}").named_children()]
    return [part for r, name, part in parts if name != rgb or r in shown]
