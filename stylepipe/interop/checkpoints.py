"""Other projects' checkpoints as networks of ours, whichever project."""

from __future__ import annotations

from pathlib import Path

from stylepipe.errors import UserError
from stylepipe.interop.foreign_file import read_foreign
from stylepipe.interop.imported import Imported
from stylepipe.interop.official import import_official
from stylepipe.interop.plain_data import RefusedError, shown
from stylepipe.interop.rosinality import import_rosinality

_IMPORTS = {"G_ema": import_official, "g_ema": import_rosinality}
_MAX_SHOWN_KEYS = 8


def import_checkpoint(path: str | Path) -> Imported:
    """Read NVIDIA's network file (.pkl) or rosinality's checkpoint (.pt). Nothing that stands in it is run.

    Args:
        path: of StyleGAN2's networks; what kind of file it is is seen from its content.

    Raises:
        UserError: it is damaged, of another kind, holds what is not admitted, or other networks.
    """
    content = read_foreign(path)
    try:
        if not isinstance(content, dict):
            raise RefusedError(f"holds a {type(content).__name__}; expected a dictionary with G_ema or g_ema")
        for key, build in _IMPORTS.items():
            if key in content:
                return build(content)
        keys = ", ".join(shown(str(key)) for key in list(content)[:_MAX_SHOWN_KEYS])
        raise RefusedError(
            f"a dictionary of {keys or 'nothing'}; expected one with G_ema (NVIDIA) or g_ema (rosinality)"
        )
    except (RefusedError, UserError) as error:
        raise UserError(f"{path}: {error}") from error
