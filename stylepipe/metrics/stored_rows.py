"""Rows of a set of real images, kept on disk: taken once, whatever run asks for them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.files import atomic_path
from stylepipe.metrics.extraction import Rows
from stylepipe.parsing import one_line

logger = logging.getLogger(__name__)

_ABOUT = "about.json"


class StoredRows(Mapping[str, Tensor]):
    """Rows in a folder, each mapped from its file when it is asked for, and sent to a device.

    Raises:
        UserError: a file is damaged.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._files = {path.stem: path for path in sorted(folder.glob("*.npy"))}
        self._device = device
        for path in self._files.values():
            _mapped(path)

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(_mapped(self._files[name])).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def store_rows(folder: Path, rows: Rows, about: Mapping[str, Any]) -> None:
    """Write rows to a folder that appears when it is whole, one at a time, with what they depend on beside them.

    What cannot be written is warned of, and all rows are asked for nevertheless: other processes count on that.
    """
    left = list(rows)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder) as new:
            new.mkdir()
            while left:
                name = left.pop(0)
                np.save(new / f"{name}.npy", rows[name].cpu().numpy())
            (new / _ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        if not folder.exists():  # another run has not stored the same in this moment
            logger.warning("%s: cannot be written (%s); it is measured again the next time", folder, error.strerror)
    for name in left:
        rows[name]


def _mapped(path: Path) -> NDArray[Any]:
    try:
        # Copy on write: torch warns of arrays that cannot be written, and nothing writes here.
        rows: NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
        if rows.dtype.kind not in "iuf" or rows.dtype.itemsize > 8 or not rows.dtype.isnative or not rows.ndim:
            raise ValueError(f"holds {rows.dtype} {list(rows.shape)}")
    except Exception as error:  # NumPy takes a header apart as it would Python, and raises whatever that raises
        raise UserError(
            f"{path}: cannot be read ({one_line(error)}); remove {path.parent}, and it is measured again"
        ) from error
    return rows
