"""`stylepipe COMMAND ...`: finds the command, and turns a user's mistake into one message and exit code 2."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from stylepipe.errors import ProcessLostError, UserError, of_file
from stylepipe.files import silence

# Each is a module of stylepipe.cli with a `main(argv)`, imported only when it is asked for.
COMMANDS = {
    "train": "train a model; on several GPUs: accelerate launch launch/train.py",
    "prepare": "turn photographs into shards to train on",
    "data": "look at a prepared dataset, check and repair it; draw faces",
    "sample": "make images with a trained network",
    "evaluate": "measure how good the images of trained networks are",
    "report": "a page of runs: images over time, curves, metrics, settings; as a file or live",
    "ema": "average a run's generator over other lengths, after its training",
    "convert": "turn StyleGAN2 weights of other projects into a network file, and back",
    "bench": "measure the speed of this machine",
    "kernels": "compile the CUDA kernels ahead of time; list or remove compiled ones",
    "doctor": "tell what this machine has for training, and what to do about what is not in order",
}

# What the file system answers to a user's path, anywhere.
FILE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
)

EXIT_LOST = 1
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run `stylepipe` with these arguments, by default the process's own, and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0 if arguments else EXIT_MISTAKE
    if command == "--version":
        from importlib.metadata import version

        print(f"stylepipe {version('stylepipe')}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        print(f"error: unknown command {command}: {remedy}", file=sys.stderr)
        return EXIT_MISTAKE
    return run(command, arguments[1:])


def run(command: str, argv: Sequence[str]) -> int:
    """Run one of COMMANDS and return the exit code; the scripts in launch/ call this.

    A UserError becomes one message on stderr; with STYLEPIPE_DEBUG=1 it keeps its traceback, as any other exception.
    """
    try:
        code = _run(command, argv)
    except BaseException as error:
        if not _in_a_group():
            raise
        code = 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
        else:
            traceback.print_exc()
    if _in_a_group():  # the interpreter's end would wait for the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(command: str, argv: Sequence[str]) -> int:
    try:
        importlib.import_module(f"stylepipe.cli.{command}").main(list(argv))
        sys.stdout.flush()  # here, so that a closed pipe is noticed here
    except UserError as error:
        if os.environ.get("STYLEPIPE_DEBUG", "0") not in ("", "0"):
            raise
        _tell(f"error{_process()}: {error}")
        return EXIT_MISTAKE
    except ProcessLostError as error:
        _tell(f"error{_process()}: {error}")
        return EXIT_LOST
    except BrokenPipeError:  # such as `stylepipe train --help | head`
        silence(sys.stdout)  # else the interpreter's last flush complains
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        _tell(f"error{_process()}: {of_file(error)}")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        _tell("interrupted")
        return EXIT_INTERRUPTED
    return 0


def _tell(text: str) -> None:
    """Say what ends the command, if anybody still reads it; the exit code says it as well."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def _in_a_group() -> bool:
    """Tell whether this process is still connected to others."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _process() -> str:
    """Name this process where there are several: what all of them find is said by each."""
    process = os.environ.get("RANK", "0")
    return "" if process == "0" else f" (process {process})"


def _help() -> str:
    lines = [f"  {name:<9} {purpose}" for name, purpose in COMMANDS.items()]
    head = ["usage: stylepipe COMMAND [options]", "", "Train high-resolution GANs on many GPUs.", ""]
    foot = ["", "stylepipe COMMAND --help lists the options of a command, stylepipe --version tells the version."]
    return "\n".join([*head, *lines, *foot])
