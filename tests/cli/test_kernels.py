"""`stylepipe kernels`: what it compiles, lists and removes, and what it says of it."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stylepipe.cli import kernels
from stylepipe.cli.main import main
from stylepipe.errors import UserError
from stylepipe.kernels import build, cache, nvcc, nvrtc


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "tiny.cu").write_text('extern "C" __global__ void tiny(int* x) { *x = 1; }\n')
    return folder


@pytest.fixture
def compiler() -> str:
    try:
        return nvcc.find_nvcc().name
    except build.BuildError:
        try:
            return nvrtc.find_nvrtc().name
        except build.BuildError as error:
            pytest.skip(str(error))


def test_build_compiles_what_is_missing(folder, sources, compiler, capsys) -> None:
    kernels.build_kernels(kernels.Build(arch="90,80"), sources)
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        rf"12 files compiled by {compiler} [0-9.]+ for sm_80, sm_90, compute_90 in [0-9.]+ s; "
        rf"0 were there already; all in {re.escape(str(folder))}",
        line,
    )
    cache.list_entries(folder)[3].unlink()
    kernels.build_kernels(kernels.Build(arch="80,90"), sources)
    assert capsys.readouterr().out.startswith("1 file compiled by")

    assert main(["kernels", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    assert re.fullmatch(rf" *[0-9.]+ kB  tiny-bfloat16-compute_90-[0-9a-f]{{16}}\.{compiler}-[0-9.]+\.ptx", lines[0])
    assert re.fullmatch(rf"12 files \([0-9.]+ MB\) in {re.escape(str(folder))}", lines[-1])

    assert main(["kernels", "clean"]) == 0
    assert re.fullmatch(rf"removed 12 files \([0-9.]+ MB\) from {folder}\n", capsys.readouterr().out)
    assert cache.list_entries(folder) == []


BUILD_THRICE = """
import multiprocessing, sys
from pathlib import Path
from stylepipe.cli import kernels

context = multiprocessing.get_context("fork")  # three imports of torch would take longer than the test
of = (kernels.Build(arch="90", compiler=sys.argv[2]), Path(sys.argv[1]))
processes = [context.Process(target=kernels.build_kernels, args=of) for _ in range(3)]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""


@pytest.mark.slow
def test_three_builds_at_once_compile_everything_once(folder, sources, compiler) -> None:
    command = [sys.executable, "-c", BUILD_THRICE, str(sources), compiler]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    counts = sorted(int(count) for count in re.findall(r"(\d+) files? compiled by", said))
    assert counts == [0, 0, 8]  # machine code and PTX of four types


def test_a_build_says_whom_it_waits_for(folder, sources, compiler, monkeypatch, caplog, capsys) -> None:
    monkeypatch.setattr(cache, "LOCK_QUIET_S", 0.1)
    monkeypatch.setattr(kernels, "LOCK_TIMEOUT_S", 0.2)
    lock = folder / "locks" / "all-kernels.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        kernels.build_kernels(kernels.Build(arch="90"), sources)
    assert "waiting for another process, which compiles all-kernels" in caplog.text
    said = capsys.readouterr()
    assert said.err.startswith(f"another process has held the lock {lock} for more than 0 s")
    assert said.out.startswith("8 files compiled")


def test_without_a_gpu_the_usual_architectures_are_compiled_for(compiler, monkeypatch) -> None:
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    targets = kernels._targets(None, kernels._compiler(None))
    assert targets == ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]


def test_with_gpus_theirs_are_compiled_for(compiler, monkeypatch) -> None:
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(kernels, "capability_of", lambda device: [90, 80, 90][device.index])
    assert kernels._targets(None, kernels._compiler(None)) == ["sm_80", "sm_90"]


@pytest.mark.parametrize("arch", ["9.0", "", "90,", "35", "ninety"])
def test_a_wrong_architecture_is_named(compiler, arch, capsys) -> None:
    assert main(["kernels", "build", "--arch", arch]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: --arch {arch}: expected numbers with commas between them")
    assert "80,86" in message


def test_a_unit_that_does_not_compile_is_shown(folder, sources, compiler, capsys) -> None:
    (sources / "wrong.cu").write_text("undefined_name x;\n")
    with pytest.raises(UserError, match="failed to compile"):
        kernels.build_kernels(kernels.Build(arch="90"), sources)
    assert 'identifier "undefined_name" is undefined' in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(folder, sources, compiler) -> None:
    folder.write_text("not a folder")
    with pytest.raises(UserError, match=rf"{folder}: cannot write there .*; name another folder in STYLEPIPE_KERN"):
        kernels.build_kernels(kernels.Build(arch="90"), sources)


def test_without_a_compiler_both_are_missed(monkeypatch, capsys) -> None:
    def missing(name: str):
        def find() -> None:
            raise build.BuildError(f"no {name} found")

        return find

    monkeypatch.setattr(nvcc, "find_nvcc", missing("nvcc"))
    monkeypatch.setattr(nvrtc, "find_nvrtc", missing("nvrtc"))
    assert main(["kernels", "build"]) == 2
    assert capsys.readouterr().err == "error: no nvcc found; no nvrtc found\n"
    assert main(["kernels", "build", "--compiler", "nvcc"]) == 2
    assert capsys.readouterr().err == "error: no nvcc found\n"
