"""Trainings as real processes that tests break: started, watched, sent signals, and what they leave compared.

Each training is a session of its own and writes to a file. All its processes carry a mark in their environment, by
which those are found too that outlive their launcher.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.errors import UserError
from stylepipe.training.checkpoint import load_state

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "train.py"
TINY = [
    *("--tracker", "none", "--metrics", "none", "--seed", "3", "--augment", "ada"),
    *("--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "8", "--network.w-dim", "8"),
]
"""Options of networks that take a step in a few hundredths of a second."""

_MARK = "STYLEPIPE_TEST_PROCESSES"
_OPENING = re.compile(r"\bfrom ([\d.]+) to ([\d.]+) kimg, in ", re.MULTILINE)
# What a run's own folder and options say of it, in a state.
_OF_THE_FOLDER = ("out", "resume", "keep_states", "kimg")


def plain(*options: object) -> list[str]:
    """Give the command of a training in one process."""
    return [sys.executable, "-m", "stylepipe", "train", *map(str, options)]


def accelerate(*options: object, processes: int = 2, launcher: Sequence[str] = ()) -> list[str]:
    """Give the command of a training by `accelerate launch`, with further options of it."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    port = [] if "--main_process_port" in launcher else ["--main_process_port", "0"]
    return [*command, "--num_processes", str(processes), *port, *launcher, str(SCRIPT), *map(str, options)]


def torchrun(*options: object, processes: int = 2) -> list[str]:
    """Give the command of a training by torchrun on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*command, str(SCRIPT), *map(str, options)]


def prepare_faces(folder: Path, resolution: int, count: int = 24) -> Path:
    """Prepare drawn faces with all lower levels, so that no training has anything to prepare; return their folder."""
    photographs, out = folder / "photographs", folder / f"faces{resolution}"
    photographs.mkdir(parents=True)
    for index in range(count):
        draw_face(index, resolution).save(photographs / f"{index:03d}.png")
    prepare(photographs, out, Preparation(resolution, levels=True), workers=1, progress=False)
    return out


def wait_until(true: Callable[[], bool], what: str, seconds: float, poll_s: float = 0.02) -> None:
    """Wait for something; raise AssertionError when it takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(poll_s)


class Training:
    """A training as its user starts it.

        with Training(plain("--kimg", 1, "--out", out), work, out) as training:
            training.wait_for_images(64)
            training.signal_rank(0, signal.SIGKILL)
            assert training.wait(60) != 0
        # here none of its processes is left

    Args:
        command: what to start.
        work: working directory, which also holds the cache.
        out: folder of the run.
        core: the one core to run on, or None for all.
        environment: more of it.

    Attributes:
        started: time.monotonic() of the start.
        process: what was started, a training or its launcher.
        log: file with its output, a new one for each training.
    """

    def __init__(
        self,
        command: Sequence[str],
        work: Path,
        out: Path,
        core: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.out = out
        self._launched = "launch" in command or "torch.distributed.run" in command
        self._mark = uuid.uuid4().hex
        self.log = work / f"{out.name}.{self._mark[:8]}.output"
        settings = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        settings |= {"STYLEPIPE_CACHE": str(work / "cache"), "HF_HOME": str(work / "hf"), _MARK: self._mark}
        # Ends it with this process, should that be killed; each of the two becomes what it starts.
        before = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        before += [] if core is None else ["taskset", "--cpu-list", str(core)]
        self.started = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*before, *command],
                cwd=work,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **settings, **(environment or {})},
            )

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()

    @property
    def output(self) -> str:
        """What it has said so far, standard output and error."""
        return self.log.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether what was started still runs; its ranks may outlive it."""
        return self.process.poll() is None

    @property
    def went_on_from(self) -> int | None:
        """The images seen where it says that it begins or goes on; None before it says so."""
        found = _OPENING.search(self.output)
        return round(float(found[1]) * 1000) if found else None

    def processes(self) -> list[psutil.Process]:
        """Return all of its processes that still run, eldest first."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes that train, by rank; without a launcher the one there is."""
        if not self._launched:
            return {0: psutil.Process(self.process.pid)} if self.alive else {}
        ranks: dict[int, psutil.Process] = {}
        for process in self.processes():
            with suppress(psutil.Error):
                if (rank := process.environ().get("RANK")) is not None:
                    ranks.setdefault(int(rank), process)  # the eldest: it may have started others
        return ranks

    def wait_for_line(self, pattern: str, seconds: float = 120) -> str:
        """Wait for output that matches and return it."""
        wait_until(lambda: self._has_said(pattern), f"{pattern!r}", seconds)
        found = re.search(pattern, self.output)
        assert found is not None
        return found[0]

    def wait_for_images(self, count: int, seconds: float = 120) -> None:
        """Wait until stats.jsonl tells of so many images, in lines that this training has written."""

        def seen() -> bool:
            self._has_to_live()
            return self.went_on_from is not None and images_seen(self.out) >= count

        wait_until(seen, f"{count} images seen", seconds)

    def signal(self, number: int) -> None:
        """Send a signal to what was started alone."""
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Send a signal as a terminal's Ctrl-C does, to the launcher and what it has kept in its group."""
        os.killpg(self.process.pid, number)

    def signal_rank(self, rank: int, number: int) -> bool:
        """Send a signal to one rank; return whether it was there and had not ended before."""
        process = self.ranks().get(rank)
        if process is None:
            return False
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            return False
        return True

    def wait(self, seconds: float) -> int:
        """Return the exit code of what was started; raise AssertionError when it runs on for longer."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {seconds:g} s; it said:\n{self.output}") from None

    def wait_for_all(self, seconds: float) -> list[str]:
        """Return the commands of the processes that are left so long after what was started has ended."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        commands = []
        for process in left:
            with suppress(psutil.Error):
                commands.append(" ".join(process.cmdline()))
        return commands

    def kill_all(self) -> None:
        """Kill every process at once, and see that none is left."""
        deadline = time.monotonic() + 30
        if self.alive:
            self.signal_group(signal.SIGKILL)
        while processes := self.processes():  # and what is in a group of its own
            assert time.monotonic() < deadline, processes
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.005)
        self.process.wait(timeout=10)

    def _has_said(self, pattern: str) -> bool:
        if re.search(pattern, self.output):
            return True
        self._has_to_live()
        return False

    def _has_to_live(self) -> None:
        assert self.alive, f"ended with {self.process.returncode}; it said:\n{self.output}"


# --- what a run has left ---


def stats_of(out: Path) -> list[dict[str, Any]]:
    """Return the whole lines of stats.jsonl."""
    path = out / "stats.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def images_seen(out: Path) -> int:
    """Return the images that the last line of stats.jsonl tells of; 0 before there is one."""
    try:
        with open(out / "stats.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0
    found = re.search(rb'"images_seen": (\d+)', whole[whole.rfind(b"\n") + 1 :])
    return int(found[1]) if found else 0


class Saved(NamedTuple):
    """What a state holds."""

    tensors: dict[str, torch.Tensor]
    description: dict[str, Any]


def state_folders(out: Path) -> list[Path]:
    """Return the folders that have the name of a state, the oldest first."""
    return sorted(out.glob("state-*"))


def read_state(path: Path) -> Saved:
    """Read a state; a UserError says that it is not whole."""
    load_state(path)  # compares the digest as well
    return Saved(load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text()))


def newest_whole_state(out: Path) -> int:
    """Return the images seen of the newest state that can be read, 0 where none can."""
    for path in reversed(state_folders(out)):
        with suppress(UserError):
            return load_state(path).images_seen
    return 0


def differences(ours: Saved, theirs: Saved) -> list[str]:
    """Name what of two states is not the same to the bit; the run's folder and length may differ."""
    first, second = (_without_folder(saved.description) for saved in (ours, theirs))
    keys = sorted(first.keys() | second.keys())
    differing = _differing(ours.tensors, theirs.tensors)
    return differing + [f"state.json: {key}" for key in keys if first.get(key) != second.get(key)]


def largest_relative_difference(ours: Saved, theirs: Saved) -> tuple[float, str]:
    """Return the largest |a - b| / |b| of two states' tensors, by the 2-norms of whole tensors, and which it is."""
    assert ours.tensors.keys() == theirs.tensors.keys()
    found = []
    for name, tensor in ours.tensors.items():
        a, b = tensor.double(), theirs.tensors[name].double()
        difference = float((a - b).norm() / b.norm().clamp(min=1e-30))
        found.append((difference if math.isfinite(difference) else math.inf, name))
    return max(found)


def same_files(ours: Path, theirs: Path) -> bool:
    """Tell whether two files are the same: networks by their tensors and what they say, all others by their bytes."""
    if ours.suffix != ".safetensors":
        return ours.read_bytes() == theirs.read_bytes()
    first, second = _read_tensors(ours), _read_tensors(theirs)  # the order of what they say changes with each process
    return first[1] == second[1] and not _differing(first[0], second[0])


def broken_files(out: Path) -> list[str]:
    """Name the files and states of a run that have their final names and cannot be read whole."""
    checks: dict[str, Callable[[Path], object]] = {
        "state-*": read_state,
        "network-*.safetensors": _read_tensors,
        "ema/*.safetensors": _read_tensors,
        "config.yaml": lambda path: yaml.safe_load(path.read_text())["res"],
        "grids/*.png": _read_image,
        "clips/*.gif": _read_image,
    }
    broken = []
    for pattern, read in checks.items():
        for path in out.glob(pattern):
            try:
                read(path)
            except (UserError, SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                broken.append(f"{path.relative_to(out)}: {error}")
    return broken


def remains(out: Path) -> list[str]:
    """Name what unfinished writes have left below a run's folder."""
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*.tmp"))


def _differing(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name in sorted(ours.keys() | theirs.keys()) if not _same(ours.get(name), theirs.get(name))]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _without_folder(description: Mapping[str, Any]) -> dict[str, Any]:
    info = dict(description["info"])
    info["config"] = {key: value for key, value in info["config"].items() if key not in _OF_THE_FOLDER}
    return {"images_seen": description["images_seen"], "layout": description["layout"], **info}


def _read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a file and what its header says beside them."""
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata() or {}


def _read_image(path: Path) -> None:
    with Image.open(path) as image:
        image.load()
