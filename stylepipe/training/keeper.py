"""What a run leaves is kept whatever the disk does: a failure is an alarm, and saving is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import yaml

from stylepipe.config import Config
from stylepipe.errors import UserError
from stylepipe.files import atomic_path, locked
from stylepipe.run_files import CONFIG_FILE
from stylepipe.training import activity
from stylepipe.training.checkpoint import newest_state
from stylepipe.training.growth import Stage
from stylepipe.training.progress import RunLog
from stylepipe.training.run_folder import LOCK_NAME
from stylepipe.training.settings import config_mapping
from stylepipe.training.snapshots import Snapshots


class Keeper:
    """Has snapshots of a run saved, and sees what becomes of them; on any process but the main one it does nothing.

    Args:
        config: resolved settings.
        out: folder of the run.
        snapshots: save.
        log: of the run; None on any process but the main one.
        tidy: deletes network files that are not to be kept.
        alarm: tells the user, by the names of what has happened.

    Attributes:
        held_s: for how many seconds saving has held up the training.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        snapshots: Snapshots,
        log: RunLog | None,
        tidy: Callable[[], None],
        alarm: Callable[[Mapping[str, str]], None],
    ) -> None:
        self._config, self._out, self._snapshots, self._log = config, out, snapshots, log
        self._tidy, self._alarm = tidy, alarm
        self._failed = self._averages_failed = False  # what was last to be saved
        self._interim = False
        self._lock = ExitStack()
        self._locked = _identity(out / LOCK_NAME)
        self._log_failed = self._vanished = False
        self.held_s = 0.0

    def begin(self, stage: Stage, *, interim: bool) -> None:
        """Begin to save state and, but for an interim one, network."""
        if self._log is None:
            return
        began = time.perf_counter()
        self.settle(wait=True)  # a disk that is slower than the training holds it up here
        self._interim = interim
        with activity.during("saving"):
            self._snapshots.snapshot(stage, interim=interim)
        self.held_s += time.perf_counter() - began

    def try_again(self, stage: Stage) -> None:
        """Begin to save what could not be saved last time, as it is now."""
        if self._failed or self._averages_failed:
            self.settle(wait=True)  # perhaps it could by now
        if self._failed:
            self.begin(stage, interim=self._interim)
        if self._averages_failed:
            self.averages(stage)

    def averages(self, stage: Stage) -> None:
        """Begin to save the power-function averages."""
        if self._log is None:
            return
        began = time.perf_counter()
        with activity.during("saving"):
            self._snapshots.averages(stage)
        self.held_s += time.perf_counter() - began

    def settle(self, *, wait: bool) -> None:
        """See what has become of what was begun.

        Args:
            wait: for all of it.
        """
        if self._log is None:
            return
        with activity.during("saving"):
            written, failed = self._snapshots.settle(wait=wait)
        for saving in written:
            if saving.told is None:
                self._averages_failed = False
            else:
                self._failed = False
                self._tidy_up()
        for saving, reason in failed:
            if saving.told is None:
                told = f"averages for `stylepipe ema` cannot be saved to {self._out}: {reason}; it is tried again"
                self._alarm_once("averages", told, self._averages_failed)
                self._averages_failed = True
            else:
                older = "" if newest_state(self._out) is None else "; older states are still there"
                told = f"cannot save to {self._out}: {reason}{older}; make room, it is tried again"
                self._alarm_once("saving", told, self._failed)
                self._failed = True
        if self._log.failure is not None and not self._log_failed:
            self._alarm(
                {"log": f"the logs cannot be written to {self._out}: {self._log.failure}; their lines are kept"}
            )
        self._log_failed = self._log.failure is not None

    def finish(self, stage: Stage) -> None:
        """Save what is still to be saved, and wait for it.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        self.settle(wait=True)
        if self._failed:
            self.begin(stage, interim=False)
        self.averages(stage)
        with activity.during("saving"):
            _, failed = self._snapshots.settle(wait=True)
        if not failed:
            self._failed = False
            self._tidy_up()
            return
        if all(saving.told is None for saving, _ in failed):
            raise UserError(
                f"averages for `stylepipe ema` cannot be saved to {self._out}: {failed[0][1]}; the state is saved: "
                f"make room, then start the same command with this --out, which saves them"
            )
        there = "no state was saved before" if newest_state(self._out) is None else "older states are still there"
        raise UserError(
            f"cannot save to {self._out}: {failed[0][1]}; nothing half-written is left, and {there}; make room, then "
            f"start the same command with this --out"
        )

    def show(self, save: Callable[[Stage], None], stage: Stage) -> None:
        """Save pictures; a full disk is no reason to end the training."""
        if self._log is None:
            return
        try:
            with activity.during("making pictures", "unlimited"):
                save(stage)
        except (OSError, UserError) as error:
            self._alarm({"pictures": f"cannot be saved: {error}"})

    def see_to_folder(self) -> None:
        """Make the run's folder anew where somebody has removed it: what is still learnt has to go somewhere.

        Raises:
            UserError: another run has taken its place.
        """
        lock = self._out / LOCK_NAME
        if self._log is None or (self._out.is_dir() and _identity(lock) == self._locked and not self._vanished):
            return
        self._vanished = self._vanished or not self._out.is_dir()
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            held = self._lock.enter_context(locked(lock, wait=False))
            self._locked = _identity(lock)
            if held and self._vanished:
                self._log.rewind(self._log.images_seen)
                self.write_config()
        except OSError:  # the next thing that is saved tells of it
            return
        if not held:
            raise UserError(
                f"--out {self._out}: was removed, and another process is training there by now; end one of both"
            )
        if self._vanished:
            self._vanished = False
            self._alarm({"folder": f"{self._out} has vanished and was made anew; what it held before is gone"})

    def _alarm_once(self, name: str, text: str, raised: bool) -> None:
        """Raise an alarm, or write a line where it has been raised before."""
        if raised and self._log is not None:
            self._log.line(text)
        else:
            self._alarm({name: text})

    def _tidy_up(self) -> None:
        try:
            self._tidy()
        except OSError as error:
            self._alarm({"tidying": f"older networks could not be deleted: {error}"})

    def write_config(self) -> None:
        """Write the settings, as config.yaml."""
        if self._log is None:
            return
        with atomic_path(self._out / CONFIG_FILE) as path:
            path.write_text(yaml.safe_dump(config_mapping(self._config), sort_keys=False))


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another of its name; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
