"""Read thousands of damaged files of every kind; each must be read or refused in one sentence, soon, in little memory.

    python tests/fuzz/run.py --cases 2000                      # a table; exits with 1 if anything went wrong
    python tests/fuzz/run.py --targets zip --first 1234 --cases 1

Cases are the same every time. They are read in a process of its own, so that one that dies is a case that failed. The
files of each case that failed are kept.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "interop")]

from cases import Reading  # noqa: E402
from damage import generator  # noqa: E402
from targets import TARGETS  # noqa: E402

_PROGRESS, _AT = "progress.jsonl", "at"


@dataclass
class Failure:
    """A case that neither was read nor refused in one sentence."""

    case: int
    wrong: str

    @property
    def cause(self) -> str:
        """Where it failed, the same for cases that are alike."""
        lines = self.wrong.strip().splitlines()
        ours = [line for line in lines if line.startswith('  File "') and "/tests/" not in line and ".venv" not in line]
        return f"{lines[0][:40]} {ours[-1] if ours else ''} {lines[-1].partition(':')[0]}"


@dataclass
class Outcome:
    """What became of the cases of a target."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    slowest_s: float = 0.0
    seconds: float = 0.0
    memory: int = 0
    failures: list[Failure] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Go through the targets, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--cases", type=int, default=200, help="of each target")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "stylepipe-fuzz")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    cases = range(options.first, options.first + options.cases)
    if options.child is not None:
        _work(options.targets, cases, options.child, options.keep)
        return 0
    outcomes = all_outcomes(options.targets, cases, options.keep)
    print(table(outcomes))
    return int(any(outcome.failures for outcome in outcomes.values()))


def all_outcomes(targets: Sequence[str], cases: range, keep: Path) -> dict[str, Outcome]:
    """Go through cases of targets in another process; one that dies is followed by another, behind the deadly case."""
    outcomes = {name: Outcome() for name in targets}
    left, begin = list(targets), cases.start
    while left:
        with tempfile.TemporaryDirectory(prefix="stylepipe-fuzz-") as folder:
            again = ["--first", str(begin), "--cases", str(cases.stop - begin), "--keep", str(keep), "--child", folder]
            names = left if begin == cases.start else left[:1]
            command = [sys.executable, __file__, "--targets", *names, *again]
            environment = {**os.environ, "STYLEPIPE_KERNELS": "torch"}  # compiles nothing
            child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if not (Path(folder) / _AT).exists():  # it has not come so far as to begin
                raise RuntimeError(child.stderr)
            for line in (Path(folder) / _PROGRESS).read_text().splitlines():
                told = json.loads(line)
                left.remove(told["target"])
                _add(outcomes[told["target"]], told)
                begin = cases.start
            if child.returncode:
                at = json.loads((Path(folder) / _AT).read_text())
                if at is None:
                    raise RuntimeError(child.stderr)
                shutil.copytree(Path(folder) / "case", keep / left[0] / str(at), dirs_exist_ok=True)
                died = f"the process ended with {child.returncode}\n{child.stderr.strip()[-2000:]}"
                _add(outcomes[left[0]], {"cases": at + 1 - begin, "failures": [asdict(Failure(at, died))]})
                begin = at + 1
                if begin == cases.stop:
                    left, begin = left[1:], cases.start
    return outcomes


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the table, and below it what went wrong."""
    lines = ["target         cases  refused  accepted  failed   slowest    memory      all"]
    for name, o in outcomes.items():
        counts = f"{name:<12}{o.cases:>8,}{o.refused:>9,}{o.accepted:>10,}{len(o.failures):>8,}"
        lines.append(f"{counts}{o.slowest_s:>8.2f} s{o.memory >> 20:>6,} MiB{o.seconds:>7.1f} s")
    for name, outcome in outcomes.items():
        alike: dict[str, list[Failure]] = {}
        for failure in outcome.failures:
            alike.setdefault(failure.cause, []).append(failure)
        for failures in alike.values():
            cases = ", ".join(str(failure.case) for failure in failures[:8])
            lines.append(f"\n{name}, {len(failures)} alike (cases {cases}): {failures[0].wrong.strip()}")
    return "\n".join(lines)


def _add(outcome: Outcome, told: dict[str, Any]) -> None:
    for name in ("cases", "refused", "accepted", "seconds"):
        setattr(outcome, name, getattr(outcome, name) + told.get(name, 0))
    for name in ("slowest_s", "memory"):
        setattr(outcome, name, max(getattr(outcome, name), told.get(name, 0)))
    outcome.failures += [Failure(**failure) for failure in told["failures"]]


def _work(targets: Sequence[str], cases: range, folder: Path, keep: Path) -> None:
    """Go through cases of targets here, and write into the folder what becomes of them."""
    logging.disable()
    warnings.simplefilter("ignore")
    faulthandler.enable()
    os.fsync = lambda _: None  # type: ignore[assignment]  # what is written here need not last
    for name in targets:
        (folder / _PROGRESS).touch()
        (folder / _AT).write_text("null")
        target, outcome, begin = TARGETS[name], Outcome(), time.monotonic()
        reading = Reading(target, folder)
        for number in cases:
            (folder / _AT).write_text(str(number))
            case = reading.read(target.damage(reading.valid, generator(zlib.crc32(name.encode()), number)))
            outcome.cases += 1
            outcome.slowest_s, outcome.memory = max(outcome.slowest_s, case.seconds), max(outcome.memory, case.memory)
            if case.wrong:
                outcome.failures.append(Failure(number, case.wrong))
                shutil.copytree(reading.place, keep / name / str(number), dirs_exist_ok=True)
            elif case.message is None:
                outcome.accepted += 1
            else:
                outcome.refused += 1
        outcome.seconds = time.monotonic() - begin
        with open(folder / _PROGRESS, "a") as file:
            file.write(json.dumps({"target": name, **asdict(outcome)}) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
