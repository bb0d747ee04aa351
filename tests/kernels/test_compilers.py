"""Every compiler makes kernels of the same source, and says what is wrong where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stylepipe.errors import UserError
from stylepipe.kernels import build, cache, gxx, nvcc, nvrtc
from stylepipe.kernels.build import BuildError, Unit
from stylepipe.kernels.host import SharedObject

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "compute_120")
ELF_MACHINE_CUDA = 190


def check_image(image: bytes, target: str) -> None:
    if target.startswith("sm_"):
        assert image[:4] == b"\x7fELF"
        assert int.from_bytes(image[18:20], "little") == ELF_MACHINE_CUDA
        assert b"scale" in image
    else:
        assert f".target {target.replace('compute', 'sm')}".encode() in image
        assert b".entry scale(" in image
        assert image.endswith(b"\0")


def broken(sources: Path) -> Unit:
    (sources / "broken.cu").write_text('#include "common.cuh"\nSCALAR wrong = undefined_name;\n')
    return Unit(sources / "broken.cu", "float32")


# --- what to compile for a device ---


@pytest.mark.parametrize(
    ("capability", "supported", "target"),
    [
        (87, [80, 86, 87, 90], "sm_87"),  # of its own, always
        (101, [90, 100, 101, 120], "sm_101"),
        (103, [90, 100, 101, 120], "sm_100"),
        (89, [80, 86, 87], "sm_86"),
        (89, [75, 87], "compute_87"),
        (75, [70, 72], "sm_70"),
        (72, [60, 70, 75], "compute_70"),  # an integrated device runs no other's machine code
        (87, [80, 86, 90], "compute_86"),
        (110, [90, 100, 103, 120], "compute_103"),
        (103, [90, 100, 103], "sm_103"),
    ],
)
def test_machine_code_does_not_go_between_integrated_and_discrete_gpus(
    capability: int, supported: list[int], target: str
) -> None:
    assert build.best_target(capability, supported) == target
    runnable = build.runnable_targets(capability)
    assert target in runnable
    machine_code = {int(target[3:]) for target in runnable if target.startswith("sm_")}
    integrated = {72, 87, 101, 110}
    assert machine_code == {capability} if capability in integrated else not machine_code & integrated


# --- the host shim ---


@pytest.mark.parametrize("scalar", build.SCALARS)
def test_the_shim_runs_every_type(sources: Path, kernel_cache: Path, scale_params, scalar: str) -> None:
    compiler = gxx.host_shim()
    path = build.cached_path(Unit(sources / "scale.cu", scalar), gxx.HOST_TARGET, compiler)
    x = torch.linspace(-3, 3, 100).to(getattr(torch, scalar))
    y = torch.zeros_like(x)
    SharedObject(path).launch("scale", (2, 1, 1), (64, 1, 1), scale_params(x.data_ptr(), y.data_ptr(), 100, 4))
    assert torch.equal(y, 4 * x)


def test_the_shim_runs_under_a_sanitizer(sources: Path, kernel_cache: Path) -> None:
    path = build.cached_path(Unit(sources / "scale.cu", "float32"), gxx.HOST_TARGET, gxx.host_shim(["undefined"]))
    code = (
        "import ctypes, sys\n"
        "one = (ctypes.c_uint * 3)(1, 1, 1)\n"
        "null, count = 0, int(sys.argv[2])\n"
        "ctypes.CDLL(sys.argv[1]).scale(one, one, (ctypes.c_longlong * 4)(null, null, count, 0))\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    sound, wrong = (subprocess.run([*command, n], check=False, capture_output=True, text=True) for n in "01")
    assert (sound.returncode, sound.stderr) == (0, "")
    assert wrong.returncode != 0
    assert "scale.cu:6" in wrong.stderr
    assert "null pointer" in wrong.stderr


def test_a_source_that_does_not_compile_tells_why(sources: Path, kernel_cache: Path) -> None:
    with pytest.raises(BuildError, match=r"failed to compile broken-float32 for the CPU[^$]*undefined_name") as caught:
        gxx.host_shim().compile(broken(sources), gxx.HOST_TARGET)
    assert "-DSCALAR=float32" in caught.value.command


def test_cxx_names_the_compiler(cxx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++ -O2")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found .*/nowhere/c\+\+ -O2, as \$CXX says"):
        gxx.native()
    monkeypatch.setenv("CXX", f"{cxx[0]} -DFROM_CXX")
    assert gxx.host_shim().command == (cxx[0], "-DFROM_CXX")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError, match=r"looked for g\+\+ and clang\+\+"):
        gxx.host_shim()


# --- the CPU's own kernels ---

THREADS_CPP = """
#include <omp.h>
#include "../cuda/common.cuh"
EXPORTED void threads(const unsigned grid[3], const unsigned block[3], const void* params) {
    int* counts = *static_cast<int* const*>(params);
    #pragma omp parallel
    {
        #pragma omp atomic
        counts[0]++;
    }
    counts[1] = omp_get_max_threads();
}
"""


def test_cpu_kernels_share_torch_s_threads(sources: Path) -> None:
    if gxx.native().name != "g++" or gxx.torch_openmp() is None:
        pytest.skip("needs g++ and the GNU OpenMP library of torch's Linux wheels")
    folder = sources.parent / "cpu"
    folder.mkdir()
    (folder / "threads.cpp").write_text(THREADS_CPP)
    code = (
        "import ctypes, sys, torch\n"
        "from pathlib import Path\n"
        "from stylepipe.kernels import build, gxx\n"
        "from stylepipe.kernels.host import SharedObject\n"
        "class Params(ctypes.Structure): _fields_ = (('counts', ctypes.c_void_p),)\n"
        "path = build.cached_path(build.Unit(Path(sys.argv[1]), 'float32'), gxx.native_target(), gxx.native())\n"
        "library = SharedObject(path)\n"
        "for count in (1, 3):\n"
        "    torch.set_num_threads(count)\n"
        "    counts = torch.zeros(2, dtype=torch.int32)\n"
        "    library.launch('threads', (1, 1, 1), (1, 1, 1), Params(counts.data_ptr()))\n"
        "    assert counts.tolist() == [count, count], counts\n"
        "maps = Path('/proc/self/maps').read_text().split()\n"
        "libraries = {Path(word).resolve() for word in maps if 'libgomp' in word}\n"
        "assert libraries == {gxx.torch_openmp().resolve()}, libraries\n"
    )
    environment = {**os.environ, cache.FOLDER_VARIABLE: str(sources.parent / "kernel-cache")}
    command = [sys.executable, "-c", code, str(folder / "threads.cpp")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_another_processor_is_another_target(monkeypatch: pytest.MonkeyPatch) -> None:
    here = gxx.native_target()
    assert here == gxx.native_target()
    monkeypatch.setattr(gxx, "_processor", lambda: "flags: avx1024")
    assert gxx.native_target() != here


# --- nvcc ---


def test_nvcc_compiles_for_every_architecture_at_once(sources: Path, kernel_cache: Path, the_nvcc: nvcc.Nvcc) -> None:
    unit = Unit(sources / "scale.cu", "float16")
    jobs = [(unit, target) for target in TARGETS]
    done: list[None] = []
    nvcc.build_all(the_nvcc, build.missing_entries(jobs, the_nvcc), lambda: done.append(None))
    assert len(done) == len(TARGETS)
    for target in TARGETS:
        found = build.stored(unit, target, build.device_flags(unit))
        assert found is not None
        check_image(found[0], target)
    assert build.missing_entries(jobs, the_nvcc) == []
    cache.list_entries(kernel_cache)[0].write_bytes(b"damaged")
    assert len(build.missing_entries(jobs, the_nvcc)) == 1


def test_a_unit_that_does_not_compile_stops_no_other(sources: Path, kernel_cache: Path, the_nvcc: nvcc.Nvcc) -> None:
    broken(sources)
    jobs = [(unit, "sm_90") for unit in build.units(sources, ["float32"])]
    with pytest.raises(BuildError, match=r"nvcc failed to compile some units[^$]*undefined_name"):
        nvcc.build_all(the_nvcc, build.missing_entries(jobs, the_nvcc), lambda: None)
    assert [path.name.partition("-")[0] for path in cache.list_entries(kernel_cache)] == ["scale"]


def test_an_nvcc_that_hangs_is_ended(
    tmp_path: Path, sources: Path, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ninja")
    script = tmp_path / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in --version) echo V13.0.1;; --list-gpu-arch) echo compute_90;;\n'
        f"*) trap 'echo > {tmp_path}/ended; exit 1' TERM; sleep 60 & wait;; esac\n"
    )
    script.chmod(0o755)
    hanging = nvcc.Nvcc(str(script))
    missing = build.missing_entries([(build.Unit(sources / "scale.cu", "float32"), "sm_90")], hanging)
    monkeypatch.setattr(build, "COMPILE_TIMEOUT_S", 0.5)
    with pytest.raises(build.BuildError, match="nvcc has compiled nothing for 0 s"):
        nvcc.build_all(hanging, missing, lambda: None)
    deadline = time.monotonic() + 10
    while not (tmp_path / "ended").exists():
        assert time.monotonic() < deadline, "nvcc goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("target", ["sm_90", "compute_90"])
def test_nvcc_compiles_one(sources: Path, the_nvcc: nvcc.Nvcc, target: str) -> None:
    check_image(the_nvcc.compile(Unit(sources / "scale.cu", "bfloat16"), target), target)
    with pytest.raises(BuildError, match=rf"failed to compile broken-float32 for {target}[^$]*undefined_name"):
        the_nvcc.compile(broken(sources), target)


def test_nvcc_tells_what_a_kernel_takes(sources: Path, the_nvcc: nvcc.Nvcc) -> None:
    (sources / "greedy.cu").write_text(
        'extern "C" __global__ void greedy(float* x, int n) {\n'
        "    __shared__ float tile[300]; volatile float local[64];\n"
        "    for (int i = 0; i < n; i++) local[i] = tile[i] = x[i];\n"
        "    for (int i = 0; i < n; i++) x[i] = local[n - i] + tile[n - i];\n"
        "}\n"
        'extern "C" __global__ void modest(float* x) { x[threadIdx.x] = 0; }\n'
    )
    usage = the_nvcc.usage(Unit(sources / "greedy.cu", "float32"), "sm_90")
    assert usage["greedy"].shared_bytes == 1200
    assert usage["greedy"].stack_bytes == 256
    assert usage["modest"].stack_bytes == usage["modest"].shared_bytes == usage["modest"].spill_store_bytes == 0
    assert 0 < usage["modest"].registers < usage["greedy"].registers


def test_an_old_device_is_named(the_nvcc: nvcc.Nvcc) -> None:
    with pytest.raises(BuildError, match=r"the device has 3\.5; install an older CUDA toolkit"):
        the_nvcc.target(35)


# --- NVRTC ---


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scalar", ["float16", "float64"])
def test_nvrtc_compiles_for_every_architecture(sources: Path, the_nvrtc: nvrtc.Nvrtc, target: str, scalar: str) -> None:
    check_image(the_nvrtc.compile(Unit(sources / "scale.cu", scalar), target), target)


def test_nvrtc_tells_what_is_wrong(sources: Path, the_nvrtc: nvrtc.Nvrtc) -> None:
    with pytest.raises(BuildError, match=r"failed to compile broken-float32 for sm_90[^$]*undefined_name") as caught:
        the_nvrtc.compile(broken(sources), "sm_90")
    assert "broken.cu(2)" in caught.value.log
    with pytest.raises(BuildError, match=r"the device has 3\.5; install a torch of an older CUDA"):
        the_nvrtc.target(35)


def test_nvrtc_compiles_many_at_once(sources: Path, kernel_cache: Path, the_nvrtc: nvrtc.Nvrtc) -> None:
    jobs = [(unit, "sm_90") for unit in build.units(sources)]
    done: list[None] = []
    nvrtc.build_all(the_nvrtc, build.missing_entries(jobs, the_nvrtc), lambda: done.append(None))
    assert len(done) == len(jobs) == len(build.SCALARS)
    assert build.missing_entries(jobs, the_nvrtc) == []


# A library that any machine can have: it accepts all and gives back what it was given.
FAKE_NVRTC = r"""
#include <cstring>
#include <string>
struct Program { std::string source, name, output, log; };
extern "C" {
const char* nvrtcGetErrorString(int error) { return error ? "NVRTC_ERROR_SOMETHING" : "NVRTC_SUCCESS"; }
int nvrtcVersion(int* major, int* minor) { return *major = 12, *minor = 8, 0; }
int nvrtcGetNumSupportedArchs(int* count) { return *count = 2, 0; }
int nvrtcGetSupportedArchs(int* archs) { return archs[0] = 80, archs[1] = 90, 0; }
int nvrtcCreateProgram(Program** p, const char* source, const char* name, int n, const char** texts,
                       const char** names) {
    *p = new Program{source, name};
    for (int i = 0; i < n; i++) (*p)->output += std::string(names[i]) + "=" + texts[i] + "\n";
    return 0;
}
int nvrtcDestroyProgram(Program** p) { return delete *p, 0; }
int nvrtcCompileProgram(Program* p, int n, const char** options) {
    p->log = p->name + "(1): error: it is bad\n";
    for (int i = 0; i < n; i++) p->output += std::string(options[i]) + "\n";
    return p->source == "bad" ? 6 : 0;
}
int nvrtcGetProgramLogSize(Program* p, std::size_t* size) { return *size = p->log.size() + 1, 0; }
int nvrtcGetProgramLog(Program* p, char* log) { return std::strcpy(log, p->log.c_str()), 0; }
int nvrtcGetCUBINSize(Program* p, std::size_t* size) { return *size = p->output.size(), 0; }
int nvrtcGetCUBIN(Program* p, char* to) { return std::memcpy(to, p->output.data(), p->output.size()), 0; }
int nvrtcGetPTXSize(Program* p, std::size_t* size) { return *size = 4, 0; }
int nvrtcGetPTX(Program* p, char* to) { return std::strcpy(to, "ptx"), p->source == "no ptx" ? 3 : 0; }
}
"""


@pytest.fixture
def fake_nvrtc(tmp_path: Path, cxx, monkeypatch: pytest.MonkeyPatch) -> nvrtc.Nvrtc:
    (tmp_path / "fake.cpp").write_text(FAKE_NVRTC)
    command = [*cxx, "-shared", "-fPIC", "-o", "libnvrtc.so.12", "fake.cpp"]
    subprocess.run(command, check=True, cwd=tmp_path)
    monkeypatch.setenv(nvrtc.LIBRARY_VARIABLE, str(tmp_path / "libnvrtc.so.12"))
    nvrtc.find_nvrtc.cache_clear()
    found = nvrtc.find_nvrtc()
    nvrtc.find_nvrtc.cache_clear()
    return found


def test_nvrtc_is_given_headers_and_options(tmp_path: Path, fake_nvrtc: nvrtc.Nvrtc) -> None:
    assert (fake_nvrtc.version, fake_nvrtc.supported) == ("12.8", [80, 90])
    assert [fake_nvrtc.target(capability) for capability in (86, 90, 120)] == ["sm_80", "sm_90", "compute_90"]
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "common.cuh").write_text("text")
    unit = Unit(folder / "kernel.cu", "float16")
    unit.source.write_text("good")
    lines = fake_nvrtc.compile(unit, "sm_90").decode().splitlines()
    assert lines[0] == "common.cuh=text"
    assert {"--define-macro=SCALAR=float16", "--gpu-architecture=sm_90"} < set(lines)
    assert fake_nvrtc.compile(unit, "compute_90") == b"ptx\0"
    unit.source.write_text("no ptx")
    with pytest.raises(BuildError, match="nvrtcGetPTX: NVRTC_ERROR_SOMETHING"):
        fake_nvrtc.compile(unit, "compute_90")
    unit.source.write_text("bad")
    with pytest.raises(BuildError, match=r"12\.8 failed to compile kernel-float16 for sm_90\n  kernel\.cu\(1\): error"):
        fake_nvrtc.compile(unit, "sm_90")


def test_a_named_library_must_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libnvrtc.so.12").write_text("no library")
    monkeypatch.setenv(nvrtc.LIBRARY_VARIABLE, str(tmp_path / "libnvrtc.so.12"))
    nvrtc.find_nvrtc.cache_clear()
    with pytest.raises(UserError, match=r"STYLEPIPE_NVRTC=.*expected the file of an NVRTC library"):
        nvrtc.find_nvrtc()
