"""What `--class` and `--label` of `stylepipe sample` stand for, given what the network file says of its labels."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from stylepipe.errors import UserError
from stylepipe.interop.network_file import classes_of
from stylepipe.parsing import one_line

ALL = "all"

_NAMED = 8  # class names that a message lists
_MAX_DIGITS = 20  # of a class number


def labels_to_draw(
    path: Path, c_dim: int, metadata: Mapping[str, str], class_name: str | None, label: str | None
) -> Tensor | None:
    """Return the labels asked for, [n, c_dim] float32: one, or of all classes; None for a network without labels.

    Args:
        path: of the network file, for messages.
        c_dim: label dimensions of the network.
        metadata: of the file, see `classes_of`; where it has no names, numbers do.
        class_name: `--class`, a name, a number or all. A name wins over a number.
        label: `--label`, numbers with commas between.

    Raises:
        UserError: an option is missing, does not belong to such a network, or names no label of it.
    """
    if c_dim == 0:
        for option, value in (("--class", class_name), ("--label", label)):
            if value is not None:
                raise UserError(f"{option} {value}: this network was trained without labels; leave {option} out")
        return None
    if class_name is not None and label is not None:
        raise UserError(f"--label {label}: there is --class {class_name} already; give one of them")
    if label is not None:
        return _vector(label, c_dim)
    names, vectors = classes_of(path, metadata, c_dim)
    if vectors:
        found = "--label missing" if class_name is None else f"--class {class_name}"
        example = ",".join(["0.1", "-0.7", "0.4"][:c_dim] + ["..."] * (c_dim > 3))
        raise UserError(f"{found}: this network draws labels of {c_dim} numbers; give them as --label {example}")
    if class_name == ALL:
        return torch.eye(c_dim)
    return one_hot(torch.tensor([_number(class_name, names, c_dim)]), c_dim).float()


def _number(class_name: str | None, names: list[str] | None, c_dim: int) -> int:
    if names is not None and class_name in names:
        return names.index(class_name)
    is_number = class_name is not None and class_name.isascii() and class_name.isdecimal()
    if class_name is not None and is_number and len(class_name) <= _MAX_DIGITS and int(class_name) < c_dim:
        return int(class_name)
    expected = f"expected 0 to {c_dim - 1}, or {ALL}"
    if names is not None:
        near = difflib.get_close_matches(class_name or "", names, n=1)
        listed = one_line(", ".join(names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
        expected += f", or a name: {listed}" + (f"; did you mean {one_line(near[0])!r}?" if near else "")
    raise UserError(f"--class {class_name or 'missing'}: this network draws {c_dim} classes; {expected}")


def _vector(text: str, c_dim: int) -> Tensor:
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is found below
            vector = np.array([float(part) for part in text.split(",")]).astype(np.float32)
    except ValueError:
        vector = np.empty(0, dtype=np.float32)
    if len(vector) != c_dim or not np.isfinite(vector).all():
        raise UserError(f"--label {text}: expected {c_dim} finite numbers with commas between, such as 0.1,-0.7")
    return torch.from_numpy(vector)[None]
