"""What `stylepipe doctor` says of torch, GPUs, compilers and ops, on machines made up for it and of wrong kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stylepipe.cli import doctor_device, doctor_ops
from stylepipe.cli.doctor_device import Gpus
from stylepipe.cli.finding import Finding
from stylepipe.errors import UserError
from stylepipe.kernels import build, gxx, native
from stylepipe.kernels.build import BuildError, Unit
from stylepipe.kernels.cache import FOLDER_VARIABLE, write_entry
from stylepipe.kernels.host import SharedObject
from stylepipe.training.exact import full_float32

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NONE, ONE = Gpus(0), Gpus(1)
BY_NAME = {test.name: test for test in doctor_ops.SELF_TESTS}


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("STYLEPIPE_KERNELS", "CUDA_VISIBLE_DEVICES", "STYLEPIPE_NVRTC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kernels"))
    native.forget()
    yield
    monkeypatch.undo()
    native.forget()


def raising(error: Exception):
    def raise_(*_, **__):
        raise error

    return raise_


# --- torch and GPUs ---


@pytest.mark.parametrize(
    ("cuda", "hip", "text"),
    [
        (None, None, "built for CPUs"),
        ("13.0", None, "built for CUDA 13.0, cuDNN "),
        (None, "6.4", "built for ROCm 6.4"),
    ],
)
def test_torch(monkeypatch, cuda, hip, text) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    finding = doctor_device.torch_build()
    assert finding.state == "ok"
    assert finding.text.startswith(f"{torch.__version__}, {text}")


def test_what_torch_says_of_missing_gpus_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver is too old (Triggered internally at x.cpp:1.)", UserWarning)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert doctor_device.look_for_gpus() == Gpus(0, "CUDA initialization: the driver is too old")
    monkeypatch.setattr(torch.cuda, "is_available", raising(RuntimeError("broken\nC++ trace")))
    assert doctor_device.look_for_gpus() == Gpus(0, "RuntimeError: broken")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert doctor_device.look_for_gpus() == Gpus(4)


def machine(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int], free: float = 79) -> None:
    """Make torch see GPUs of 80 GiB, on which it computes with the CPU."""

    def properties(index: int) -> SimpleNamespace:
        major, minor = capabilities[index]
        return SimpleNamespace(name=f"GPU {major}", major=major, minor=minor)

    memory = int(free * 2**30), 80 * 2**30
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: memory)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (9, 0), (9, 0), (8, 0))
    text = "2 x GPU 9, 80 GiB, compute capability 9.0; 1 x GPU 8, 80 GiB, compute capability 8.0"
    assert doctor_device.gpus(Gpus(3)) == Finding("GPUs", "ok", text)


def test_a_gpu_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (9, 0), free=20)
    finding = doctor_device.gpus(ONE)
    assert finding.state == "note"
    assert finding.text.endswith("number 0 has 20.0 GiB free")
    assert "nvidia-smi" in finding.remedy


def test_a_gpu_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, (9, 0), (12, 0))
    monkeypatch.setattr(torch, "ones", raising(RuntimeError("CUDA error: no kernel image is available\nCompile with")))
    finding = doctor_device.gpus(Gpus(2))
    assert finding.state == "problem"
    assert "number 0 does not work (RuntimeError: CUDA error: no kernel image is available)" in finding.text
    machine(monkeypatch, (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(*size))
    assert "computes wrongly" in doctor_device.gpus(ONE).text


@pytest.mark.parametrize(
    ("has_one", "cuda", "visible", "state", "said"),
    [
        (False, None, None, "note", "none; training runs on the CPU"),
        (False, "13.0", None, "note", "none; training runs on the CPU"),
        (True, None, None, "problem", "this torch is built for CPUs"),
        (True, "13.0", None, "problem", "torch cannot use it: training would run on the CPU (no driver)"),
        (True, "13.0", "", "note", "hidden by CUDA_VISIBLE_DEVICES=;"),
        (True, None, "-1", "note", "hidden by CUDA_VISIBLE_DEVICES=-1;"),
        (True, "13.0", "0", "problem", "torch cannot use it"),
    ],
)
def test_no_gpu(monkeypatch, has_one, cuda, visible, state, said) -> None:
    monkeypatch.setattr(doctor_device, "has_nvidia_gpu", lambda: has_one)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = doctor_device.gpus(Gpus(0, "no driver"))
    assert finding.state == state
    assert said in finding.text
    assert bool(finding.remedy) == (state == "problem")


def test_a_gpu_is_found_without_its_driver(tmp_path: Path) -> None:
    assert not doctor_device.has_nvidia_gpu(tmp_path)
    for address, vendor, kind in (("00", "0x8086", "0x030000"), ("01", "0x10de", "0x040300")):  # Intel's; sound
        folder = tmp_path / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    assert not doctor_device.has_nvidia_gpu(tmp_path)
    (tmp_path / "sys/bus/pci/devices/01/class").write_text("0x030200\n")
    assert doctor_device.has_nvidia_gpu(tmp_path)
    (tmp_path / "other/proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    assert doctor_device.has_nvidia_gpu(tmp_path / "other")


@pytest.mark.parametrize(
    ("gpus", "cuda", "version", "built_for", "state", "text"),
    [
        (0, None, None, None, "ok", "none, which GPUs would need"),
        (1, None, None, "13.0", "note", "none, which GPUs would need"),
        (1, "13.0", "580.65.06", "13.0", "ok", "580.65.06, for CUDA up to 13.0"),
        (1, "12.8", None, "12.4", "ok", "NVIDIA, for CUDA up to 12.8"),
        (0, None, "580.65.06", None, "ok", "580.65.06, without libcuda.so.1"),
        (0, "12.8", "570.1", "13.0", "problem", "570.1, for CUDA up to 12.8: too old for a torch built for CUDA 13.0"),
    ],
)
def test_driver(monkeypatch, gpus, cuda, version, built_for, state, text) -> None:
    monkeypatch.setattr(doctor_device, "cuda_of_driver", lambda: cuda)
    monkeypatch.setattr(doctor_device, "version_of_driver", lambda: version)
    monkeypatch.setattr(doctor_device, "default_driver", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    finding = doctor_device.driver(Gpus(gpus))
    assert (finding.state, finding.text) == (state, text)
    assert bool(finding.remedy) == (state == "problem")


def test_a_driver_that_cannot_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_device, "cuda_of_driver", lambda: "11.8")
    monkeypatch.setattr(doctor_device, "version_of_driver", lambda: "520.1")
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    monkeypatch.setattr(
        doctor_device, "default_driver", raising(RuntimeError("no cuLibraryLoadData; install a driver"))
    )
    finding = doctor_device.driver(ONE)
    assert finding.state == "problem"
    assert finding.text.endswith("kernels cannot be launched (no cuLibraryLoadData; install a driver)")


def test_the_versions_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cxx: str) -> None:
    file = tmp_path / "version"
    assert doctor_device.version_of_driver(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12\n"
    )
    assert doctor_device.version_of_driver(file) == "580.65.06"
    file.write_text("nothing")
    assert doctor_device.version_of_driver(file) is None
    assert doctor_device.cuda_of_driver(str(tmp_path / "libcuda.so.1")) is None
    for code, expected in ((0, "12.8"), (34, None)):  # 34: a stub library
        source, library = tmp_path / f"{code}.c", tmp_path / f"{code}.so"
        source.write_text(f'extern "C" int cuDriverGetVersion(int* v) {{ *v = 12080; return {code}; }}\n')
        build.run_compiler([cxx, "-x", "c++", "-shared", "-fPIC", str(source), "-o", str(library)], "a stub")
        assert doctor_device.cuda_of_driver(str(library)) == expected


@pytest.fixture
def cxx() -> str:
    try:
        return gxx.native().command[0]
    except BuildError as error:
        pytest.skip(str(error))


# --- compilers and their cache ---


def test_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor_device, "find_nvrtc", lambda: SimpleNamespace(version="13.0", path="/lib/libnvrtc.so.13")
    )
    assert doctor_device.nvrtc(ONE) == Finding("NVRTC", "ok", "13.0, /lib/libnvrtc.so.13")
    monkeypatch.setattr(doctor_device, "find_nvrtc", raising(BuildError("no NVRTC library found")))
    assert doctor_device.nvrtc(NONE).state == "ok"
    assert doctor_device.nvrtc(ONE).state == "note"
    monkeypatch.setattr(doctor_device, "find_nvrtc", raising(UserError("STYLEPIPE_NVRTC=/x: expected the file")))
    assert doctor_device.nvrtc(NONE).state == "note"
    assert doctor_device.nvrtc(ONE) == Finding("NVRTC", "problem", "STYLEPIPE_NVRTC=/x: expected the file")


def test_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_device, "find_nvcc", lambda: SimpleNamespace(version="13.0.88", path="/bin/nvcc"))
    assert doctor_device.nvcc() == Finding("nvcc", "ok", "13.0.88, /bin/nvcc")
    monkeypatch.setattr(doctor_device, "find_nvcc", raising(BuildError("no nvcc found")))
    assert doctor_device.nvcc() == Finding("nvcc", "ok", "none, which only builds without NVRTC would need")
    broken = BuildError("/bin/nvcc cannot be run", ["/bin/nvcc", "--version"])
    monkeypatch.setattr(doctor_device, "find_nvcc", raising(broken))
    assert doctor_device.nvcc() == Finding("nvcc", "note", "/bin/nvcc cannot be run")


def test_cxx(monkeypatch: pytest.MonkeyPatch, cxx: str) -> None:
    finding = doctor_device.cxx(NONE)
    assert finding.state == "ok"
    assert cxx in finding.text
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor_device.cxx(ONE).state == "ok"
    finding = doctor_device.cxx(NONE)
    assert finding.state == "note"
    assert "no-such-compiler" in finding.text
    assert "g++" in finding.remedy


def test_the_kernel_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert doctor_device.kernel_cache() == Finding("kernel cache", "ok", f"{folder}: 0 compiled, 0.0 MB")
    entry = "epilogue-float32-sm_90-0123456789abcdef.nvrtc-13.0.cubin"
    write_entry(folder / entry, b"0" * 1_500_000)
    assert doctor_device.kernel_cache().text == f"{folder}: 1 compiled, 1.5 MB"
    assert sorted(path.name for path in folder.iterdir()) == [entry]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    finding = doctor_device.kernel_cache()
    assert finding.state == "problem"
    assert f"{tmp_path / 'file'} cannot be written (" in finding.text
    assert FOLDER_VARIABLE in finding.remedy


@pytest.mark.usefixtures("bound_by_permissions")
def test_a_read_only_kernel_cache_serves_with_what_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    write_entry(folder / "epilogue-float32-sm_90-0123456789abcdef.nvrtc-13.0.cubin", b"0")
    folder.chmod(0o555)
    finding = doctor_device.kernel_cache()
    assert finding.state == "note"
    assert "cannot be written (Permission denied): what it holds serves (1 compiled)" in finding.text
    folder.chmod(0o755)
    for entry in folder.iterdir():
        entry.unlink()
    folder.chmod(0o555)
    finding = doctor_device.kernel_cache()
    assert finding.state == "problem"
    assert "every process compiles kernels anew" in finding.text


# --- ops ---


def test_the_device_of_training() -> None:
    assert doctor_ops.device_of(0) == CPU
    assert doctor_ops.device_of(2) == GPU


def test_the_ops_of_a_cpu(cxx: str) -> None:
    finding = doctor_ops.choices(CPU)
    assert finding.state == "ok"
    assert "bias_act, styled_act compiled: " in finding.text
    assert all(doctor_ops.op(test, CPU).state == "ok" for test in doctor_ops.SELF_TESTS)
    assert doctor_ops.op(BY_NAME["bias_act"], CPU).text.startswith("compiled, off by ")


def test_the_ops_of_a_cpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = doctor_ops.choices(CPU)
    assert finding.state == "note"
    assert "PyTorch: no C++ compiler found" in finding.text
    for test in doctor_ops.SELF_TESTS:
        finding = doctor_ops.op(test, CPU)
        assert finding.state == "ok"
        assert finding.text.startswith("PyTorch, off by ")


def test_pytorch_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEPIPE_KERNELS", "torch")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: True)
    assert doctor_ops.choices(CPU) == Finding("kernels", "note", "PyTorch: STYLEPIPE_KERNELS=torch")
    assert doctor_ops.choices(GPU) == Finding("kernels", "note", "PyTorch: STYLEPIPE_KERNELS=torch")


def test_a_word_that_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEPIPE_KERNELS", "gpu")
    message = "STYLEPIPE_KERNELS=gpu: expected one of auto, cuda, torch"
    assert doctor_ops.choices(CPU) == Finding("kernels", "problem", message)
    finding = doctor_ops.op(BY_NAME["bias_act"], CPU)
    assert finding == Finding("bias_act", "problem", "cannot run, see kernels")


@pytest.fixture
def gpu_without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for name in ("find_nvrtc", "find_nvcc"):
        find = cache(raising(BuildError(f"no {name[5:]} found")))
        monkeypatch.setattr(native, name, find)


@pytest.mark.usefixtures("gpu_without_compilers")
def test_a_gpu_without_kernels_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        finding = doctor_ops.choices(GPU)
    assert finding.state == "problem"
    assert finding.text.startswith("PyTorch: no nvrtc found; no nvcc found; install a CUDA build of torch")
    native.forget()
    monkeypatch.setenv("STYLEPIPE_KERNELS", "cuda")
    finding = doctor_ops.choices(GPU)
    assert finding.state == "problem"
    assert "STYLEPIPE_KERNELS=auto goes on" in finding.text
    assert doctor_ops.op(BY_NAME["act_fir"], GPU) == Finding("act_fir", "problem", "cannot run, see kernels")


def test_a_gpu_with_kernels_is_in_order() -> None:
    with native.use(lambda *_: SimpleNamespace(threads=256)):  # type: ignore[arg-type,return-value]
        assert doctor_ops.choices(CPU).state == "ok"


@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_wrong_op_is_a_problem(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(doctor_ops, name)

    def wrong(x, *arguments, **options):
        """Be off by 1 in 10,000, in float32 only."""
        return right(x if x.dtype == torch.float64 else x * 1.0001, *arguments, **options)

    monkeypatch.setattr(doctor_ops, name, wrong)
    finding = doctor_ops.op(BY_NAME[name], CPU)
    assert finding.state == "problem"
    assert "(float32, limit 1e-05)" in finding.text
    assert "stylepipe doctor --json" in finding.remedy


def test_wrong_gradients_and_nan_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEPIPE_KERNELS", "torch")
    right = doctor_ops.bias_act

    def no_gradient_by_x(x, b, **options):
        return right(x if x.dtype == torch.float64 else x.detach() + 0 * x, b, **options)

    def nan_somewhere(x, b, **options):
        y = right(x, b, **options)
        return y if x.dtype == torch.float64 else y.where(y != y.max(), torch.nan)

    for wrong in (no_gradient_by_x, nan_somewhere):
        monkeypatch.setattr(doctor_ops, "bias_act", wrong)
        finding = doctor_ops.op(BY_NAME["bias_act"], CPU)
        assert finding.state == "problem", finding
        assert "STYLEPIPE_KERNELS" not in finding.remedy  # there is nothing to do without


def test_an_op_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_ops, "act_fir", raising(RuntimeError("cuLaunchKernel: CUDA_ERROR\nmore")))
    finding = doctor_ops.op(BY_NAME["act_fir"], CPU)
    assert finding.state == "problem"
    assert finding.text == "fails (RuntimeError: cuLaunchKernel: CUDA_ERROR)"


def test_types(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_ops.types_of(CPU) == [torch.float32]
    for has_bfloat16, half in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, has=has_bfloat16: has)
        assert doctor_ops.types_of(GPU) == [torch.float32, half]


def test_each_type_is_looked_at_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_ops, "types_of", lambda device: [torch.float32, torch.bfloat16])
    monkeypatch.setattr(doctor_ops, "worst_error", lambda test, dtype, device: 0.0)
    test = BY_NAME["bias_act"]
    for have, told in (
        ({torch.bfloat16}, "PyTorch in float32, compiled in bfloat16, off by 0 (float32, limit 1e-05), 0 (bfloat16,"),
        ({torch.float32}, "compiled in float32, PyTorch in bfloat16, off by 0 (float32, limit 1e-05)"),
        ({torch.float32, torch.bfloat16}, "compiled, off by 0 (float32, limit 1e-05), 0 (bfloat16,"),
    ):
        chosen = lambda source, dtype, device, have=have: SimpleNamespace() if dtype in have else None  # noqa: E731
        monkeypatch.setattr(native, "library", chosen)
        assert doctor_ops.op(test, CPU).text.startswith(told)
        monkeypatch.setattr(native, "explain", lambda *of: f"{'compiled' if chosen(*of) else 'PyTorch'}: as told")  # noqa: B023
        assert ("PyTorch: as told" in doctor_ops.choices(CPU).text) == (len(have) == 1)


def test_cuda_kernels_without_a_gpu_stop_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STYLEPIPE_KERNELS", "cuda")
    finding = doctor_ops.choices(CPU)
    assert finding.state == "problem"
    assert "STYLEPIPE_KERNELS=cuda, and there is no GPU to train on" in finding.text
    assert finding.remedy == "unset STYLEPIPE_KERNELS to train on the CPU"


def test_on_a_gpu_float32_is_not_rounded_to_tf32_meanwhile() -> None:
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with full_float32(GPU):
            assert matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.slow  # compiles nine units
@pytest.mark.parametrize("dtype", list(doctor_ops.TOLERANCES), ids=str)
def test_the_kernels_of_gpus_pass_in_every_type(dtype: torch.dtype, cxx: str) -> None:
    @cache
    def shim(source: str, dtype: torch.dtype, device: torch.device) -> SharedObject | None:
        unit = Unit(build.CUDA_SOURCES / f"{source}.cu", native.SCALAR_OF[dtype])
        return SharedObject(build.cached_path(unit, gxx.HOST_TARGET, gxx.host_shim()))

    with native.use(shim):
        for test in doctor_ops.SELF_TESTS:
            error = doctor_ops.worst_error(test, dtype, CPU)
            assert error <= doctor_ops.TOLERANCES[dtype] / 2, test.name
