"""Stopping in good order: Ctrl-C, SIGTERM, SIGHUP or the launcher's death end the training after the running step."""

from __future__ import annotations

import os
import signal
from collections import deque
from types import FrameType, TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

_LAG_STEPS = 2  # how many steps a GPU may lag behind before its answer is waited for


class Interrupt:
    """Within this context, requests to stop are noted instead of obeyed at once.

    Launchers pass a Ctrl-C on as further signals, so only the third SIGINT quits without saving.

    Args:
        device: this process's, where its votes go.
        parent: process id of the launcher, whose death is a request to stop; None if there is no launcher.

    Attributes:
        cause: what asked to stop, for the message to the user; None while nothing has.
        exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, device: torch.device, parent: int | None = None) -> None:
        self.cause: str | None = None
        self.exit_code = 0
        self._device = device
        self._parent = parent
        self._interrupts = 0
        self._votes: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __enter__(self) -> Interrupt:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Tell whether to stop after this step; every process calls this after every step and gets the same answer."""
        if self.cause is None and self._parent is not None and os.getppid() != self._parent:
            self.cause, self.exit_code = "the launcher has died", 128 + signal.SIGTERM
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.cause is not None
        stop = self._all_votes()
        if stop and self.cause is None:
            self.cause, self.exit_code = "another process was asked to stop", 128 + signal.SIGTERM
        return stop

    def _all_votes(self) -> bool:
        vote = torch.full((), float(self.cause is not None), device=self._device)  # a fill does not wait, a copy would
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        if self._device.type != "cuda":
            return bool(vote)
        # Read what was voted some steps ago: by then it has arrived, and the host waits for nothing.
        arrived = torch.empty((), pin_memory=True)
        arrived.copy_(vote, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._votes.append((arrived, event))
        if len(self._votes) <= _LAG_STEPS:
            return False
        arrived, event = self._votes.popleft()
        event.synchronize()
        return bool(arrived)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.cause = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.exit_code = 128 + number
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= 3:
            raise KeyboardInterrupt
