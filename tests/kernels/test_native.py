"""Which implementation an op gets: what is asked for, what can be had, and what is said where it cannot."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stylepipe.errors import UserError
from stylepipe.kernels import build, cache, gxx, native, nvcc, nvrtc
from stylepipe.kernels.build import BuildError, Unit
from stylepipe.kernels.host import SharedObject

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

SCALE_CPP = """
#include "../cuda/common.cuh"
struct ScaleParams { const Scalar* x; Scalar* y; int64 count; float gain; };
EXPORTED void scale(const unsigned grid[3], const unsigned block[3], const void* params) {
    const auto& p = *static_cast<const ScaleParams*>(params);
    for (int64 i = 0; i < p.count; i++) narrow(Real(p.gain) * widen(p.x[i]), p.y[i]);
}
"""


class PathCompiler:
    """Compiles for a GPU whose driver loads shared objects by their path: see Loaded."""

    def __init__(self, name: str = "nvrtc", problem: str = "", *, loads: bool = True) -> None:
        self.name, self.version, self.problem, self.loads = name, "1.0", problem, loads
        self.calls = 0

    def target(self, capability: int) -> str:
        return f"sm_{capability}"

    def flags(self, unit: Unit, target: str) -> list[str]:
        return build.device_flags(unit)

    def compile(self, unit: Unit, target: str) -> bytes:
        self.calls += 1
        if self.problem:
            raise BuildError(self.problem)
        if not self.loads:
            return f"what {self.name} made".encode()
        return bytes(build.cached_path(unit, gxx.HOST_TARGET, gxx.host_shim()))


class Loaded(SharedObject):
    """Stands for driver.Cubin, which test_driver.py tests."""

    def __init__(self, image: bytes, device: int) -> None:
        if not image.startswith(b"/"):
            raise RuntimeError(f"{image.decode()} is an invalid image")
        super().__init__(Path(image.decode()))
        self.device = device


Compilers = Callable[..., None]


@pytest.fixture
def gpu(sources: Path, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Compilers:
    """Pretend that there is a GPU; the result says which compilers there are, the first being NVRTC."""
    monkeypatch.setattr(build, "CUDA_SOURCES", sources)
    monkeypatch.setattr(native, "capability_of", lambda device: 90)
    monkeypatch.setattr(native, "Cubin", Loaded)
    monkeypatch.delenv(native.VARIABLE, raising=False)

    def missing(name: str) -> Callable[[], build.Compiler]:
        def find() -> build.Compiler:
            raise BuildError(f"no {name} found")

        find.cache_clear = lambda: None  # type: ignore[attr-defined]
        return find

    def compilers(nvrtc: PathCompiler | None = None, nvcc: PathCompiler | None = None) -> None:
        for name, compiler in (("nvrtc", nvrtc), ("nvcc", nvcc)):
            find = missing(name)
            if compiler is not None:
                find = lambda compiler=compiler: compiler  # noqa: E731
                find.cache_clear = lambda: None  # type: ignore[attr-defined]
            monkeypatch.setattr(native, f"find_{name}", find)

    compilers()
    return compilers


def check(library: native.Library | None, scale_params) -> None:
    assert library is not None
    x, y = torch.arange(100.0), torch.zeros(100)
    library.launch("scale", (2, 1, 1), (64, 1, 1), scale_params(x.data_ptr(), y.data_ptr(), 100, 3))
    assert torch.equal(y, 3 * x)


# --- on a GPU ---


def test_nvrtc_is_the_first_choice(gpu: Compilers, scale_params) -> None:
    first, second = PathCompiler("nvrtc"), PathCompiler("nvcc")
    gpu(first, second)
    library = native.library("scale", torch.float32, GPU)
    check(library, scale_params)
    assert library is not None
    assert (library.vector_bytes, library.threads) == (16, 256)
    assert native.library("scale", torch.float32, GPU) is library
    assert (first.calls, second.calls) == (1, 0)
    assert native.explain("scale", torch.float32, GPU) == "compiled: sm_90, nvrtc 1.0"
    other = native.library("scale", torch.float32, torch.device("cuda", 1))
    assert isinstance(other, Loaded)
    assert other.device == 1


@pytest.mark.parametrize("first", [None, PathCompiler(problem="it is broken")], ids=["missing", "broken"])
def test_nvcc_is_the_second_choice(gpu: Compilers, scale_params, first: PathCompiler | None) -> None:
    gpu(first, PathCompiler("nvcc"))
    check(native.library("scale", torch.float32, GPU), scale_params)
    assert native.explain("scale", torch.float32, GPU) == "compiled: sm_90, nvcc 1.0"


@pytest.mark.parametrize("target", ["sm_90", "compute_90", "compute_80"])
def test_an_ahead_of_time_build_is_the_third_choice(gpu: Compilers, scale_params, target: str) -> None:
    path = build.cached_path(Unit(build.CUDA_SOURCES / "scale.cu", "float32"), target, PathCompiler("nvcc"))
    check(native.library("scale", torch.float32, GPU), scale_params)
    assert native.explain("scale", torch.float32, GPU) == f"compiled: {path}"


def test_a_gpu_that_does_without_is_warned_of_once(gpu: Compilers) -> None:
    with pytest.warns(RuntimeWarning) as warned:
        libraries = [native.library("scale", dtype, GPU) for dtype in (torch.float32, torch.float16) for _ in range(2)]
    assert libraries == [None] * 4
    (message,) = (str(one.message) for one in warned)
    for part in ("no nvrtc found; no nvcc found", "stylepipe kernels build", "STYLEPIPE_KERNELS=torch"):
        assert part in message
    assert native.explain("scale", torch.float32, GPU).startswith("PyTorch: no nvrtc found; no nvcc found")


def test_after_one_failure_nothing_else_is_compiled(gpu: Compilers) -> None:
    compiler = PathCompiler(problem="it is broken")
    gpu(compiler)
    with pytest.warns(RuntimeWarning, match="it is broken"):
        assert [native.library("scale", dtype, GPU) for dtype in (torch.float32, torch.float16)] == [None] * 2
    assert compiler.calls == 1


def test_what_does_not_load_is_named(gpu: Compilers) -> None:
    gpu(PathCompiler(loads=False))
    message = (
        r"no CUDA kernels: scale-float32 \(sm_90, nvrtc 1.0\) does not load: what nvrtc made is an .*; no nvcc found"
    )
    with pytest.warns(RuntimeWarning, match=message):
        assert native.library("scale", torch.float32, GPU) is None


def test_where_one_compiler_s_does_not_load_the_other_s_may(gpu: Compilers, scale_params) -> None:
    first, second = PathCompiler("nvrtc", loads=False), PathCompiler("nvcc")
    gpu(first, second)
    check(native.library("scale", torch.float32, GPU), scale_params)
    assert native.explain("scale", torch.float32, GPU) == "compiled: sm_90, nvcc 1.0"
    assert (first.calls, second.calls) == (1, 1)


def test_where_none_compiled_here_loads_what_was_made_elsewhere_may(gpu: Compilers, scale_params) -> None:
    unit = Unit(build.CUDA_SOURCES / "scale.cu", "float32")
    useless = build.cached_path(unit, "sm_90", PathCompiler("older", loads=False))
    path = build.cached_path(unit, "compute_80", PathCompiler("elsewhere"))
    gpu(PathCompiler("nvrtc", loads=False), PathCompiler("nvcc", loads=False))
    check(native.library("scale", torch.float32, GPU), scale_params)
    assert native.explain("scale", torch.float32, GPU) == f"compiled: {path}"
    assert useless.is_file()


def test_all_entries_for_a_target_are_tried(gpu: Compilers, scale_params) -> None:
    unit = Unit(build.CUDA_SOURCES / "scale.cu", "float32")
    older = build.entry_path(unit, "compute_80", PathCompiler("older"))
    cache.write_entry(older, PathCompiler("older").compile(unit, "compute_80"))
    newer = build.entry_path(unit, "compute_80", PathCompiler("newer"))
    cache.write_entry(newer, PathCompiler("newer", loads=False).compile(unit, "compute_80"))
    os.utime(older, (1, 1))
    check(native.library("scale", torch.float32, GPU), scale_params)
    assert native.explain("scale", torch.float32, GPU) == f"compiled: {older}"


def test_what_another_compiler_made_ahead_of_time_spares_compiling(gpu: Compilers, scale_params) -> None:
    path = build.cached_path(Unit(build.CUDA_SOURCES / "scale.cu", "float32"), "sm_90", PathCompiler("nvcc"))
    compiler = PathCompiler("nvrtc")
    gpu(compiler)
    check(native.library("scale", torch.float32, GPU), scale_params)
    assert native.explain("scale", torch.float32, GPU) == f"compiled: {path}"
    assert compiler.calls == 0


def test_what_another_version_of_the_compiler_made_spares_nothing(gpu: Compilers, scale_params) -> None:
    older, newer = PathCompiler("nvrtc"), PathCompiler("nvrtc")
    older.version = "0.9"
    build.cached(Unit(build.CUDA_SOURCES / "scale.cu", "float32"), "sm_90", older)
    gpu(newer)
    check(native.library("scale", torch.float32, GPU), scale_params)
    assert native.explain("scale", torch.float32, GPU) == "compiled: sm_90, nvrtc 1.0"
    assert newer.calls == 1


def test_what_was_made_ahead_of_time_and_does_not_load_is_compiled_anew(gpu: Compilers, scale_params) -> None:
    unit = Unit(build.CUDA_SOURCES / "scale.cu", "float32")
    build.cached_path(unit, "sm_90", PathCompiler("nvcc", loads=False))
    gpu(PathCompiler("nvrtc"))
    check(native.library("scale", torch.float32, GPU), scale_params)
    assert native.explain("scale", torch.float32, GPU) == "compiled: sm_90, nvrtc 1.0"


def test_the_reason_names_all_that_was_tried_once(gpu: Compilers) -> None:
    path = build.cached_path(
        Unit(build.CUDA_SOURCES / "scale.cu", "float32"), "compute_80", PathCompiler("elsewhere", loads=False)
    )
    gpu(PathCompiler("nvrtc", loads=False), PathCompiler("nvcc", loads=False))
    said = native.explain("scale", torch.float32, GPU)
    assert said.split("; ") == [
        "PyTorch: scale-float32 (sm_90, nvrtc 1.0) does not load: what nvrtc made is an invalid image",
        "scale-float32 (sm_90, nvcc 1.0) does not load: what nvcc made is an invalid image",
        f"scale-float32 ({path}) does not load: what elsewhere made is an invalid image",
        "install a newer NVIDIA driver",
    ]


# --- several GPUs ---


def test_one_gpu_s_lack_is_not_another_s(gpu: Compilers, scale_params, monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.device("cuda", 1)

    class Pair(Loaded):
        def __init__(self, image: bytes, device: int) -> None:
            super().__init__(b"nothing for this device" if device == 0 else image, device)

    gpu(PathCompiler())
    monkeypatch.setattr(native, "Cubin", Pair)
    with pytest.warns(RuntimeWarning, match="on cuda:0 instead"):
        assert native.library("scale", torch.float32, GPU) is None
    check(native.library("scale", torch.float32, other), scale_params)
    assert native.explain("scale", torch.float16, other) == "compiled: sm_90, nvrtc 1.0"


def test_each_kind_of_lack_is_warned_of_once(gpu: Compilers) -> None:
    def ask(indices: range) -> list[native.Library | None]:
        return [native.library("scale", torch.float32, torch.device("cuda", index)) for index in indices]

    with pytest.warns(RuntimeWarning, match="no nvrtc found") as warned:
        assert ask(range(2)) == [None] * 2
    assert len(warned) == 1
    gpu(PathCompiler(loads=False))
    with pytest.warns(RuntimeWarning, match="does not load") as warned:
        assert ask(range(2, 4)) == [None] * 2
    assert len(warned) == 1


def test_a_device_without_a_number_is_the_current_one(gpu: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(PathCompiler())
    chosen = []
    for index in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        chosen.append(native.library("scale", torch.float32, torch.device("cuda")))
    assert [library.device for library in chosen if isinstance(library, Loaded)] == [0, 1]
    assert chosen[1] is native.library("scale", torch.float32, torch.device("cuda", 1))


def test_cuda_makes_the_lack_an_error(gpu: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "cuda")
    for _ in range(2):
        with pytest.raises(UserError, match="STYLEPIPE_KERNELS=cuda: no nvrtc found; no nvcc found; install"):
            native.library("scale", torch.float32, GPU)
    assert native.explain("scale", torch.float32, GPU).startswith("PyTorch: no nvrtc found")


def test_cuda_lets_cpu_tensors_be(gpu: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "cuda")
    assert native.library("nothing", torch.float32, CPU) is None


def test_torch_builds_nothing(gpu: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = PathCompiler()
    gpu(compiler)
    monkeypatch.setenv(native.VARIABLE, "torch")
    assert [native.library("scale", torch.float32, device) for device in (GPU, CPU)] == [None] * 2
    assert compiler.calls == 0
    assert native.explain("scale", torch.float32, GPU) == "PyTorch: STYLEPIPE_KERNELS=torch"


def test_other_words_are_refused(gpu: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "gpu")
    with pytest.raises(UserError, match="STYLEPIPE_KERNELS=gpu: expected one of auto, cuda, torch"):
        native.library("scale", torch.float32, GPU)
    monkeypatch.setenv(native.VARIABLE, "")
    assert native.mode() == "auto"


def test_other_types_and_devices_use_pytorch_without_a_word(gpu: Compilers) -> None:
    assert native.library("scale", torch.int32, GPU) is None
    assert native.explain("scale", torch.int32, GPU) == "PyTorch: no kernels for torch.int32"
    assert native.library("scale", torch.float32, torch.device("mps")) is None


def test_threads_that_ask_at_once_compile_once(gpu: Compilers) -> None:
    compiler = PathCompiler()
    gpu(compiler)
    libraries: list[native.Library | None] = []
    ask = lambda: libraries.append(native.library("scale", torch.float32, GPU))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(libraries) == 4
    assert len(set(map(id, libraries))) == 1
    assert compiler.calls == 1


def test_a_user_s_mistake_is_not_taken_for_a_lack(
    kernel_cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CUDA_SOURCES", sources)
    monkeypatch.setattr(native, "capability_of", lambda device: 90)
    monkeypatch.setenv(nvrtc.LIBRARY_VARIABLE, "/nowhere/libnvrtc.so.13")
    with pytest.raises(UserError, match=r"STYLEPIPE_NVRTC=/nowhere/libnvrtc\.so\.13"):
        native.library("scale", torch.float32, GPU)


def test_forgetting_looks_for_compilers_again(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        before = nvcc.find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    assert nvcc.find_nvcc() is before
    native.forget()
    assert nvcc.find_nvcc() is not before


# --- on a CPU ---


@pytest.fixture
def cpu_sources(sources: Path, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = sources.parent / "cpu"
    folder.mkdir()
    (folder / "scale.cpp").write_text(SCALE_CPP)
    monkeypatch.setattr(build, "CPU_SOURCES", folder)
    monkeypatch.delenv(native.VARIABLE, raising=False)
    return folder


def test_a_cpu_uses_its_own_kernels(cpu_sources: Path, scale_params) -> None:
    library = native.library("scale", torch.float32, CPU)
    assert library is not None
    assert (library.vector_bytes, library.threads) == (1, 1)
    x, y = torch.arange(100.0), torch.zeros(100)
    library.launch("scale", (1, 1, 1), (1, 1, 1), scale_params(x.data_ptr(), y.data_ptr(), 100, 3))
    assert torch.equal(y, 3 * x)
    assert native.library("scale", torch.float32, CPU) is library
    compiler = gxx.native()
    assert native.explain("scale", torch.float32, CPU).startswith(f"compiled: {compiler.name} {compiler.version}, ")


def test_a_source_without_a_form_for_cpus(cpu_sources: Path) -> None:
    assert native.explain("other", torch.float32, CPU) == "PyTorch: no compiled form for CPUs"


def no_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setenv("CXX", "no-such-compiler")
    return "no-such-compiler, as $CXX says"


def no_command(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setenv("CXX", 'g++ "')
    return '$CXX, g++ ", is no command'


def a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    (folder / "scale.cpp").write_text("wrong")
    return "failed to compile scale-float32 for the CPU"


def a_file_that_does_not_load(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    (folder / "scale.cpp").write_text('extern "C" int nowhere(); int x = nowhere();')
    return "undefined symbol: nowhere"


@pytest.mark.parametrize("lack", [no_compiler, no_command, a_compiler_that_fails, a_file_that_does_not_load])
def test_a_cpu_that_does_without_is_no_reason_to_warn(
    cpu_sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lack: Callable[[pytest.MonkeyPatch, Path], str],
) -> None:
    reason = lack(monkeypatch, cpu_sources)
    caplog.set_level(logging.DEBUG, logger=native.__name__)
    monkeypatch.setattr(logging.getLogger("stylepipe"), "propagate", True)  # a training run before may have changed it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library("scale", torch.float32, CPU) is None
    assert reason in native.explain("scale", torch.float32, CPU)
    assert [record.levelno for record in caplog.records if reason in record.message] == [logging.DEBUG]


def test_a_cpu_without_a_cache_has_its_kernels(cpu_sources: Path, kernel_cache: Path) -> None:
    shutil.rmtree(kernel_cache, ignore_errors=True)
    kernel_cache.write_text("not a folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.library("scale", torch.float32, CPU) is not None


def test_tests_can_choose(cpu_sources: Path) -> None:
    asked = []

    def chooser(source: str, dtype: torch.dtype, device: torch.device) -> None:
        asked.append((source, dtype, device))

    with native.use(chooser):
        assert native.library("scale", torch.float32, CPU) is None
    assert asked == [("scale", torch.float32, CPU)]
    assert native.library("scale", torch.float32, CPU) is not None


def test_a_cpu_has_no_stream() -> None:
    assert native.stream_of(CPU) == 0
