"""What `stylepipe doctor` finds of torch, GPUs, and what compiles and keeps kernels for them."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from stylepipe.cli.finding import Finding, describe
from stylepipe.errors import UserError
from stylepipe.kernels import build, gxx
from stylepipe.kernels.cache import FOLDER_VARIABLE, cache_folder, list_entries
from stylepipe.kernels.driver import default_driver
from stylepipe.kernels.nvcc import find_nvcc
from stylepipe.kernels.nvrtc import find_nvrtc
from stylepipe.training.memory import GIB

BUSY_BYTES = 2 * GIB
"""What may be taken of a GPU's memory before it is worth a note; a part of it is this process's own context."""

_NVIDIA_VENDOR, _DISPLAY_CLASS = "0x10de", "0x03"  # of PCI devices


@dataclass(frozen=True)
class Gpus:
    """How many GPUs torch can use, and what it said when there were none."""

    count: int
    complaint: str = ""


def look_for_gpus() -> Gpus:
    """Ask torch for GPUs. It counts them once in a process, and only then says what is in the way."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        except RuntimeError as error:
            return Gpus(0, describe(error))
    return Gpus(count, "" if count or not said else str(said[0].message).partition(" (Triggered")[0])


def torch_build() -> Finding:
    """Name torch's version and what it was built for."""
    if torch.version.hip:
        kind = f"ROCm {torch.version.hip}"
    elif torch.version.cuda:
        kind = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version() or 'missing'}"
    else:
        kind = "CPUs"
    return Finding("torch", "ok", f"{torch.__version__}, built for {kind}")


# --- GPUs ---


def gpus(found: Gpus) -> Finding:
    """Name the GPUs, and compute something on each."""
    if found.count == 0:
        return _no_gpu(found.complaint, has_nvidia_gpu())
    kinds: Counter[str] = Counter()
    busy = []
    for index in range(found.count):
        try:
            of = torch.cuda.get_device_properties(index)
            if (torch.ones(2, device=f"cuda:{index}") * 2).sum().item() != 4:
                raise RuntimeError("it computes wrongly")
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            text = f"{found.count}, of which number {index} does not work ({describe(error)})"
            remedy = "see what nvidia-smi and the system's log (dmesg) say; a GPU newer than torch needs a newer torch"
            return Finding("GPUs", "problem", text, remedy)
        kinds[f"{of.name}, {total / GIB:.0f} GiB, compute capability {of.major}.{of.minor}"] += 1
        if total - free > BUSY_BYTES:
            busy.append(f"number {index} has {free / GIB:.1f} GiB free")
    text = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if busy:
        remedy = "nvidia-smi names the processes that hold the memory"
        return Finding("GPUs", "note", "; ".join([text, *busy]), remedy)
    return Finding("GPUs", "ok", text)


def has_nvidia_gpu(system: Path = Path("/")) -> bool:
    """Tell whether this machine has an NVIDIA GPU, be there a driver for it or not, so far as the system tells."""
    if any((system / "proc/driver/nvidia/gpus").glob("*")):
        return True
    for device in (system / "sys/bus/pci/devices").glob("*"):
        vendor, kind = ((device / name).read_text() for name in ("vendor", "class"))
        if vendor.startswith(_NVIDIA_VENDOR) and kind.startswith(_DISPLAY_CLASS):
            return True
    return False


def _no_gpu(complaint: str, has_one: bool) -> Finding:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        text = f"hidden by CUDA_VISIBLE_DEVICES={visible}; training runs on the CPU"
        return Finding("GPUs", "note", text)
    if not has_one:
        return Finding("GPUs", "note", "none; training runs on the CPU")
    if torch.version.cuda is None and not torch.version.hip:
        text = "this machine has an NVIDIA GPU, and this torch is built for CPUs: training would run on the CPU"
        remedy = "pip uninstall torch, then pip install torch: what PyPI has for Linux is built for CUDA"
        return Finding("GPUs", "problem", text, remedy)
    text = "this machine has an NVIDIA GPU, and torch cannot use it: training would run on the CPU"
    remedy = "nvidia-smi should list it; a container has to be given it (docker run --gpus all, apptainer --nv)"
    return Finding("GPUs", "problem", f"{text} ({complaint})" if complaint else text, remedy)


def driver(found: Gpus) -> Finding:
    """Name the GPU driver and the CUDA version that it goes up to; see whether both torch and kernels can use it."""
    cuda, version = cuda_of_driver(), version_of_driver()
    name = f"{version or 'NVIDIA'}, for CUDA up to {cuda}" if cuda else f"{version}, without libcuda.so.1"
    if cuda is None and version is None:
        return Finding("driver", "ok" if not found.count else "note", "none, which GPUs would need")
    built_for = torch.version.cuda
    if cuda and built_for and int(cuda.split(".")[0]) < int(built_for.split(".")[0]):
        remedy = f"install a driver of CUDA {built_for.split('.')[0]}, or a torch built for CUDA {cuda.split('.')[0]}"
        return Finding("driver", "problem", f"{name}: too old for a torch built for CUDA {built_for}", remedy)
    if found.count:
        try:
            default_driver()
        except RuntimeError as error:
            return Finding("driver", "problem", f"{name}: kernels cannot be launched ({error})")
    return Finding("driver", "ok", name)


def cuda_of_driver(path: str = "libcuda.so.1") -> str | None:
    """Return the newest CUDA version that the driver supports, as 13.0; None without a driver's library."""
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def version_of_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of NVIDIA's kernel module, as 580.65.06; None where it is not loaded."""
    try:
        match = re.search(r"\b\d+\.\d[\d.]*", path.read_text())
    except OSError:
        return None
    return match[0] if match else None


# --- compilers, and where they leave kernels ---


def nvrtc(found: Gpus) -> Finding:
    """Name the NVRTC library that would be used; without one, the ops' lines tell whether it is missed."""
    try:
        library = find_nvrtc()
    except UserError as error:  # it stops every use of a GPU
        return Finding("NVRTC", "problem" if found.count else "note", str(error))
    except build.BuildError:
        if found.count == 0:
            return Finding("NVRTC", "ok", "none, which GPUs would need")
        return Finding("NVRTC", "note", "none", "install a CUDA build of torch, which brings it")
    return Finding("NVRTC", "ok", f"{library.version}, {library.path}")


def nvcc() -> Finding:
    """Name the nvcc that would be used; none is needed."""
    try:
        compiler = find_nvcc()
    except build.BuildError as error:
        if error.command:  # there is one, and it does not run
            return Finding("nvcc", "note", str(error))
        return Finding("nvcc", "ok", "none, which only builds without NVRTC would need")
    return Finding("nvcc", "ok", f"{compiler.version}, {compiler.path}")


def cxx(found: Gpus) -> Finding:
    """Name the C++ compiler that would be used; training on a CPU is slower without one."""
    try:
        compiler = gxx.native()
    except build.BuildError as error:
        if found.count:
            return Finding("C++", "ok", "no compiler, which only CPUs and nvcc would need")
        remedy = "install g++, or name a compiler in CXX: training on the CPU is faster with one"
        return Finding("C++", "note", str(error), remedy)
    path = shutil.which(compiler.command[0]) or ""
    return Finding("C++", "ok", f"{compiler.name} {compiler.version}, {shlex.join([path, *compiler.command[1:]])}")


def kernel_cache() -> Finding:
    """Count the compiled kernels that are kept, and write to their folder."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"stylepipe")
    except OSError as error:
        text, remedy = f"{folder} cannot be written ({error.strerror or error})", "name a folder that can be written in"
        if count := sum(os.access(path, os.R_OK) for path in list_entries(folder)):
            text = f"{text}: what it holds serves ({count} compiled), every process compiles the rest anew"
            return Finding("kernel cache", "note", text, f"where some are missing, {remedy} {FOLDER_VARIABLE}")
        text = f"{text}: every process compiles kernels anew"
        return Finding("kernel cache", "problem", text, f"{remedy} {FOLDER_VARIABLE}")
    entries = list_entries(folder)
    megabytes = sum(path.stat().st_size for path in entries) / 1e6
    return Finding("kernel cache", "ok", f"{folder}: {len(entries)} compiled, {megabytes:.1f} MB")
