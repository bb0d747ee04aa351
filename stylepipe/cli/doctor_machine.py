"""What `stylepipe doctor` finds of Python, processes, memory, disks, the dashboard's login and our variables."""

from __future__ import annotations

import configparser
import difflib
import importlib.metadata
import netrc
import os
import platform
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch

from stylepipe.cli.finding import Finding
from stylepipe.datasets import decoding
from stylepipe.datasets.processes import available_cpus
from stylepipe.errors import UserError
from stylepipe.files import CACHE_VARIABLE
from stylepipe.files import cache_folder as data_folder
from stylepipe.kernels import native
from stylepipe.kernels.cache import FOLDER_VARIABLE
from stylepipe.kernels.nvrtc import LIBRARY_VARIABLE
from stylepipe.metrics.weights import WEIGHTS_VARIABLE
from stylepipe.training.memory import GIB, free_memory

SHARED_MEMORY = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")

SHARED_MEMORY_WANTED = 1 * GIB
"""What NVIDIA tells containers with several GPUs to have, for NCCL."""
MEMORY_WANTED = 4 * GIB
DISK_NEEDED = 1 * GIB  # a state of a 1024 px model
DISK_WANTED = 20 * GIB  # three of them, network files, grids, and some room
TEMPORARY_NEEDED = GIB // 10

VARIABLES = (native.VARIABLE, FOLDER_VARIABLE, LIBRARY_VARIABLE, CACHE_VARIABLE, WEIGHTS_VARIABLE, "STYLEPIPE_DEBUG")
"""Every variable of our own."""
_PREFIX = "STYLEPIPE_"

_TOGETHER = ("MULTI_GPU", "FSDP", "DEEPSPEED", "MEGATRON_LM")
"""The kinds of start for which accelerate starts as many processes as it is told."""

_WANDB = "https://api.wandb.ai"
_WANDB_KEY_LENGTH = 40


def python() -> Finding:
    """Name Python, stylepipe and the system."""
    ours = importlib.metadata.version("stylepipe")
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()).strip() or 'libc unknown'}"
    return Finding("python", "ok", f"{platform.python_version()}, stylepipe {ours}, {system}")


# --- processes ---


def ninja() -> Finding:
    """Find ninja, which runs nvcc."""
    try:
        from ninja import BIN_DIR

        version = importlib.metadata.version("ninja")
    except ImportError as error:  # PackageNotFoundError is one
        return Finding("ninja", "note", f"missing ({error}): stylepipe kernels build needs it", "pip install ninja")
    if not shutil.which("ninja", path=BIN_DIR):
        remedy = "pip install --force-reinstall ninja"
        return Finding("ninja", "note", f"{version}, but {BIN_DIR} has no program: kernels build needs it", remedy)
    return Finding("ninja", "ok", version)


def accelerate(gpus: int, path: Path | None = None) -> Finding:
    """Read accelerate's own configuration, which `accelerate launch` follows where no flag says otherwise."""
    from accelerate.commands.config import config_args

    version = importlib.metadata.version("accelerate")
    path = Path(config_args.default_config_file) if path is None else path
    if not path.is_file():
        started = f"{gpus} processes, one per GPU" if gpus > 1 else "one process"
        return Finding("accelerate", "ok", f"{version}, no configuration file: accelerate launch starts {started}")
    remedy = "accelerate config asks anew; --config_file launch/accelerate/*.yaml takes another"
    try:
        config = config_args.load_config_from_file(str(path))
        processes, machines = int(config.num_processes), int(getattr(config, "num_machines", 1))
    except Exception as error:  # it raises whatever its parsing comes upon
        text = f"{version}, {path} cannot be read: accelerate launch would fail ({' '.join(str(error).split())})"
        return Finding("accelerate", "problem", text, remedy)
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    text = (
        f"{version}, {path}: {processes} process{'' if processes == 1 else 'es'}, "
        f"{machines} machine{'' if machines == 1 else 's'}, mixed precision {config.mixed_precision}"
    )
    if gpus and config.use_cpu:
        return Finding("accelerate", "problem", f"{text}; use_cpu: the GPUs would idle", remedy)
    if processes > 1 and kind not in _TOGETHER:
        return Finding("accelerate", "problem", f"{text}; distributed_type {kind} starts one process only", remedy)
    per_machine = processes // max(machines, 1)
    if gpus and per_machine > gpus:
        return Finding("accelerate", "problem", f"{text}: more than the {gpus} GPUs here", remedy)
    if gpus > per_machine:
        return Finding("accelerate", "note", f"{text}: {gpus - per_machine} of {gpus} GPUs would idle", remedy)
    return Finding("accelerate", "ok", text)


# --- memory, cores, disks ---


def shared_memory(gpus: int, folder: Path = SHARED_MEMORY) -> Finding:
    """See whether NCCL has room: it passes gradients through here between GPUs without a direct path."""
    if not folder.is_dir():
        return Finding("/dev/shm", "ok", "none on this system")
    status = os.statvfs(folder)
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    text = f"{_size(free)} free of {_size(total)}"
    if gpus < 2 or free >= SHARED_MEMORY_WANTED:
        return Finding("/dev/shm", "ok", text)
    text += f"; NCCL may need up to {_size(SHARED_MEMORY_WANTED)} between GPUs"
    return Finding("/dev/shm", "problem", text, "start the container with more (docker run --shm-size=1g)")


def decoders() -> Finding:
    """See which libraries decode the images of the data."""
    found = decoding.decoders()
    text = ", ".join(f"{kind} by {name}" for kind, name in found.items())
    if "Pillow" in found.values():
        text += "; there are faster ones"
        return Finding("decoders", "note", text, "pip install 'stylepipe[fast]'")
    return Finding("decoders", "ok", text)


def cores(gpus: int, cgroup: Path = CGROUP) -> Finding:
    """Count the cores that this process may use, and the time on them that its container may take."""
    usable, there, quota = available_cpus(), os.cpu_count() or 1, cpu_quota(cgroup)
    text = f"{usable} usable" + (f" of {there}" if there != usable else "")
    if quota is not None and quota < usable:
        text += f", but the container's quota is the time of {quota:g}: threads would wait for one another"
        remedy = f"pin it to cores instead (docker run --cpuset-cpus, or taskset -c 0-{max(1, round(quota)) - 1})"
        return Finding("cores", "note", text, remedy)
    if usable < 2 * gpus:
        text += f" for {gpus} GPU{'' if gpus == 1 else 's'}: too few to decode images beside the training"
        remedy = "ask for more (Slurm: --cpus-per-task), or stylepipe prepare --format jpeg"
        return Finding("cores", "note", text, remedy)
    return Finding("cores", "ok", text)


def cpu_quota(cgroup: Path = CGROUP) -> float | None:
    """Return how many cores' time the container may take; None without a limit."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:  # version 1 of control groups
            files = [cgroup / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
            quota, period = (file.read_text().strip() for file in files)
        except OSError:
            return None
    return int(quota) / int(period) if quota.isdigit() and int(period) else None  # "max" and -1: no limit


def memory() -> Finding:
    """Tell how much main memory is left, within the limit of the container too."""
    free, total = free_memory(torch.device("cpu")), psutil.virtual_memory().total
    text = f"{_size(free)} free of {_size(total)}"
    if free >= MEMORY_WANTED:
        return Finding("memory", "ok", text)
    return Finding("memory", "note", f"{text}: enough for small models only", "end other programs, or ask for more")


def disk() -> Finding:
    """Tell what is left where runs, temporary files and prepared data go."""
    places = {
        "the working folder": (Path.cwd(), DISK_NEEDED, "give another --out"),
        "the temporary folder": (_temporary_folder(), TEMPORARY_NEEDED, "name another in TMPDIR"),
        "the cache": (_existing(data_folder()), DISK_NEEDED, f"name another folder in {CACHE_VARIABLE}"),
    }
    disks: dict[int, list[str]] = {}
    free: dict[int, int] = {}
    wrong, remedies = [], []
    for name, (folder, needed, remedy) in places.items():
        number = folder.stat().st_dev
        disks.setdefault(number, []).append(name)
        free[number] = shutil.disk_usage(folder).free
        writable = os.access(folder, os.W_OK | os.X_OK)
        if free[number] < needed or not writable:
            wrong.append(f"{name}, {folder}, {'is full' if writable else 'cannot be written'}")
            remedies.append(remedy)
    text = "; ".join(f"{_size(free[number])} free for {', '.join(names)}" for number, names in disks.items())
    if wrong:
        return Finding("disk", "problem", "; ".join([text, *wrong]), "make room, or: " + "; ".join(remedies))
    if free[Path.cwd().stat().st_dev] < DISK_WANTED:
        return Finding("disk", "note", text, "a run at 1024 px takes some 10 GiB: make room, or give another --out")
    return Finding("disk", "ok", text)


# --- the dashboard and our variables ---


def dashboard() -> Finding:
    """Tell whether W&B is logged in, by what W&B itself looks at; the network is not asked."""
    settings = _wandb_settings()
    asked = os.environ.get("WANDB_MODE")
    mode, source = (asked, "WANDB_MODE says") if asked else (settings.get("mode"), "its settings say")
    if mode and mode != "online":
        return Finding("W&B", "note", f"{mode}, as {source}")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or _WANDB).netloc
    key, source = os.environ.get("WANDB_API_KEY"), "WANDB_API_KEY"
    if token := os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        if not key and Path(token).is_file():
            return Finding("W&B", "ok", f"logged in at {host}, by WANDB_IDENTITY_TOKEN_FILE")
        wrong = "there is no such file" if not key else "WANDB_API_KEY is set as well"
        return Finding("W&B", "note", f"offline: WANDB_IDENTITY_TOKEN_FILE={token}, and {wrong}", "unset it")
    if not key:
        key, source = _key_of_netrc(host)
    if not key and settings.get("api_key"):
        key, source = settings["api_key"], "its settings"
    if not key:
        text = f"offline: not logged in at {host}{source and f' ({source})'}; wandb sync uploads later"
        return Finding("W&B", "note", text, "wandb login; --tracker none does without")
    if len(key) < _WANDB_KEY_LENGTH and key.count(".") != 2:  # two dots: a token
        return Finding("W&B", "note", f"offline: the key of {source} is too short", "wandb login --relogin")
    return Finding("W&B", "ok", f"logged in at {host}, by {source}")


def variables() -> Finding:
    """Name our variables that are set; unknown ones are most likely mistyped."""
    ours = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIX)}
    text = ", ".join(f"{name}={value}" for name, value in ours.items()) or f"no {_PREFIX} variable is set"
    known = {name.removeprefix(_PREFIX): name for name in VARIABLES}
    remedies = []
    for name in sorted(ours.keys() - known.values()):
        near = difflib.get_close_matches(name.removeprefix(_PREFIX), known, n=1)
        meant = f"did you mean {known[near[0]]}?" if near else f"expected one of {', '.join(VARIABLES)}"
        remedies.append(f"{name} means nothing: {meant}")
    try:
        native.mode()
    except UserError as error:
        return Finding("variables", "problem", text, "; ".join([str(error), *remedies]))
    return Finding("variables", "note" if remedies else "ok", text, "; ".join(remedies))


def _wandb_settings() -> dict[str, str]:
    """Return what W&B's own settings files say; the one of the working folder wins."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([Path(folder).expanduser() / "settings", Path("wandb", "settings")])
    except configparser.Error:  # W&B passes over it as well
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _key_of_netrc(host: str) -> tuple[str | None, str]:
    """Return the key for a host and the file that holds it; without one, what is wrong with the file, if anything."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        return None, ""
    except (netrc.NetrcParseError, OSError) as error:
        return None, f"{path} cannot be read: {error}"
    return (found[2], str(path)) if found else (None, "")


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # it has found none that can be written
        return _existing(Path(os.environ.get("TMPDIR") or "/tmp"))


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
