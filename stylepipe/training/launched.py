"""Was training started the way the user meant? Accelerate starts one process for some commands that ask for several."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from stylepipe.errors import UserError

# Set by launchers for each of their processes: how many there are. (SLURM_NTASKS would not do: it is also set for a
# batch script, which runs once.)
WORLD_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_PYTHON_LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.")
LAUNCHED_BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # set by every launcher of `accelerate launch`


def _parent() -> tuple[int, list[str]]:
    """Return process id and command of what started this process; no words where that is not to be known."""
    parent = os.getppid()
    try:
        return parent, psutil.Process(parent).cmdline()
    except psutil.Error:  # it has died, or belongs to somebody else
        return parent, []


_PARENT, _PARENT_WORDS = _parent()  # noted at import: later the launcher may have died


def check_launch(num_processes: int) -> None:
    """See that a training of one process was meant to be one.

    `accelerate launch --cpu --num_processes 2` starts a single process, `--cpu --num_machines 2` and some uses of
    torchrun, srun and mpirun several that know nothing of one another: each would train its own model.

    Args:
        num_processes: how many processes train together, `accelerator.num_processes`.

    Raises:
        UserError: more were asked for; it gives the command that starts them.
    """
    if num_processes > 1:
        return
    for variable in WORLD_SIZES:
        asked = os.environ.get(variable, "1")
        if asked.isdigit() and int(asked) > 1:
            raise UserError(
                f"started as one of {asked} processes ({variable}={asked}) that would each train a model of its own; "
                f"to train together: {right_command(int(asked))}"
            )
    if LAUNCHED_BY_ACCELERATE not in os.environ:
        return
    processes, machines = _asked_of_accelerate()
    if machines > 1:
        raise UserError(
            f"accelerate was asked for {machines} machines and started one separate process on each; "
            f"to train together: {right_command(max(processes, machines), machines)}"
        )
    if processes > 1:
        raise UserError(
            f"accelerate was asked for {processes} processes and started only one; "
            f"to train with {processes}: {right_command(processes)}"
        )


def launcher_process() -> int | None:
    """Return the process id of the launcher that started this process, or None if a person or a shell did."""
    launched = LAUNCHED_BY_ACCELERATE in os.environ or any(variable in os.environ for variable in WORLD_SIZES)
    return _PARENT if launched else None


def right_command(processes: int, machines: int = 1) -> str:
    """Write the command that starts this program in so many processes on all machines together."""
    words = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes)]
    if machines > 1:
        words += ["--num_machines", str(machines), "--machine_rank", "RANK", "--main_process_ip", "IP"]
        words += ["--main_process_port", "29500"]
    if sys.argv[0].endswith(".py") and Path(sys.argv[0]).name != "__main__.py":
        script, options = sys.argv[0], sys.argv[1:]
    else:  # stylepipe train ..., python -m stylepipe train ...
        script, options = "launch/train.py", sys.argv[2:]
    command = shlex.join([*words, script, *options])
    return command if torch.cuda.is_available() else f"ACCELERATE_USE_CPU=true {command}"


def command_again(out: Path) -> str:
    """Write the command that goes on with the run in `out`: that which started this process, or its launcher."""
    words = [sys.executable, *sys.argv]
    # Others, such as srun's, are of a batch system: what they were told is not for people.
    if launcher_process() is not None and any(
        word.rpartition("/")[2].startswith(_PYTHON_LAUNCHERS) for word in _PARENT_WORDS[:3]
    ):
        words = [*_PARENT_WORDS]
    if Path(words[0]).name.startswith("python"):
        script = Path(words[1])
        python = "python" if _is_found("python", Path(words[0])) else words[0]
        if script.name == "__main__.py":
            words[:2] = [python, "-m", script.parent.name]
        elif script.parent.name in ("bin", "Scripts"):  # installed
            words[:2] = [script.name if _is_found(script.name, script) else str(script)]
        else:
            words[0] = python
    kept = [word for before, word in pairwise(["", *words]) if "--resume" not in (before, word.partition("=")[0])]
    if not any(word.partition("=")[0] == "--out" for word in kept):
        kept += ["--out", str(out)]
    on_cpu = "ACCELERATE_USE_CPU=true " if launcher_process() is not None and "ACCELERATE_USE_CPU" in os.environ else ""
    return on_cpu + shlex.join(kept)


def _is_found(name: str, path: Path) -> bool:
    """Tell whether a shell finds this program by its name, in the same folder: environments share their Python."""
    found = shutil.which(name)
    return found is not None and os.path.realpath(os.path.dirname(found)) == os.path.realpath(path.parent)


def _asked_of_accelerate() -> tuple[int, int]:
    """Return the processes and machines that the launcher of this process was asked for, 1 where unknown."""
    arguments = launch_arguments(_PARENT_WORDS)
    return (1, 1) if arguments is None else asked_for(arguments)


def launch_arguments(words: Sequence[str]) -> Sequence[str] | None:
    """Return what stands after `accelerate launch`, however it is spelt, or None for another command."""
    for position, word in enumerate(words):
        name = Path(word).stem if word.endswith(".exe") else Path(word).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return words[position + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli"):
            return words[position + 2 :] if words[position + 1 : position + 2] == ["launch"] else None
    return None


def asked_for(arguments: Sequence[str]) -> tuple[int, int]:
    """Return the processes and machines that arguments of `accelerate launch`, or its config file, ask for."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_known_args(list(arguments))[0]
    defaults: Mapping[str, object] = {}
    if options.config_file is not None or (os.path.isfile(default_config_file) and not options.cpu):
        defaults = vars(load_config_from_file(options.config_file))

    def number(name: str) -> int:
        given = getattr(options, name)
        value = defaults.get(name) if given is None else given
        return value if isinstance(value, int) else 1

    return number("num_processes"), number("num_machines")
