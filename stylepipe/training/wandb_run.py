"""Weights & Biases: a run there, started so that nothing of it can end a training, and its process watched."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, WandBTracker

from stylepipe.parsing import one_line

logger = logging.getLogger(__name__)

KIMG = "Progress/kimg"  # the axis of all that W&B draws
INIT_TIMEOUT_S = 30  # W&B's own is 90: too long a wait before training just because a node has no network
FINISH_TIMEOUT_S = 60  # for what is still to be uploaded when a training ends
STOP_TIMEOUT_S = 10  # the same where it was asked to stop: launchers leave 30 s for everything, states included
KILLED_S = 5  # a call ends when W&B's process has
FLUSH_S = 1  # W&B's own is 15: so much would be lost where its process is killed
STUCK_S = 30  # W&B's file of an offline run grows with each tick, unless the disk is full


class WandbService:
    """W&B's own process, wandb-core: it writes a run's file and uploads it, and it may die or fail to write.

    To W&B it is the logger that gets what would be printed.

    Args:
        run: of `wandb.init`.
        tell: is told where W&B gives up uploading, as when the server refuses what it is sent.

    Attributes:
        folder: of the run's file, for `wandb sync`.
    """

    def __init__(self, run: Any, tell: Callable[[str], None]) -> None:
        import wandb

        wandb.termsetup(wandb.Settings(silent=True), self)
        self.folder: str = run.sync_dir
        self._tell = tell
        self._process = next(iter(_wandb_processes()), None)
        self._file = Path(self.folder, f"run-{run.id}.wandb") if run.offline else None
        self._size, self._looked = -1, time.monotonic()

    def failure(self) -> str | None:
        """Return why the run cannot be logged any more, or None; called after something has been logged."""
        if self._process is not None and not _runs_wandb(self._process):
            return "its process wandb-core has ended"
        if self._file is None or time.monotonic() - self._looked < STUCK_S:
            return None
        before, self._looked = self._size, time.monotonic()
        try:
            self._size = self._file.stat().st_size
        except OSError:
            self._size = before
        return None if self._size != before else f"{self._file} does not grow, as on a full disk"

    def info(self, msg: str) -> None:
        """Say nothing: what W&B mentions is in its debug.log, and its errors come with an exception."""

    error = info

    def warning(self, msg: str) -> None:
        """Pass on that something is not uploaded; other warnings are that an artifact is there already, or the like."""
        if "wandb sync" in msg:
            self._tell(msg.removeprefix("wandb: WARNING "))


def start_wandb(
    accelerator: Accelerator, project: str, config: Mapping[str, Any], out: Path, run_id: str
) -> WandBTracker:
    """Start W&B as the login and WANDB_MODE have it; offline if that fails, so that no run dies of its dashboard."""
    # Its reports to its makers on its own errors would hold the end up by 10 s where the server hangs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    def start(mode: str) -> WandBTracker:
        # Accelerate's main process speaks for all; the group is where logs that a user adds on others find it.
        group = os.environ.get("WANDB_RUN_GROUP", run_id if accelerator.num_processes > 1 else None)
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S + KILLED_S,  # for what W&B does by itself at the interpreter's end
            x_transaction_log_flush_interval=FLUSH_S,
        )
        name = os.environ.get("WANDB_NAME", out.name)
        tracker = WandBTracker(
            project, mode=mode, dir=str(out), id=run_id, name=name, group=group, resume="allow", settings=settings
        )  # fmt: skip
        start_tracker(accelerator, tracker, project, dict(config))
        # W&B's own steps cannot go back, as a run that is rolled back does: it would drop what comes with earlier ones.
        tracker.run.define_metric("*", step_metric=KIMG)
        return tracker

    logging.getLogger("wandb").propagate = False  # it keeps its own debug.log; what matters is said below
    out.mkdir(parents=True, exist_ok=True)  # W&B would silently move to the system's temporary folder
    mode, reason = wandb_mode()
    level, how = logging.INFO, "offline"
    try:
        tracker = start(mode)
    except Exception as error:
        failure_of(wandb.teardown)  # else the id counts as in use
        level, how, reason = logging.WARNING, "going on offline", one_line(error)
        tracker = start("offline")
    if tracker.run.offline:
        # Each start has a folder of its own; the server appends what comes under the same id.
        folder = shlex.quote(str(out / "wandb"))
        logger.log(level, "W&B: %s (%s); to upload: wandb sync %s/offline-run-*-%s", how, reason, folder, run_id)
    elif tracker.run.url:
        logger.info("W&B: %s", tracker.run.url)
    return tracker


def wandb_mode() -> tuple[str, str]:
    """Return W&B's mode and the reason for it: WANDB_MODE decides, else whether there is a login; never ask for one."""
    import wandb

    asked = os.environ.get("WANDB_MODE")
    if asked:
        return asked, f"WANDB_MODE={asked}"
    try:
        wandb.setup(settings=wandb.Settings(silent=True))
        return ("online", "logged in") if wandb.login(prompt=False, verify=False) else ("offline", "not logged in")
    except wandb.Error as error:
        return "offline", f"the login does not work: {error}"


def start_tracker(
    accelerator: Accelerator, tracker: GeneralTracker, project: str, config: dict[str, Any] | None = None
) -> None:
    """Start a tracker as Accelerate does, so that it is also found through `accelerator.get_tracker`."""
    accelerator.log_with, accelerator.trackers = [tracker], []
    accelerator.init_trackers(project, config)


def failure_of(call: Callable[[], None]) -> BaseException | None:
    """Do something with a dashboard and return what it failed with; nothing else catches what dashboards raise."""
    try:
        call()
    except (Exception, SystemExit) as error:  # W&B's teardown exits where its process has failed
        return error
    return None


def _wandb_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if _runs_wandb(child)]


def _runs_wandb(process: psutil.Process) -> bool:
    try:
        return bool(process.name() == "wandb-core" and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill_wandb() -> None:
    """End W&B's process, for which the interpreter's end would wait; files have what was logged up to a second ago."""
    for process in _wandb_processes():
        with suppress(psutil.Error):
            process.kill()
            process.wait(KILLED_S)
