"""`stylepipe doctor`: what this machine has for training and what is not in order, on one screen."""

from __future__ import annotations

import json
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import tyro

from stylepipe.cli.finding import Finding, describe, examine

WIDTH = 100
_INDENT = " " * 21
_MOST_LINES = 5
"""Of one text or remedy; what is longer is whole in the JSON."""


@dataclass(frozen=True)
class Doctor:
    """Tell what this machine has for training, and what to do about what is not in order.

    The ops are run and compared with float64 arithmetic; nothing is asked of the network. Exits with 1 if there is a
    problem: something that would stop a training here, or slow it without a word. Lines marked `note` are only worth
    knowing.
    """

    json: bool = False
    """Print the findings as JSON, for a bug report."""


def main(argv: Sequence[str] | None = None) -> None:
    """Examine the machine and print what is found; exit with 1 if something is a problem."""
    options = tyro.cli(Doctor, args=sys.argv[1:] if argv is None else list(argv), prog="stylepipe doctor")
    findings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries warn of is found and told here
        for finding in find():
            findings.append(finding)
            if not options.json:
                print(screen_lines(finding), flush=True)  # one by one: the first use compiles kernels
    problems = sum(finding.state == "problem" for finding in findings)
    if options.json:
        print(json.dumps({"problems": problems, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(verdict(problems))
    sys.stdout.flush()  # before the exit, so that a closed pipe is noticed by who called
    if problems:
        sys.exit(1)


def find() -> Iterator[Finding]:
    """Examine everything, in the order of the screen."""
    try:
        from stylepipe.cli import doctor_device, doctor_machine, doctor_ops
    except Exception as error:  # they need torch, and a broken installation fails in any way
        text = f"not all that stylepipe needs can be imported by {sys.executable} ({describe(error)})"
        yield Finding("packages", "problem", text, "install it anew: pip install -c constraints.txt -e .")
        return
    gpus = doctor_device.look_for_gpus()
    device = doctor_ops.device_of(gpus.count)
    probes: dict[str, Callable[[], Finding]] = {
        "python": doctor_machine.python,
        "torch": doctor_device.torch_build,
        "GPUs": partial(doctor_device.gpus, gpus),
        "driver": partial(doctor_device.driver, gpus),
        "NVRTC": partial(doctor_device.nvrtc, gpus),
        "nvcc": doctor_device.nvcc,
        "C++": partial(doctor_device.cxx, gpus),
        "kernel cache": doctor_device.kernel_cache,
        "kernels": partial(doctor_ops.choices, device),
        **{test.name: partial(doctor_ops.op, test, device) for test in doctor_ops.SELF_TESTS},
        "ninja": doctor_machine.ninja,
        "accelerate": partial(doctor_machine.accelerate, gpus.count),
        "decoders": doctor_machine.decoders,
        "/dev/shm": partial(doctor_machine.shared_memory, gpus.count),
        "cores": partial(doctor_machine.cores, gpus.count),
        "memory": doctor_machine.memory,
        "disk": doctor_machine.disk,
        "W&B": doctor_machine.dashboard,
        "variables": doctor_machine.variables,
    }
    for name, probe in probes.items():
        yield examine(name, probe)


def screen_lines(finding: Finding) -> str:
    """Return a finding as lines of at most WIDTH columns, the home folder written as ~."""
    lines = _wrapped(finding.text, f"{finding.state:<8}{finding.name:<13}")
    if finding.remedy:
        lines += _wrapped(finding.remedy, f"{_INDENT}-> ")
    return "\n".join(lines)


def verdict(problems: int) -> str:
    """Return the last line."""
    if problems == 0:
        return "Training can run here."
    return f"{problems} problem{'' if problems == 1 else 's'} would stop or slow training here."


def _wrapped(text: str, head: str) -> list[str]:
    home = str(Path("~").expanduser())
    words = " ".join(text.split()).replace(f"{home}/", "~/") if home != "/" else " ".join(text.split())
    indent = _INDENT if len(head) <= len(_INDENT) else " " * len(head)
    return textwrap.wrap(
        words, WIDTH, initial_indent=head, subsequent_indent=indent, max_lines=_MOST_LINES, placeholder=" ..."
    )
