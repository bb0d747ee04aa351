"""Kernels are compiled once, kept whole, and had even where the cache, its lock or a former build is broken."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stylepipe.kernels import build, cache

PROCESSES = Path(__file__).with_name("processes.py")
TARGET = "sm_90"


class Upper:
    """A compiler that turns the source to upper case and counts its calls."""

    def __init__(self, name: str = "upper", version: str = "1.0", flags: tuple[str, ...] = ()) -> None:
        self.name, self.version, self.options = name, version, flags
        self.calls = 0

    def flags(self, unit: build.Unit, target: str) -> list[str]:
        return list(self.options)

    def compile(self, unit: build.Unit, target: str) -> bytes:
        self.calls += 1
        return unit.source.read_bytes().upper()


@pytest.fixture
def unit(tmp_path: Path) -> build.Unit:
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "kernel.cu").write_text("kernel")
    (folder / "common.cuh").write_text("common")
    return build.Unit(folder / "kernel.cu", "float32")


# --- entries ---


def test_it_is_compiled_once(unit: build.Unit, kernel_cache: Path) -> None:
    compiler = Upper()
    assert [build.cached(unit, TARGET, compiler) for _ in range(2)] == [b"KERNEL"] * 2
    assert compiler.calls == 1
    (entry,) = cache.list_entries(kernel_cache)
    assert entry.name.startswith("kernel-float32-sm_90-")
    assert entry.name.endswith(".upper-1.0.cubin")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"x",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    ],
    ids=["empty", "last byte gone", "half", "longer", "a bit of the payload", "a bit of the digest"],
)
def test_a_damaged_entry_is_compiled_again(
    unit: build.Unit, kernel_cache: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    compiler = Upper()
    path = build.cached_path(unit, TARGET, compiler)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert build.cached(unit, TARGET, compiler) == b"KERNEL"
    assert compiler.calls == 2
    assert path.read_bytes() == whole
    assert f"{path} is damaged" in caplog.text


def test_whatever_shapes_the_output_makes_another_entry(unit: build.Unit, kernel_cache: Path) -> None:
    names = [build.entry_path(unit, TARGET, Upper()).name]

    def also(unit: build.Unit, target: str, compiler: build.Compiler) -> None:
        names.append(build.entry_path(unit, target, compiler).name)

    also(unit, TARGET, Upper(flags=("-g",)))
    also(unit, TARGET, Upper(version="1.1"))
    also(unit, TARGET, Upper(name="lower"))
    also(unit, "compute_90", Upper())
    also(build.Unit(unit.source, "float16"), TARGET, Upper())
    unit.source.with_name("common.cuh").write_text("Common")
    also(unit, TARGET, Upper())
    unit.source.write_text("Kernel")
    also(unit, TARGET, Upper())
    unit.source.with_name("common.cuh").rename(unit.source.with_name("shared.cuh"))
    also(unit, TARGET, Upper())
    assert len(set(names)) == len(names)


def test_sources_of_the_cpu_depend_on_the_headers_that_they_share(unit: build.Unit, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "kernel.cpp").write_text("kernel")
    inputs = build.Unit(tmp_path / "cpu" / "kernel.cpp", "float32").inputs()
    assert [path.name for path in inputs] == ["kernel.cpp", "common.cuh", "kernel.cu"]


def test_where_the_sources_lie_makes_no_difference(unit: build.Unit, tmp_path: Path) -> None:
    name = build.entry_path(unit, TARGET, Upper()).name
    (tmp_path / "elsewhere").mkdir()
    moved = unit.source.parent.rename(tmp_path / "elsewhere" / "cuda")
    assert build.entry_path(build.Unit(moved / "kernel.cu", "float32"), TARGET, Upper()).name == name


def test_what_another_compiler_made_ahead_of_time_serves(unit: build.Unit, kernel_cache: Path) -> None:
    ahead, here = Upper("nvcc", "12.9"), Upper("nvrtc")
    build.cached(unit, TARGET, ahead)
    assert build.cached(unit, TARGET, here) == b"KERNEL"
    assert here.calls == 0
    newer = Upper("nvcc", "13.0")
    build.cached(unit, TARGET, newer)  # of the same compiler, only the very version
    assert newer.calls == 1
    build.cached(unit, TARGET, other := Upper("nvrtc", flags=("-g",)))
    assert other.calls == 1


def test_what_is_there_serves_without_a_compiler(unit: build.Unit, kernel_cache: Path) -> None:
    assert build.stored(unit, TARGET, []) is None
    older, newer = (build.cached_path(unit, TARGET, Upper("nvcc", version)) for version in ("12.9", "13.0"))
    os.utime(older, (1, 1))
    assert build.stored(unit, TARGET, []) == (b"KERNEL", newer)
    newer.write_bytes(b"damaged")
    assert build.stored(unit, TARGET, []) == (b"KERNEL", older)
    assert build.stored(unit, TARGET, ["-g"]) is None


def test_the_folder_is_the_first_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (cache.FOLDER_VARIABLE, "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.cache_folder() == Path("/home/someone/.cache/stylepipe/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache.cache_folder() == Path("/caches/stylepipe/kernels")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/extensions")
    assert cache.cache_folder() == Path("/extensions/stylepipe")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, "~/kernels")
    assert cache.cache_folder() == Path("/home/someone/kernels")


def test_removing_leaves_nothing_but_locks(unit: build.Unit, kernel_cache: Path) -> None:
    build.cached(unit, TARGET, Upper())
    (kernel_cache / ".left-by-a-killed-build.123.tmp").write_bytes(b"12345")
    for name in ("somebody's", "library.so", "model.ptx"):
        (kernel_cache / name).write_bytes(b"else")
    assert cache.remove_entries(kernel_cache) == (2, len(b"KERNEL") + 32 + 5)
    assert {path.name for path in kernel_cache.iterdir()} == {"locks", "somebody's", "library.so", "model.ptx"}
    assert cache.remove_entries(kernel_cache / "nowhere") == (0, 0)


# --- processes ---


def run_processes(source: Path, count: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROCESSES), str(source), str(count), str(seconds)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


def test_eight_processes_compile_once(unit: build.Unit, kernel_cache: Path) -> None:
    with run_processes(unit.source, 8, 0.5) as started:
        said, _ = started.communicate(timeout=120)
    assert started.returncode == 0, said
    assert said.split() == ["KERNEL"] * 8
    assert (unit.source.parents[1] / "compilations").read_text() == "one\n"


def test_a_killed_build_neither_blocks_nor_breaks_the_next(unit: build.Unit, kernel_cache: Path) -> None:
    with run_processes(unit.source, 1, 60) as started:
        try:
            wait_for(unit.source.parents[1] / "compilations")
            lock = kernel_cache / "locks" / f"{unit.name}-{TARGET}.lock"
            assert lock.with_suffix(".holder").read_text().split()[0].isdigit()
            with lock.open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is held indeed
        finally:
            os.killpg(started.pid, signal.SIGKILL)
    begin = time.monotonic()
    assert build.cached(unit, TARGET, compiler := Upper("slow")) == b"KERNEL"
    assert time.monotonic() - begin < cache.LOCK_QUIET_S
    assert compiler.calls == 1


def test_a_file_left_half_written_is_never_read(unit: build.Unit, kernel_cache: Path) -> None:
    compiler = Upper()
    kernel_cache.mkdir()
    name = build.entry_path(unit, TARGET, compiler).name
    (kernel_cache / f".{name}.{os.getpid()}.tmp").write_bytes(b"KER")
    assert build.cached(unit, TARGET, compiler) == b"KERNEL"
    assert [path.name for path in kernel_cache.glob("*kernel-*")] == [name]


def test_the_lock_file_of_a_dead_process_does_not_block(unit: build.Unit, kernel_cache: Path) -> None:
    (kernel_cache / "locks").mkdir(parents=True)
    for suffix in (".lock", ".holder"):
        (kernel_cache / "locks" / f"{unit.name}-{TARGET}{suffix}").write_text("4194304 gone\n")
    begin = time.monotonic()
    assert build.cached(unit, TARGET, Upper()) == b"KERNEL"
    assert time.monotonic() - begin < 1


@contextmanager
def held(lock: Path, words: str) -> Iterator[None]:
    lock.parent.mkdir(parents=True)
    lock.with_suffix(".holder").write_text(words)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(
    ("words", "holder"),
    [
        (f"4321 {os.uname().nodename}", "process 4321"),
        ("4321 another-node", "process 4321 on another-node"),
        ("", "another process"),
    ],
)
def test_a_lock_that_is_never_released_is_passed_by(
    unit: build.Unit,
    kernel_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    words: str,
    holder: str,
) -> None:
    monkeypatch.setattr(cache, "LOCK_QUIET_S", 0.1)
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.3)
    lock = kernel_cache / "locks" / f"{unit.name}-{TARGET}.lock"
    with held(lock, words), pytest.warns(RuntimeWarning) as warned:
        assert build.cached(unit, TARGET, Upper()) == b"KERNEL"
    assert f"waiting for {holder}, which compiles kernel-float32-sm_90" in caplog.text
    assert [r.levelno for r in caplog.records if r.name == cache.__name__] == [logging.WARNING]
    (message,) = (str(one.message) for one in warned)
    assert message.startswith(f"{holder} has held the lock {lock}")
    assert lock.with_suffix(".holder").read_text() == words  # it is still the other's
    assert len(cache.list_entries(kernel_cache)) == 1


# --- a cache that cannot be used ---


def a_file_instead_of_the_folder(folder: Path) -> None:
    folder.write_text("not a folder")


def a_file_instead_of_the_locks(folder: Path) -> None:
    folder.mkdir()
    (folder / "locks").write_text("not a folder")


def a_folder_that_may_not_be_written(folder: Path) -> None:
    folder.mkdir(mode=0o555)


@pytest.mark.usefixtures("bound_by_permissions")
@pytest.mark.parametrize("obstacle", [a_file_instead_of_the_folder, a_folder_that_may_not_be_written])
def test_without_a_cache_it_is_compiled_in_memory(
    unit: build.Unit, kernel_cache: Path, obstacle: Callable[[Path], None]
) -> None:
    obstacle(kernel_cache)
    compiler = Upper()
    with pytest.warns(RuntimeWarning) as warned:
        paths = [build.cached_path(unit, TARGET, compiler) for _ in range(2)]
    assert compiler.calls == 2
    assert [path.read_bytes() for path in paths] == [b"KERNEL"] * 2
    assert kernel_cache not in paths[0].parents
    assert build.cached(unit, TARGET, compiler) == b"KERNEL"
    (message,) = (str(one.message) for one in warned)
    assert str(kernel_cache) in message
    assert cache.FOLDER_VARIABLE in message


@pytest.mark.usefixtures("bound_by_permissions")
def test_what_a_read_only_cache_holds_serves_without_a_word(unit: build.Unit, kernel_cache: Path) -> None:
    build.cached(unit, TARGET, Upper())
    kernel_cache.chmod(0o555)
    with pytest.raises(PermissionError):
        (kernel_cache / "file").touch()
    assert build.cached(unit, TARGET, compiler := Upper()) == b"KERNEL"
    assert compiler.calls == 0


def test_without_locks_it_is_compiled_and_kept(unit: build.Unit, kernel_cache: Path) -> None:
    a_file_instead_of_the_locks(kernel_cache)
    compiler = Upper()
    with pytest.warns(RuntimeWarning, match="cannot be kept") as warned:
        assert [build.cached(unit, TARGET, compiler) for _ in range(2)] == [b"KERNEL"] * 2
    assert compiler.calls == 1
    assert len(warned) == 1


def test_on_a_full_disk_it_is_compiled_in_memory(unit: build.Unit, kernel_cache: Path) -> None:
    unit.source.write_text("k" * 100_000)
    build.cached(build.Unit(unit.source, "float16"), TARGET, Upper())  # the folder can be used
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.warns(RuntimeWarning, match=str(kernel_cache)):
            assert build.cached(unit, TARGET, Upper()) == b"K" * 100_000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list(kernel_cache.glob("*kernel-*"))) == 1  # nor is half of it left there


def test_the_report_can_go_elsewhere(unit: build.Unit, kernel_cache: Path) -> None:
    kernel_cache.write_text("not a folder")
    reports: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build.cached(unit, TARGET, Upper(), reports.append)
    assert len(reports) == 1


def test_the_private_file_goes_with_its_process(unit: build.Unit, kernel_cache: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from processes import SlowCompiler; from stylepipe.kernels import build\n"
        "print(build.cached_path(build.Unit(Path(sys.argv[2]), 'float32'), 'host', SlowCompiler(0), lambda _: None))\n"
    )
    kernel_cache.write_text("not a folder")
    command = [sys.executable, "-c", code, str(PROCESSES.parent), str(unit.source)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert said.endswith(".slow-1.0.so")
    assert not Path(said).parent.exists()


# --- targets and compilers ---

SUPPORTED = (75, 80, 86, 90, 100, 120)


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        (75, "sm_75"),
        (90, "sm_90"),
        (89, "sm_86"),  # machine code runs on later architectures of its generation
        (121, "sm_120"),
        (110, "compute_100"),  # of another generation only PTX does
        (130, "compute_120"),
        (70, None),
    ],
)
def test_the_target_is_the_nearest_that_the_device_runs(capability: int, target: str | None) -> None:
    assert build.best_target(capability, SUPPORTED) == target
    assert target is None or target in build.runnable_targets(capability)


def test_a_device_runs_its_generation_and_all_older_ptx() -> None:
    targets = build.runnable_targets(90)
    assert targets[:3] == ["sm_90", "compute_90", "compute_89"]
    assert build.runnable_targets(86)[:4] == ["sm_86", "sm_85", "sm_84", "sm_83"]
    assert not {"sm_80", "sm_100", "compute_100", "compute_91"} & set(targets)


def test_a_failure_tells_the_first_errors_and_keeps_the_rest() -> None:
    script = 'echo note; for i in 1 2 3 4; do echo "x.cu($i): error: wrong $i"; done; exit 1'
    with pytest.raises(build.BuildError) as caught:
        build.run_compiler(["sh", "-c", script], "x")
    assert str(caught.value).splitlines() == [
        "sh failed to compile x",
        *(f"  x.cu({i}): error: wrong {i}" for i in (1, 2, 3)),
    ]
    assert caught.value.log.splitlines()[-1] == "x.cu(4): error: wrong 4"
    assert caught.value.command[0] == "sh"


def test_a_compiler_that_is_missing_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(build.BuildError, match=r"/nowhere/g\+\+ cannot be run \(No such file"):
        build.run_compiler(["/nowhere/g++"], "x")
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 0.1)
    with pytest.raises(build.BuildError, match="sleep took more than 0 s over x"):
        build.run_compiler(["sleep", "30"], "x")
