"""Where the labels of photographs come from: a label file, or labels beside each, or else the folders they lie in.

The label file is the widespread `dataset.json`, at the top of the photographs:

    {"labels": [["sub/0001.png", 3], ["sub/0002.png", 0], ...]}               class numbers
    {"labels": [["sub/0001.png", [0.1, -0.7]], ...]}                          vectors, all of one length

WebDataset shards have each label beside its image: a class number in `.cls`, or JSON of a number or a list in `.json`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stylepipe.datasets.manifest import Skipped
from stylepipe.datasets.photos import is_image, printable
from stylepipe.datasets.sources import Source
from stylepipe.errors import UserError
from stylepipe.parsing import one_line, parse_json

LABEL_FILE = "dataset.json"

Vector = npt.NDArray[np.float32]
Label = int | Vector

_SPLITS = ("train", "training", "val", "valid", "validation", "test")
_LISTED, _LISTED_CHARACTERS = 20, 600  # names that a message lists

_MAX_FLOAT = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Labels:
    """The label of every photograph that has one.

    Attributes:
        of_file: by relative name: the number of its class, or a vector [c_dim] float32.
        classes: the classes' names in the order of their numbers; None where labels are vectors.
        skipped: files that are left out because they have no label.
    """

    of_file: Mapping[str, Label]
    classes: tuple[str, ...] | None
    skipped: tuple[Skipped, ...]

    @property
    def c_dim(self) -> int:
        """Number of classes, or length of the vectors."""
        if self.classes is not None:
            return len(self.classes)
        first = next(iter(self.of_file.values()))
        assert isinstance(first, np.ndarray)
        return len(first)

    def empty_classes(self, numbers: set[int]) -> list[str]:
        """Return the names of the classes that are not among `numbers`."""
        return [name for number, name in enumerate(self.classes or ()) if number not in numbers]


def find_labels(source: Source) -> Labels:
    """Read the labels of photographs: from `dataset.json`, from beside each, or else from the sub-folders' names.

    With labels that are written down, class numbers are 0, 1, 2, ... without gaps, and are the names of the classes;
    each image must have a label and each label its file. Without, each top-level sub-folder that holds files is a
    class, in the order of their names' bytes, and files beside them are skipped. Where the top-level ones are but the
    splits of a data set (train, validation, test), those below them are the classes.

    Raises:
        UserError: there is neither; the label file is something else, names a file that is not there or twice, misses
            an image, or has labels that are negative, with gaps, not finite, or not all of one kind and length.
    """
    if LABEL_FILE in source.files:
        return _from_file(source)
    beside = {name: text for name in source.files if (text := source.label_of(name)) is not None}
    if beside:
        return _from_beside(source, beside)
    depth = 1 if all(name.split("/")[0] in _SPLITS for name in source.files) else 0
    class_of = {name: parts[depth] for name in source.files if len(parts := name.split("/")) > depth + 1}
    classes = sorted(set(class_of.values()), key=os.fsencode)
    if not classes:
        raise UserError(
            f"{source.path}: has no {LABEL_FILE} and no sub-folders to take labels from; make one per class, or leave "
            f"out --labels (--cond in training)"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return Labels(
        {name: numbers[class_name] for name, class_name in class_of.items()},
        tuple(map(printable, classes)),
        tuple(
            Skipped(printable(name), "without a class", "lies outside the sub-folders")
            for name in source.files
            if name not in class_of
        ),
    )


def _from_beside(source: Source, beside: Mapping[str, bytes]) -> Labels:
    """Return the labels that lie beside the images of shards."""
    missed = [name for name in source.files if name not in beside]
    if missed:
        raise UserError(
            f"{source.path}: no label lies beside {_listed(missed)}, though others have one; label every image, or "
            f"leave out --labels (--cond in training)"
        )
    labels = {}
    for name, text in beside.items():
        try:
            labels[name] = parse_json(text)
        except ValueError:
            labels[name] = text.decode("utf-8", "backslashreplace")  # which `_checked` refuses by name
    of_file, classes = _checked(str(source.path), labels)
    return Labels(of_file, classes, ())


def _from_file(source: Source) -> Labels:
    files, path = source.files, f"{source.path}/{LABEL_FILE}"
    entries = _entries(source, path)
    twice = [name for name, count in Counter(name for name, _ in entries).items() if count > 1]
    if twice:
        raise UserError(f"{path}: names more than once: {_listed(twice)}; leave one label for each")
    labels = dict(entries)
    there = {*files, *(skipped.file for skipped in source.skipped)}
    absent = [name for name in labels if name not in there]
    if absent:
        raise UserError(
            f"{path}: names what is not in the folder: {_listed(absent)}; "
            "expected the paths of its photographs, relative to it"
        )
    without = [name for name in files if name not in labels and name != LABEL_FILE]
    missed = [name for name in without if is_image(source.read(name))]
    if missed:
        raise UserError(
            f"{path}: has no label for {_listed(missed)}; "
            "label every photograph, or move those without a label out of the folder"
        )
    of_file, classes = _checked(path, labels)
    unreadable = (Skipped(printable(name), "unreadable", "not an image of a known format") for name in without)
    return Labels(of_file, classes, tuple(unreadable))


def _entries(source: Source, path: str) -> list[tuple[str, Any]]:
    """Return (name, label as it stands there) of a label file."""
    form = '{"labels": [["sub/0001.png", 3], ...]}'
    try:
        content = parse_json(source.read(LABEL_FILE))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({one_line(error)}); expected {form}") from error
    entries = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: has no list of 'labels'; expected {form}, or no such file for labels by sub-folder")
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f"{path}: an entry of 'labels' is {_short(entry)}; expected {form}")
    return [(name, label) for name, label in entries]


def _checked(path: str, labels: Mapping[str, Any]) -> tuple[Mapping[str, Label], tuple[str, ...] | None]:
    """Return labels of one kind, and the names of the classes if they are numbers."""
    first, kind = "", None
    for name, label in labels.items():
        found = kind_of(label)
        if found is None:
            raise UserError(
                f"{path}: the label of {_quoted(name)} is {_short(label)}; "
                "expected a class number from 0 on, or a list of finite numbers"
            )
        if kind is None:
            first, kind = name, found
        if found != kind:
            raise UserError(
                f"{path}: the label of {_quoted(name)} is {found} and that of {_quoted(first)} {kind}; "
                "expected all class numbers, or all lists of one length"
            )
    if kind != _CLASS:
        return {name: np.asarray(label, dtype=np.float32) for name, label in labels.items()}, None
    used = set(labels.values())
    unused = next(number for number in range(len(used) + 1) if number not in used)
    if unused < len(used):
        raise UserError(
            f"{path}: no photograph has the label {unused}, but some have {_short(max(used))}; "
            "number the classes 0, 1, 2, ... without gaps"
        )
    return labels, tuple(map(str, range(len(used))))


_CLASS = "a class number"


def kind_of(label: Any) -> str | None:
    """Say what a label is that was read from JSON, or None if it is no label."""
    if isinstance(label, int) and not isinstance(label, bool):
        return _CLASS if label >= 0 else None
    if isinstance(label, list) and label and all(map(_is_finite, label)):
        return f"a list of {len(label)}"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MAX_FLOAT <= value <= _MAX_FLOAT


def _quoted(name: str) -> str:
    return one_line(repr(name))


def _short(value: Any) -> str:
    return one_line(json.dumps(value), 60)


def _listed(names: Sequence[str]) -> str:
    listed = one_line(", ".join(map(printable, names[:_LISTED])), _LISTED_CHARACTERS)
    return listed + (f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else "")
