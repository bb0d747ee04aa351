"""Stopping in good order: signals, the end of --max-hours, the launcher's death end the training between two steps."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType

from stylepipe.training.distributed import any_process

SAME_REQUEST_S = 2.0
"""Launchers pass on what the whole process group has received already: within this time it is the same request."""

_STARTED = time.monotonic()


class Interrupt:
    """Within this context, requests to stop are noted instead of obeyed at once; a second one ends the process.

    Signals are SIGINT, SIGTERM, SIGUSR1 (as SLURM sends before the time is up) and, but under nohup, SIGHUP. A thread
    looks after them: the main thread may be waiting for other processes, where Python's own handlers never run.

    Args:
        parent: process id of the launcher, whose death is a request to stop; None if there is no launcher.
        max_hours: since this process began, after which to stop; None for no limit.

    Attributes:
        cause: what asked to stop, for the message to the user; None while nothing has.
    """

    def __init__(self, parent: int | None = None, max_hours: float | None = None) -> None:
        self.cause: str | None = None
        self._parent, self._max_hours = parent, max_hours
        self._asked_at: float | None = None

    def __enter__(self) -> Interrupt:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        self._numbers = frozenset(numbers)
        reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        self._listener = threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True)
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._writing.close()
        self._listener.join()

    @property
    def asked(self) -> bool:
        """Whether this process, perhaps alone, is to stop."""
        if self.cause is None and self._parent is not None and os.getppid() != self._parent:
            self.cause = "the launcher has died"
        if self.cause is None and self._max_hours is not None and time.monotonic() - _STARTED >= self._max_hours * 3600:
            self.cause = f"--max-hours {self._max_hours:g}"
        return self.cause is not None

    def agreed(self, failed: bool = False) -> bool:
        """Tell whether to stop before the next step; every process calls this then and gets the same answer.

        Args:
            failed: this process cannot go on.
        """
        stop = any_process(self.asked or failed)
        if stop and self.cause is None and not failed:
            self.cause = "another process was asked to stop, or cannot go on"
        return stop

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.cause is None:
            self.cause = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name

    def _listen(self, signals: socket.socket) -> None:
        with signals:
            while received := signals.recv(1):  # nothing: the other end has been closed
                if received[0] in self._numbers:
                    self._take(received[0])

    def _take(self, number: int) -> None:
        """Note the first request; leave at once for a second."""
        self._note(number, None)
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at >= SAME_REQUEST_S:
            sys.stderr.write("asked to stop for the second time: ending at once, without saving\n")
            os._exit(128 + number)
