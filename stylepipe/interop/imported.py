"""What an import gives, and what all imports infer alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from stylepipe.interop.plain_data import RefusedError
from stylepipe.networks.stylegan2 import Generator


@dataclass
class Imported:
    """The networks of another project's checkpoint as ours: float32, on the CPU."""

    origin: str
    """Whose checkpoint it is."""
    G_ema: Generator
    """The averaged generator, with w_avg."""
    beside: dict[str, nn.Module] = field(default_factory=dict)
    """G and D, where the file has them."""
    license: str | None = None
    """What the file itself says; None: nothing."""
    derived_from: str | None = None
    """What the file itself says; None: nothing."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, a line each."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What shall stand in the header of the network file beside the licence."""


def channel_settings(
    channels: Mapping[int, int], channel_base: int | None = None, channel_max: int | None = None
) -> tuple[int, int]:
    """Return channel_base and channel_max of which min(channel_base / r, channel_max) gives these widths.

    Args:
        channels: of the weights, by resolution.
        channel_base, channel_max: what the checkpoint says, None where it says nothing. Widths alone leave them open
            where all resolutions have the same.

    Raises:
        RefusedError: no two numbers give these widths, or not those that the checkpoint says.
    """
    widest = max(channels.values()) if channel_max is None else channel_max
    if channel_base is None:
        narrower = [r * width for r, width in channels.items() if width < widest]
        channel_base = max(narrower) if narrower else max(channels) * widest
    if any(min(channel_base // r, widest) != width for r, width in channels.items()):
        found = ", ".join(f"{width} at {r} px" for r, width in channels.items())
        raise RefusedError(
            f"widths {found}: expected min(channel_base / resolution, channel_max), here with channel_base "
            f"{channel_base} and channel_max {widest}"
        )
    return channel_base, widest
