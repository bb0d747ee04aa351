"""Nothing waits for ever: who is held up ends, and names the process that holds all up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stylepipe.training import watchdog
from stylepipe.training.activity import Activity
from stylepipe.training.watchdog import Beat, verdict

SCRIPT = Path(__file__).with_name("stalling.py")
LIMIT_S = 600.0
WAITING = Activity("waiting for the gradients of all processes", "waiting", 0.0)


def beat(what: str, kind: str, age_s: float) -> Beat:
    return Beat(7, "node7", what, kind, age_s)  # type: ignore[arg-type]


def judge(mine: Activity, others: dict[int, Beat], silent: dict[int, float] | None = None) -> str | None:
    beats = {0: beat(mine.what, mine.kind, 601.0), **others}
    return verdict(mine, 601.0, 0, beats, silent or {}, LIMIT_S)


def test_who_works_too_long_says_so_itself():
    told = judge(Activity("G/main after 40 kimg", "working", 0.0), {1: beat("the gradients", "waiting", 590.0)})
    assert told == "this process has been at G/main after 40 kimg for 601 s without getting on"


def test_who_waits_names_process_machine_and_phase_of_the_one_at_work():
    told = judge(WAITING, {1: beat("waiting", "waiting", 600.0), 2: beat("D/r1 after 40 kimg", "working", 600.0)})
    assert told == (
        "process 2 (node7) has been at D/r1 after 40 kimg for 600 s without getting on; "
        "this one has been waiting for the gradients of all processes for 601 s"
    )


def test_who_says_nothing_any_more_is_named_with_what_it_was_at():
    told = judge(WAITING, {3: beat("D/main after 40 kimg", "working", 4.0)}, silent={2: 300.0, 3: 310.0})
    assert told is not None
    assert "process 2 has not been heard of yet and has said nothing for 300 s" in told
    assert "process 3 (node7) was at D/main after 40 kimg and has said nothing for 310 s" in told


def test_who_waits_for_something_long_waits_on():
    assert judge(WAITING, {1: beat("preparing the data", "unlimited", 9000.0)}) is None
    assert judge(WAITING, {1: beat("G/main after 40 kimg", "working", 20.0)}) is None


def test_where_all_wait_the_link_is_named():
    told = judge(WAITING, {1: beat("waiting for statistics", "waiting", 601.0)})
    assert told is not None
    assert told.startswith("all processes wait for one another, as when the link between their machines is lost")


def test_where_nobody_can_be_heard_the_first_machine_is_named():
    told = verdict(WAITING, 601.0, 1, None, {0: 300.0}, LIMIT_S)
    assert told is not None
    assert told.startswith("the machine of process 0 cannot be reached")


def test_an_answer_that_does_not_come_once_tells_nothing(monkeypatch):
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 2)
    heard, limit = watchdog._Heard(0.0), 100.0
    for second in range(0, 60, 5):
        heard.note(None if second == 30 else {1: Beat(second, "node7", "preparing", "unlimited", 0.0)}, float(second))
        assert heard.silent(float(second), limit / 4).keys() <= {0}
        assert heard.beats[1].what == "preparing"
    assert heard.answered == 55.0
    heard.note(None, 90.0)
    assert heard.silent(90.0, limit / 4) == {0: 90.0, 1: 35.0}
    assert heard.answered == 55.0, "for so long nobody could be asked"


def run(fault: str) -> list[tuple[int, str]]:
    """Run stalling.py as two processes; return exit codes and what they said. One that is halted is ended here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), fault], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes
        )  # type: ignore[call-overload]
        for rank in range(2)
    ]
    try:
        said = [processes[0].communicate(timeout=240)[0]]
        if fault == "halted":
            processes[1].send_signal(signal.SIGKILL)
        said.append(processes[1].communicate(timeout=240)[0])
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.slow
def test_a_stalled_process_is_named_by_the_other_and_by_itself():
    (first, said), (second, own) = run("stalled")
    assert (first, second) == (1, 1)
    assert f"error (process 0): process 1 ({socket.gethostname()}) has been at G/main after 0.5 kimg for" in said
    assert "; start the same command again\n" in said
    assert "error (process 1): this process has been at G/main after 0.5 kimg for" in own


@pytest.mark.slow
def test_a_halted_process_is_missed():
    (first, said), _ = run("halted")
    assert first == 1
    assert "process 1 (" in said
    assert "has said nothing for" in said


@pytest.mark.slow
def test_a_killed_process_is_noticed_at_once():
    (first, said), (second, _) = run("killed")
    assert (first, second) == (1, -signal.SIGKILL)
    assert "lost: lost another process, while waiting for the beginning of the next step" in said


@pytest.mark.slow
def test_what_the_main_process_cannot_write_ends_all_with_one_message():
    (first, said), (second, other) = run("unwritable")
    assert (first, second) == (2, 2)
    assert said.startswith("told: [Errno ")
    assert "'/proc/none'; see to the path, its permissions and the room on its disk" in said
    assert other == ""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["long", "slow"])
def test_what_takes_long_but_gets_on_is_waited_for(fault):
    for code, said in run(fault):
        assert (code, said) == (0, "went on\n")


@pytest.mark.slow
def test_processes_that_wait_for_one_another_end():
    (first, said), (second, others) = run("entangled")
    assert (first, second) == (1, 1)
    assert "all processes wait for one another" in said + others, "the first to end may be lost to the other"
