"""Kill a training again and again, start it again each time, and compare what it saves with a run never interrupted.

    python tests/faults/kill_loop.py --kills 200 --core 1
    python tests/faults/kill_loop.py --kills 50 --processes 2

The run grows from 8 to 32 px. SIGKILL comes at random, while it starts, trains, writes a state or its last files; to
all its processes, or to one rank of two. What it really hit is told by what is left.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import (
    TINY,
    Saved,
    Training,
    broken_files,
    differences,
    images_seen,
    newest_whole_state,
    plain,
    prepare_faces,
    read_state,
    remains,
    same_files,
    state_folders,
    stats_of,
    torchrun,
)

BATCH = 4
AIMS = {"starting": 15, "training": 50, "writing": 35}  # percent of the kills
HITS = ("starting", "training", "writing", "finishing")
TRAINING_S = 4.0  # kills come up to so long after the first step
STARTING_S = 6.0  # until that step, before it was measured
WRITING_S = 0.02  # kills come up to so long after a write of a state was seen
FINISHING_S = 1.0  # or the last step
LIMIT_S = 300.0  # for a start to be killed, and for a run to come to its end
RANK_LIMIT_S = 120.0  # for a launcher to end after one of its ranks was killed
POLL_S = 0.002


@dataclass
class Kill:
    """One kill, and what became of the run.

    Attributes:
        fault: who was killed.
        hit: what the run was at, one of HITS.
        repeated: images that this start trained on since the newest whole state, for the next one to train on again.
        compared: whole states in the folder that the reference has as well.
        differing: how many of these are not the same to the bit.
        lost: images of the newest whole state that the next start did not go on from.
        recovered: whether a later start took a step from there, or found nothing left to do.
        first_step_s: seconds from the next start to its first step; None where that was killed, or had none to take.
    """

    fault: str
    hit: str
    repeated: int
    compared: int = 0
    differing: int = 0
    lost: int = 0
    recovered: bool = False
    first_step_s: float | None = None


@dataclass
class Result:
    """What a loop has found.

    Attributes:
        kills: in their order.
        finished: runs that came to their end in spite of them.
        problems: what should not be, in words.
    """

    kills: list[Kill] = field(default_factory=list)
    finished: int = 0
    problems: list[str] = field(default_factory=list)


class Loop:
    """Kills runs that are to be like a reference.

    Args:
        work: an empty folder for all of it; runs with problems stay there.
        kimg: length of a run; each level and each fade takes a sixth of it.
        processes: 1, or 2 by torchrun, of which one alone is killed every other time.
        seed: of who is killed and when.
        core: the one core of the trainings, or None for all.
    """

    def __init__(self, work: Path, kimg: float, processes: int = 1, seed: int = 0, core: int | None = None) -> None:
        self.work, self.kimg, self.processes, self.core = work, kimg, processes, core
        self.result = Result()
        self._random = random.Random(seed)
        self._data = prepare_faces(work, 32)
        self._total = round(kimg * 1000)
        self._reference = work / "reference"
        self._saved: dict[str, Saved] = {}
        self._unrecovered: list[Kill] = []
        self._left: set[str] = set()  # half-written states that the running start has found

    def train_reference(self) -> float:
        """Train without interruption, keeping every state; return the seconds."""
        with self._start(self._reference, "--keep-states", 0) as training:
            assert training.wait(3600) == 0, training.output
            seconds = time.monotonic() - training.started
        self._saved = {path.name: read_state(path) for path in state_folders(self._reference)}
        return seconds

    def run(self, kills: int) -> Result:
        """Kill so often in all; a run that has ended is followed by a new one, and the last one comes to its end."""
        number = 0
        while len(self.result.kills) < kills:
            out, before = self.work / f"run{number}", len(self.result.problems)
            self._unrecovered = []
            self._train_and_kill(out, kills)
            number += 1
            if len(self.result.problems) == before:  # else to be looked at
                shutil.rmtree(out)
                for log in self.work.glob(f"{out.name}.*.output"):
                    log.unlink()
        return self.result

    def _train_and_kill(self, out: Path, kills: int) -> None:
        """Start a run again after each kill, until it ends by itself."""
        while True:
            newest, self._left = newest_whole_state(out), _unfinished_states(out)
            with self._start(out) as training:
                kill, first_step_s = None, None
                if len(self.result.kills) < kills:
                    kill, first_step_s = self._kill_sometime(training)
                if kill is None and (code := training.wait(LIMIT_S)) != 0:
                    self._problem(f"{out.name} ended with {code}, see {training.log.name}")
                    return
            self._note_start(training, newest, first_step_s, ended=kill is None)
            if kill is None:
                break
            self._look_over(out, kill)
            self.result.kills.append(kill)
            self._unrecovered.append(kill)
            again = "" if first_step_s is None else f", first step after {first_step_s:.1f} s"
            print(
                f"kill {len(self.result.kills)} of {kills}: {out.name}, {kill.fault} while {kill.hit} at "
                f"{images_seen(out) / 1000:.3f} kimg{again}; {kill.compared} states compared, {kill.differing} differ; "
                f"{kill.repeated} images to repeat",
                flush=True,
            )
        self.result.finished += 1
        self._compare_ends(out)

    def _start(self, out: Path, *more: object) -> Training:
        grown = self.kimg / 6
        options = [
            *TINY,
            *("--data", self._data, "--res", 32, "--batch-size", BATCH, "--batch-gpu", 2, "--kimg", self.kimg),
            *("--growth.start-res", 8, "--growth.stable-kimg", grown, "--growth.fade-kimg", grown),
            *("--snapshot-kimg", 0.016, "--tick-kimg", BATCH / 1000, "--grid-kimg", 0.2, "--clip-kimg", 0.4),
            *("--diversity-kimg", 0.2, "--ema.posthoc-kimg", 0.1, "--out", out, *more),
        ]
        command = plain(*options) if self.processes == 1 else torchrun(*options, processes=self.processes)
        return Training(command, self.work, out, self.core)

    def _kill_sometime(self, training: Training) -> tuple[Kill | None, float | None]:
        """Kill a training at a moment drawn beforehand.

        Returns:
            the kill, None where the training had ended before; and the seconds to its first step, None before it.
        """
        draw = self._random
        aim = draw.choices(list(AIMS), list(AIMS.values()))[0]
        victim = draw.choice([None, None, 0, 1]) if self.processes > 1 else None
        measured = [kill.first_step_s for kill in self.result.kills if kill.first_step_s is not None]
        starting_s = statistics.median(measured) if measured else STARTING_S
        after = draw.uniform(0, starting_s if aim == "starting" else TRAINING_S)
        first_step_s, writing = None, False
        while training.alive:
            now = time.monotonic() - training.started
            assert now < LIMIT_S, training.output
            if first_step_s is None and self._has_stepped(training):
                first_step_s = now
            if aim == "starting" and now >= after:
                break
            if first_step_s is not None and images_seen(training.out) >= self._total:
                if draw.random() < 0.5:
                    return None, first_step_s  # let it finish
                time.sleep(draw.uniform(0, FINISHING_S))
                break
            due = aim != "starting" and first_step_s is not None and now >= first_step_s + after
            writing = due and aim == "writing"
            if due and not writing:
                break
            if writing and self._writes_state(training.out):
                time.sleep(draw.uniform(0, WRITING_S))
                break
            time.sleep(POLL_S if writing else 10 * POLL_S)
        return self._kill(training, victim), first_step_s

    def _kill(self, training: Training, victim: int | None) -> Kill | None:
        """Kill all processes, or one rank as soon as there is one; return None if nothing was alive any more."""
        if victim is None:
            training.kill_all()
            killed = training.process.returncode == -signal.SIGKILL
        else:
            while training.alive and not training.signal_rank(victim, signal.SIGKILL):
                time.sleep(POLL_S)
            killed = self._end_without(training, victim)
        fault = "all processes" if victim is None else f"rank {victim}"
        return Kill(fault, *self._hit(training)) if killed else None

    def _end_without(self, training: Training, victim: int) -> bool:
        """See that a launcher and the other ranks end by themselves; return False if all ended well before the kill."""
        began = time.monotonic()
        while training.alive and time.monotonic() - began < RANK_LIMIT_S:
            time.sleep(10 * POLL_S)
        what = f"{training.out.name}: after rank {victim} was killed"
        if training.alive:
            self._problem(f"{what}, the others had not ended {RANK_LIMIT_S:g} s later, see {training.log.name}")
        elif left := training.wait_for_all(5):
            self._problem(f"{what} and the launcher had ended, there still ran {left}")
        training.kill_all()
        return training.process.returncode != 0

    def _hit(self, training: Training) -> tuple[str, int]:
        """Return what a killed training was at, by what it has left, and its images since the newest state."""
        if not self._has_stepped(training):
            return "starting", 0
        seen = images_seen(training.out)
        repeated = seen - newest_whole_state(training.out)
        if self._writes_state(training.out):
            return "writing", repeated
        return ("finishing" if seen >= self._total else "training"), repeated

    def _has_stepped(self, training: Training) -> bool:
        went_on_from = training.went_on_from
        return went_on_from is not None and images_seen(training.out) > went_on_from

    def _writes_state(self, out: Path) -> bool:
        return not _unfinished_states(out) <= self._left

    def _note_start(self, training: Training, newest: int, first_step_s: float | None, ended: bool) -> None:
        """Note what a start tells of the kills before it."""
        went_on_from = training.went_on_from
        if went_on_from is None or not self._unrecovered:
            return
        last = self._unrecovered[-1]
        last.lost = max(last.lost, newest - went_on_from)
        if went_on_from != newest:
            self._problem(f"{training.out.name} went on from {went_on_from} images, its newest state is of {newest}")
        elif ended or first_step_s is not None:
            last.first_step_s = first_step_s
            for kill in self._unrecovered:
                kill.recovered = True
            self._unrecovered = []

    def _look_over(self, out: Path, kill: Kill) -> None:
        """Compare the states that a kill has left, and see that all files with final names are whole."""
        for broken in broken_files(out):
            self._problem(f"{out.name}: half-written {broken}")
        for path in state_folders(out):
            if path.name not in self._saved:
                continue
            kill.compared += 1
            if differing := differences(read_state(path), self._saved[path.name]):
                kill.differing += 1
                self._problem(f"{out.name}/{path.name} is not the reference's: {', '.join(differing)}")

    def _compare_ends(self, out: Path) -> None:
        """Compare what a finished run has left with the reference, statistics but for times and memory."""
        for pattern in ("network-*", "grids/*", "clips/*", "ema/*"):
            ours, theirs = (
                {str(path.relative_to(folder)) for path in folder.glob(pattern)} for folder in self._two(out)
            )
            more = ours - theirs if pattern != "ema/*" else set()  # averages are saved where a run goes on, too
            for name in sorted(theirs - ours | more):
                self._problem(f"finished {out.name}: {name} is there in one of it and the reference only")
            for name in sorted(ours & theirs):
                if not same_files(out / name, self._reference / name):
                    self._problem(f"finished {out.name}: {name} differs")
        if _plain_stats(out) != _plain_stats(self._reference):
            self._problem(f"finished {out.name}: stats.jsonl differs")
        last = state_folders(out)[-1]
        if last.name != max(self._saved) or differences(read_state(last), self._saved[last.name]):
            self._problem(f"finished {out.name}: {last.name} differs")
        for name in remains(out):
            self._problem(f"finished {out.name}: {name} was left there")

    def _two(self, out: Path) -> tuple[Path, Path]:
        return out, self._reference

    def _problem(self, text: str) -> None:
        self.result.problems.append(text)
        print(f"PROBLEM: {text}", flush=True)


def table(result: Result) -> str:
    """Write one row for each kind of fault."""
    header = ["fault", "injected", *(f"while {hit}" for hit in HITS), "recovered", "states compared", "different"]
    header += ["images repeated (median, max)", "lost", "start to first step (median)"]
    rows = [header]
    for fault in sorted({kill.fault for kill in result.kills}):
        kills = [kill for kill in result.kills if kill.fault == fault]
        hits, repeated = [kill.hit for kill in kills], [kill.repeated for kill in kills]
        seconds = [kill.first_step_s for kill in kills if kill.first_step_s is not None]
        row: list[object] = [fault, len(kills), *(hits.count(hit) for hit in HITS)]
        row += [sum(getattr(kill, name) for kill in kills) for name in ("recovered", "compared", "differing")]
        row += [f"{statistics.median(repeated):g}, {max(repeated)}", sum(kill.lost for kill in kills)]
        row += [f"{statistics.median(seconds):.1f} s" if seconds else "-"]
        rows.append([str(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the loop, print its table, and return 1 if there was a problem."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how many in all")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2), help="ranks of the training")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed and when")
    parser.add_argument("--kimg", type=float, default=1.2, help="length of a run")
    parser.add_argument("--core", type=int, help="train on this core alone; else on all")
    parser.add_argument("--work", type=Path, help="an empty folder for the runs, which is kept; else a temporary one")
    parser.add_argument("--json", type=Path, help="write every kill to this file")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stylepipe-kills-") as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        loop = Loop(work, options.kimg, options.processes, options.seed, options.core)
        print(f"the reference was trained in {loop.train_reference():.0f} s", flush=True)
        result = loop.run(options.kills)
    print(f"\n{table(result)}\n")
    print(
        f"{result.finished} runs came to their end with the reference's files; "
        f"{len(result.problems)} problems; {(time.monotonic() - began) / 60:.0f} minutes"
    )
    for problem in result.problems:
        print(f"  {problem}")
    if options.json is not None:
        options.json.write_text(json.dumps(_told(options) | asdict(result), indent=1) + "\n")
    return int(bool(result.problems))


def _told(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the loop was told, as JSON has it."""
    return {name: getattr(options, name) for name in ("kills", "processes", "seed", "kimg", "core")}


def _unfinished_states(out: Path) -> set[str]:
    return {path.name for path in out.glob(".*.tmp") if "state-" in path.name}


def _plain_stats(out: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(("Timing/", "Resources/"))}
        for line in stats_of(out)
    ]


if __name__ == "__main__":
    sys.exit(main())
