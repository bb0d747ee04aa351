"""Compiles one unit in several processes at once, as ranks do at their first step; run by test_build.py.

    processes.py SOURCE COUNT SECONDS

Each process takes SECONDS to compile, adds a line to the file `compilations` beside the source's folder when it begins,
and prints what it got.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

from stylepipe.kernels import build


class SlowCompiler:
    """Turns the source to upper case, slowly."""

    name, version = "slow", "1.0"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def flags(self, unit: build.Unit, target: str) -> list[str]:
        return []

    def compile(self, unit: build.Unit, target: str) -> bytes:
        with (unit.source.parents[1] / "compilations").open("a") as file:
            file.write("one\n")
        time.sleep(self.seconds)
        return unit.source.read_bytes().upper()


def compile_one(source: Path, seconds: float) -> None:
    got = build.cached(build.Unit(source, "float32"), "sm_90", SlowCompiler(seconds))
    os.write(sys.stdout.fileno(), got + b"\n")  # in one call: print may take two, and another process come between


if __name__ == "__main__":
    source, count, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    context = multiprocessing.get_context("fork")  # eight imports of torch would take longer than the test
    processes = [context.Process(target=compile_one, args=(source, seconds)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
