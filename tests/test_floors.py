"""A room imports only downwards, and nothing imports `kernels` or `datasets` by the bare name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOM_OF_FOLDER = {"kernels": "stylepipe.kernels", "datasets": "stylepipe.datasets"}

# From the top down. A room may import the rooms of lower floors, never those of its own floor.
FLOORS = (
    {"launch"},
    {"stylepipe.__main__"},
    {"stylepipe.cli"},
    {"stylepipe.recipes"},
    {"stylepipe.training"},
    {"stylepipe", "stylepipe.report"},
    {"stylepipe.interop"},
    {"stylepipe.networks", "stylepipe.losses", "stylepipe.augment", "stylepipe.datasets", "stylepipe.metrics"},
    {"stylepipe.kernels"},
)
HEIGHT = {room: -depth for depth, rooms in enumerate(FLOORS) for room in rooms}

FOR_ALL = {
    "stylepipe.errors",
    "stylepipe.files",
    "stylepipe.config",
    "stylepipe.config_checks",
    "stylepipe.images",
    "stylepipe.parsing",
    "stylepipe.run_files",
    "stylepipe.version",
}
"""Modules that every room may import; they import no room."""

PRESETS = "stylepipe.presets"
"""Stands beside training and imports `config` only."""


def python_files() -> list[Path]:
    return sorted(path for top in ("stylepipe", "kernels", "datasets", "launch") for path in (ROOT / top).rglob("*.py"))


def module_name(path: Path) -> str:
    """Name the module of a file as it is imported (launch/train.py is `launch.train`)."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts[0] = ROOM_OF_FOLDER.get(parts[0], parts[0])
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Name the room: `stylepipe.training.ema` is in `stylepipe.training`, `launch.train` in `launch`."""
    return ".".join(module.split(".")[: 2 if module.startswith("stylepipe") else 1])


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Give every module that a file imports, at its top or within functions, absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides which room is meant"
            module = node.module or ""
            if module == "stylepipe":  # from stylepipe import images
                yield from (
                    f"stylepipe.{alias.name}" if not alias.name.startswith("_") else module for alias in node.names
                )
            else:
                yield module


def complaint(importer: str, imported: str) -> str | None:
    """Say what is wrong with an import, or None."""
    if imported.split(".")[0] in ROOM_OF_FOLDER:
        return f"`{imported}` is somebody else's package; ours is stylepipe.{imported}"
    if imported.split(".")[0] == "launch":
        return "nothing imports launch scripts"
    if imported.split(".")[0] != "stylepipe":
        return None
    source, target = room_of(importer), room_of(imported)
    if source == target or target in FOR_ALL:
        return None
    if source in FOR_ALL:
        return f"{source} is for all rooms and may import none"
    if source == PRESETS:
        return "presets import config only"
    if target == PRESETS:
        return None if HEIGHT[source] >= HEIGHT["stylepipe.training"] else "presets stand beside training"
    if target not in HEIGHT:
        return f"{target} has no floor yet: give it one in tests/test_floors.py"
    return None if HEIGHT[source] > HEIGHT[target] else f"{source} may not import {target}"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_downwards(path: Path) -> None:
    importer = module_name(path)
    found = {name: complaint(importer, name) for name in imported_modules(ast.parse(path.read_text()))}
    assert not {name: wrong for name, wrong in found.items() if wrong}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_tests_never_import_bare_names(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported_modules(ast.parse(path.read_text()))}
    assert not tops & {"kernels", "datasets"}


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("stylepipe.networks.stylegan2", "stylepipe.losses.adversarial"),
        ("stylepipe.training.trainer", "stylepipe.recipes.gan"),
        ("stylepipe.kernels.bias_act", "stylepipe.networks.layers"),
        ("stylepipe.images", "stylepipe.kernels"),
        ("stylepipe.presets.auto", "stylepipe.training.trainer"),
        ("stylepipe.interop.network_file", "stylepipe.presets"),
        ("stylepipe.cli.train", "datasets.reader"),
        ("stylepipe.cli.train", "kernels"),
        ("stylepipe.cli.train", "launch.train"),
    ],
)
def test_upward_and_sideways_imports_are_seen(importer: str, imported: str) -> None:
    assert complaint(importer, imported)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("launch.train", "stylepipe.cli.main"),
        ("stylepipe.recipes.gan", "stylepipe.training.phase"),
        ("stylepipe.networks.stylegan2", "stylepipe.kernels"),
        ("stylepipe.cli.train", "stylepipe.presets"),
        ("stylepipe.kernels.bias_act", "stylepipe.errors"),
        ("stylepipe.datasets.prepare", "webdataset"),
    ],
)
def test_downward_imports_pass(importer: str, imported: str) -> None:
    assert complaint(importer, imported) is None
