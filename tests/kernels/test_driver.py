"""The launch path of GPUs, on a driver of our own: a libcuda whose kernels are shared objects of the host shim."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from stylepipe.kernels import build, gxx
from stylepipe.kernels.driver import Cubin, Driver
from stylepipe.kernels.host import SharedObject

# An image is the path of a shared object. What a test wants to know is written into `seen`.
FAKE_DRIVER = r"""
#include <dlfcn.h>
#include <cstddef>
#include <cstring>

using Kernel = void (*)(const unsigned*, const unsigned*, const void*);
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500 };

extern "C" {

struct Seen { int loads, look_ups, launches, retained; void* context; void* stream; } seen;
static thread_local void* stack[8];
static thread_local int depth;
static char contexts[4];
static Kernel found[16];
static unsigned sizes[16];
static int kernels;

void fake_make_current(int device) { stack[depth = 1] = device < 0 ? nullptr : &contexts[device]; }
void* fake_context(int device) { return &contexts[device]; }
int fake_depth() { return depth; }
Seen* fake_seen() { return &seen; }

int cuGetErrorName(int error, const char** name) {
    *name = error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : error == INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE"
          : error == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : nullptr;
    return *name ? SUCCESS : INVALID_VALUE;
}
int cuGetErrorString(int error, const char** text) {
    *text = error == INVALID_IMAGE ? "device kernel image is invalid" : error == NOT_FOUND ? "named symbol not found"
          : error == INVALID_VALUE ? "invalid argument" : nullptr;
    return *text ? SUCCESS : INVALID_VALUE;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
    seen.retained++;
    *context = &contexts[device];
    return SUCCESS;
}
int cuCtxGetCurrent(void** context) { return *context = stack[depth], SUCCESS; }
int cuCtxPushCurrent_v2(void* context) { return stack[++depth] = context, SUCCESS; }
int cuCtxPopCurrent_v2(void** context) { return *context = stack[depth--], SUCCESS; }
int cuLibraryLoadData(void** library, const char* image, int*, void**, unsigned, int*, void**, unsigned) {
    seen.loads++;
    *library = dlopen(image, RTLD_NOW);
    return *library ? SUCCESS : INVALID_IMAGE;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    seen.look_ups++;
    char sized[256];
    std::strcat(std::strcpy(sized, name), "_params_bytes");
    found[kernels] = Kernel(dlsym(library, name));
    if (!found[kernels]) return NOT_FOUND;
    sizes[kernels] = reinterpret_cast<unsigned (*)()>(dlsym(library, sized))();
    *kernel = &found[kernels++];
    return SUCCESS;
}
#ifndef OLD
int cuKernelGetParamInfo(void* kernel, std::size_t index, std::size_t* offset, std::size_t* size) {
    *offset = 0;
    *size = sizes[static_cast<Kernel*>(kernel) - found];
    return index == 0 ? SUCCESS : INVALID_VALUE;
}
#endif
#ifndef ANCIENT
int cuLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
    const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
    if (gx * gy * gz == 0 || bx * by * bz > 1024 || shared != 0 || extra != nullptr) return INVALID_VALUE;
    if (!stream && !stack[depth]) return INVALID_CONTEXT;
    seen.launches++;
    seen.context = stack[depth];
    seen.stream = stream;
    (*static_cast<Kernel*>(kernel))(grid, block, params[0]);
    return SUCCESS;
}
#endif

}
"""


class Seen(ctypes.Structure):
    _fields_ = (
        ("loads", ctypes.c_int),
        ("look_ups", ctypes.c_int),
        ("launches", ctypes.c_int),
        ("retained", ctypes.c_int),
        ("context", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


def compile_driver(folder: Path, *flags: str) -> Path:
    (folder / "driver.cpp").write_text(FAKE_DRIVER)
    command = [*gxx.host_shim().command, *flags, "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.cpp", "-ldl"]
    subprocess.run(command, check=True, cwd=folder)
    return folder / "libcuda.so.1"


@pytest.fixture
def fake(tmp_path: Path, cxx) -> ctypes.CDLL:
    fake = ctypes.CDLL(str(compile_driver(tmp_path)))
    fake.fake_seen.restype = ctypes.POINTER(Seen)
    fake.fake_context.restype = ctypes.c_void_p
    fake.fake_make_current(0)
    return fake


@pytest.fixture
def driver(fake: ctypes.CDLL, tmp_path: Path) -> Driver:
    return Driver(str(tmp_path / "libcuda.so.1"))


@pytest.fixture
def image(sources: Path, kernel_cache: Path) -> bytes:
    unit = build.Unit(sources / "scale.cu", "float32")
    return bytes(build.cached_path(unit, gxx.HOST_TARGET, gxx.host_shim()))


GRID, BLOCK = (2, 1, 1), (64, 1, 1)


def scaled(cubin, scale_params, gain: float, stream: int = 0) -> torch.Tensor:
    x, y = torch.arange(100.0), torch.zeros(100)
    cubin.launch("scale", GRID, BLOCK, scale_params(x.data_ptr(), y.data_ptr(), 100, gain), stream)
    assert torch.equal(y, gain * x)
    return y


def test_a_launch_passes_grid_block_and_parameters(fake, driver, image, scale_params) -> None:
    cubin = Cubin(image, 0, driver)
    scaled(cubin, scale_params, 3)
    scaled(cubin, scale_params, 4, stream=0x1234)
    seen = fake.fake_seen().contents
    assert (seen.loads, seen.look_ups, seen.launches, seen.stream) == (1, 1, 2, 0x1234)


def test_the_default_stream_is_that_of_the_image_s_device(fake, driver, image, scale_params) -> None:
    cubin = Cubin(image, 1, driver)
    scaled(cubin, scale_params, 2)
    assert fake.fake_seen().contents.context == fake.fake_context(1)
    assert fake.fake_depth() == 1  # and the caller's context is current again
    fake.fake_make_current(1)
    scaled(cubin, scale_params, 2)
    assert fake.fake_seen().contents.context == fake.fake_context(1)
    assert fake.fake_seen().contents.retained == 1


def test_a_thread_without_a_context_launches(fake, driver, image, scale_params) -> None:
    cubin = Cubin(image, 0, driver)
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(scaled(cubin, scale_params, 5)))
    thread.start()
    thread.join()
    assert results
    assert fake.fake_seen().contents.context == fake.fake_context(0)


def test_errors_name_the_kernel_and_say_what_the_driver_says(fake, driver, image, scale_params) -> None:
    cubin = Cubin(image, 0, driver)
    params = scale_params(0, 0, 0, 1)
    invalid = "CUDA_ERROR_INVALID_VALUE: invalid argument"
    with pytest.raises(RuntimeError, match=re.escape(f"scale, grid (0, 1, 1), block (64, 1, 1): {invalid}")):
        cubin.launch("scale", (0, 1, 1), BLOCK, params)
    with pytest.raises(RuntimeError, match="cuLibraryGetKernel of nothing: CUDA_ERROR_NOT_FOUND: named symbol"):
        cubin.launch("nothing", GRID, BLOCK, params)
    with pytest.raises(RuntimeError, match="cuLibraryLoadData: CUDA_ERROR_INVALID_IMAGE: device kernel"):
        Cubin(b"/nowhere/kernel.so", 0, driver)
    with pytest.raises(RuntimeError, match="surprise: error 999: error 999"):
        driver.check(999, "surprise")


class Short(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p),)


def test_parameters_of_another_size_are_refused(driver, image) -> None:
    message = "kernel scale takes 32 bytes of parameters, Short has 8"
    with pytest.raises(RuntimeError, match=message):
        Cubin(image, 0, driver).launch("scale", GRID, BLOCK, Short())
    with pytest.raises(RuntimeError, match=message):
        SharedObject(Path(image.decode())).launch("scale", GRID, BLOCK, Short())


def test_an_older_driver_launches_without_telling_sizes(tmp_path, image, scale_params) -> None:
    (tmp_path / "old").mkdir()
    scaled(Cubin(image, 0, Driver(str(compile_driver(tmp_path / "old", "-DOLD")))), scale_params, 2)


def test_a_driver_that_is_missing_or_too_old_is_named(tmp_path, cxx) -> None:
    with pytest.raises(RuntimeError, match=r"libcuda-nowhere\.so.*install NVIDIA's driver"):
        Driver("libcuda-nowhere.so")
    (tmp_path / "ancient").mkdir()
    with pytest.raises(RuntimeError, match="has no cuLaunchKernel; install a driver of CUDA 12 or newer"):
        Driver(str(compile_driver(tmp_path / "ancient", "-DANCIENT")))


def test_a_shared_object_launches_alike(image, scale_params) -> None:
    library = SharedObject(Path(image.decode()))
    scaled(library, scale_params, 3, stream=0x1234)
    with pytest.raises(RuntimeError, match="no kernel nothing"):
        library.launch("nothing", GRID, BLOCK, scale_params())


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((2**31, 1, 1), (1, 1, 1)),
        ((1, 65536, 1), (1, 1, 1)),
        ((1, 1, 65536), (1, 1, 1)),
        ((0, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (1, 0, 1)),
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (32, 33, 1)),
        ((1, 1, 1), (1, 1, 65)),
    ],
)
def test_the_shim_keeps_to_the_limits_of_gpus(image, scale_params, grid, block) -> None:
    refused = re.escape(f"scale, grid {grid}, block {block}: beyond what CUDA launches")
    with pytest.raises(RuntimeError, match=refused):
        SharedObject(Path(image.decode())).launch("scale", grid, block, scale_params(0, 0, 0, 1))


def test_the_shim_goes_as_far_as_the_limits(image, scale_params) -> None:
    library = SharedObject(Path(image.decode()))
    for grid, block in [((1, 65535, 1), (1, 1, 1)), ((1, 1, 65535), (1, 1, 1)), ((1, 1, 1), (4, 4, 64))]:
        library.launch("scale", grid, block, scale_params(0, 0, 0, 1))
    x, y = torch.arange(100.0), torch.zeros(100)
    library.launch("scale", (1, 1, 1), (1024, 1, 1), scale_params(x.data_ptr(), y.data_ptr(), 100, 3))
    assert torch.equal(y, 3 * x)


def test_kernels_of_the_cpu_know_no_such_limits(image, scale_params) -> None:
    library = SharedObject(Path(image.decode()), native=True)
    library.launch("scale", (1, 65536, 1), (1, 1, 1), scale_params(0, 0, 0, 1))
