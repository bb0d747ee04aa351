"""Requests to stop: noted once, agreed on by all processes, and at a second one the process ends at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from stylepipe.training import interrupt as module
from stylepipe.training.interrupt import Interrupt


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGINT, "Ctrl-C"),
        (signal.SIGHUP, "SIGHUP"),
        (signal.SIGUSR1, "SIGUSR1"),
    ],
)
def test_a_signal_is_noted_and_obeyed_before_the_next_step(number, cause):
    before = signal.signal(number, signal.default_int_handler)  # whatever the shell that runs the tests ignores
    try:
        with Interrupt() as interrupt:
            assert not interrupt.agreed()
            os.kill(os.getpid(), number)
            assert interrupt.agreed()
            os.kill(os.getpid(), number)  # launchers repeat themselves
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.cause == cause
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_hangup_that_the_shell_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_time_is_up_when_the_process_has_run_so_long(monkeypatch):
    with Interrupt(max_hours=1.5) as interrupt:
        monkeypatch.setattr(module, "_STARTED", time.monotonic() - 1.4 * 3600)
        assert not interrupt.agreed()
        monkeypatch.setattr(module, "_STARTED", time.monotonic() - 1.5 * 3600)
        assert interrupt.agreed()
    assert interrupt.cause == "--max-hours 1.5"


def test_who_cannot_go_on_has_all_stop():
    with Interrupt() as interrupt:
        assert interrupt.agreed(failed=True)
        assert interrupt.cause is None  # its own message says what is wrong


# The main thread computes without ever coming back to Python, as one does that waits for another process.
BUSY = """
import sys, torch
from stylepipe.training.interrupt import Interrupt
with Interrupt():
    print("ready", flush=True)
    torch.ones(6000, 6000, dtype=torch.float64).matrix_power(2**20 - 1)
"""


def test_a_second_request_ends_a_process_that_hears_nothing():
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)  # of the same request
            time.sleep(module.SAME_REQUEST_S)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 128 + signal.SIGINT
            assert process.stderr.read() == "asked to stop for the second time: ending at once, without saving\n"
        finally:
            process.kill()


ORPHAN = """
import os, sys, time
from stylepipe.training.interrupt import Interrupt
with Interrupt(parent=int(sys.argv[2]) or None) as interrupt:
    print(interrupt.agreed(), flush=True)
    for _ in range(40):
        if interrupt.agreed():
            break
        time.sleep(0.05)
    open(sys.argv[1], "w").write(str(interrupt.cause))
"""


@pytest.mark.parametrize(("watched", "cause"), [(True, "the launcher has died"), (False, "None")])
def test_the_death_of_a_launcher_is_noticed_and_that_of_a_shell_is_not(tmp_path, watched, cause):
    parent = "str(os.getpid())" if watched else "'0'"
    launcher = (
        f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {ORPHAN!r}, '{tmp_path}/cause', {parent}])"
    )
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "False\n"
        process.kill()
        process.wait()
        process.stdout.read()  # ends when the orphan does
    assert (tmp_path / "cause").read_text() == cause
