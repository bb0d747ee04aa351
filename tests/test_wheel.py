"""The wheel holds every package, and installs nothing under the bare names `kernels` and `datasets`."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest


def test_every_package_on_disk_is_listed(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(settings["packages"])
    folders = {
        path.parent.relative_to(root)
        for top in ("stylepipe", "kernels", "datasets")
        for path in root.glob(f"{top}/**/__init__.py")
    }
    names = {".".join(folder.parts) for folder in folders}
    assert listed == {name if name.startswith("stylepipe") else f"stylepipe.{name}" for name in names}


def test_every_requirement_is_pinned(root: Path) -> None:
    pins = {line.partition("==")[0] for line in (root / "constraints.txt").read_text().splitlines() if "==" in line}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {requirement.partition(">=")[0].lower() for requirement in asked}
    assert names - {"stylepipe[tensorboard,fast]"} <= pins


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment(root: Path, tmp_path: Path) -> None:
    # Built from a copy of what git would carry, so that the checkout stays clean.
    source = tmp_path / "source"
    source.mkdir()
    names = ["pyproject.toml", "README.md", "LICENSE", "stylepipe", "kernels", "datasets"]
    subprocess.run(["cp", "-r", *(root / name for name in names), source], check=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", source]
    done = subprocess.run(build, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        members = archive.namelist()
    assert {name.split("/")[0] for name in members} == {"stylepipe", f"{wheel.name.split('-py3')[0]}.dist-info"}
    for top, folder in (
        ("stylepipe", "stylepipe"),
        ("kernels", "stylepipe/kernels"),
        ("datasets", "stylepipe/datasets"),
    ):
        on_disk = {f"{folder}/{path.relative_to(root / top).as_posix()}" for path in (root / top).rglob("*.py")}
        assert on_disk <= set(members)
    assert "stylepipe/py.typed" in members
    assert any(name.endswith("licenses/LICENSE") for name in members)

    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    # Its dependencies come from here; a .pth file adds a folder behind the environment's own and does not read the .pth
    # file of our editable install.
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    Path(own.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        "import importlib.util, stylepipe, stylepipe.kernels, stylepipe.datasets\n"
        "print(stylepipe.__file__, stylepipe.kernels.__file__, stylepipe.datasets.__file__)\n"
        "assert stylepipe.kernels.bias_act\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "assert importlib.util.find_spec('datasets') is None\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    done = subprocess.run([python, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(environment)) for path in done.stdout.split())
    done = subprocess.run(
        [environment / "bin" / "stylepipe", "--version"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean,
    )
    assert done.stdout.startswith("stylepipe ")
