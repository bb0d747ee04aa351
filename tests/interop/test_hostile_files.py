"""Nothing in a file runs, and each file gets one clear message, soon and in little memory.

Run as a script for the table of files and what each got: python tests/interop/test_hostile_files.py
"""

from __future__ import annotations

import codecs
import re
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_checkpoints import dump, persistent_network, rosinality_checkpoint
from hostile_files import Hostile, hostile_files, small_files, write

from stylepipe.errors import UserError
from stylepipe.interop.checkpoints import import_checkpoint
from stylepipe.interop.foreign_file import read_foreign
from stylepipe.networks.stylegan2 import Generator

FILES = hostile_files()
MAX_SECONDS = 20  # a hundred times what the slowest takes on a fast machine
MAX_BYTES = 20 * 2**20
SMALL, LARGE = 4500, 900_000  # bytes of files
_FORBIDDEN = ("os.", "subprocess.", "exec", "compile", "import", "socket.", "pickle.find_class", "shutil.", "ctypes.")
_events: list[str] | None = None


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _events is not None and (event.startswith(_FORBIDDEN) or (event == "open" and "w" in str(args[1]))):
        _events.append(f"{event} {args}")


codecs.lookup("cp437")  # zipfile imports it when it meets the first old name
sys.addaudithook(_audit)  # it stays for ever, and is silent outside of `watched`


@contextmanager
def watched() -> Iterator[None]:
    """See that the interpreter imports, compiles, starts and opens for writing nothing meanwhile."""
    global _events
    _events = []
    try:
        yield
        assert _events == []
    finally:
        _events = None


def attempt(path: Path) -> str | None:
    """Import a file; return the message, or None if it is a checkpoint."""
    try:
        import_checkpoint(path)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _by_time() -> list[Any]:
    """Return the names of all files, those of a million instructions marked as slow."""
    slow = pytest.mark.slow
    return [name if len(file.content) < LARGE else pytest.param(name, marks=slow) for name, file in FILES.items()]


@pytest.mark.parametrize("name", _by_time())
def test_a_hostile_file_runs_nothing_and_gets_one_message(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, FILES[name].content)
    modules = set(sys.modules)
    start = time.monotonic()
    with watched():
        message = attempt(path)
    assert message is not None
    assert re.search(FILES[name].message, message), message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    assert time.monotonic() - start < MAX_SECONDS
    assert set(sys.modules) == modules
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.pkl"], "no sentinel"


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if len(file.content) < SMALL])
def test_a_small_file_cannot_make_us_take_much_memory(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, FILES[name].content)
    tracemalloc.start()
    try:
        attempt(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    for action in ("import antigravity_not_there", "exec('1')", "open('SENTINEL', 'w').close()", "os.system('true')"):
        with pytest.raises((AssertionError, ModuleNotFoundError)), watched():
            exec(compile(action, "test", "exec"), {"os": __import__("os")})


def test_the_small_files_are_valid(tmp_path: Path) -> None:
    for content in small_files().values():
        assert "a" in read_foreign(write(tmp_path, content))


@pytest.mark.parametrize("name", small_files())
def test_a_file_cut_anywhere_gets_a_message(name: str, tmp_path: Path) -> None:
    content = small_files()[name]
    for length in range(len(content)):
        with pytest.raises(UserError):
            read_foreign(write(tmp_path, content[:length]))


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Flip one to three bits, or overwrite, remove or repeat a stretch."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(len(changed)))
        kind = int(random.integers(8))
        stretch = int(random.integers(1, 12))
        if kind == 0:
            changed[at : at + stretch] = random.bytes(stretch)
        elif kind == 1:
            del changed[at : at + stretch]
        elif kind == 2:
            changed[at:at] = changed[at : at + stretch]
        else:
            changed[at] ^= 1 << int(random.integers(8))
        if not changed:
            break
    return bytes(changed)


def fuzz(path: Path, content: bytes, count: int, seed: int) -> dict[str, int]:
    """Read damaged copies; return how many were refused and how many still were checkpoints."""
    outcomes = {"refused": 0, "valid": 0}
    random = np.random.Generator(np.random.Philox(key=seed))
    for _ in range(count):
        path.write_bytes(damaged(content, random))
        with watched():
            outcomes["valid" if attempt(path) is None else "refused"] += 1
    return outcomes


def tiny_checkpoints(folder: Path) -> dict[str, bytes]:
    """Return the smallest checkpoints of every form."""
    G = Generator(8, z_dim=2, w_dim=2, channel_base=16, channel_max=2, mapping_layers=1)
    arrays = {key: tensor.numpy() for key, tensor in G.state_dict().items()}
    kwargs = {"channel_base": 16, "channel_max": 2, "img_resolution": 8}
    path = dump(folder / "a", {"G_ema": persistent_network("Generator", arrays, kwargs)})
    content = {"official": path.read_bytes()}
    theirs = rosinality_checkpoint(4, 2)
    small = {key: theirs[key] for key in ("g_ema", "latent_avg", "args")}
    for name, archive in (("zip", True), ("legacy", False)):
        torch.save(small, path, _use_new_zipfile_serialization=archive)
        content[name] = path.read_bytes()
    path.unlink()
    return content


@pytest.mark.parametrize("form", ["official", "zip", "legacy"])
def test_damaged_checkpoints_are_refused_or_still_valid(form: str, tmp_path: Path) -> None:
    content = tiny_checkpoints(tmp_path)[form]
    attempt(write(tmp_path, content))  # what is imported late is imported
    outcomes = fuzz(tmp_path / "hostile.pkl", content, 40, seed=1)
    assert outcomes["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["official", "zip", "legacy"])
def test_thousands_of_damaged_checkpoints(form: str, tmp_path: Path) -> None:
    content = tiny_checkpoints(tmp_path)[form]
    attempt(write(tmp_path, content))
    outcomes = fuzz(tmp_path / "hostile.pkl", content, 2000, seed=2)
    assert outcomes["refused"] > 1000


@pytest.mark.slow
def test_thousands_of_damaged_small_files(tmp_path: Path) -> None:
    for seed, content in enumerate(small_files().values()):
        assert fuzz(tmp_path / "hostile.pkl", content, 3000, seed=10 + seed)["valid"] == 0


def table(files: dict[str, Hostile]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, hostile in files.items():
            path = write(Path(folder), hostile.content)
            start = time.monotonic()
            message = attempt(path) or "VALID"
            took = time.monotonic() - start
            print(f"{name:44} {len(hostile.content):>10,} B {took:6.2f} s  {message.removeprefix(f'{path}: ')}")


if __name__ == "__main__":
    table(FILES)
