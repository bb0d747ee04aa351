"""The dashboard of a run, Weights & Biases or TensorBoard, through Accelerate's trackers.

The files in the run's folder (log.txt, stats.jsonl, grids/) are complete without it; see `stylepipe.training.progress`.
So nothing that a dashboard does may end or delay a training: a thread of its own speaks to it, and what fails is told.
"""

from __future__ import annotations

import atexit
import copy
import functools
import importlib.util
import logging
import os
import queue
import secrets
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from numpy.typing import NDArray
from PIL import Image

from stylepipe.config import TrackerKind
from stylepipe.errors import UserError
from stylepipe.parsing import one_line
from stylepipe.training.wandb_run import (
    FINISH_TIMEOUT_S,
    KILLED_S,
    KIMG,
    WandbService,
    failure_of,
    kill_wandb,
    start_tracker,
    start_wandb,
)

logger = logging.getLogger(__name__)

MEND_S = 60  # a dashboard that is lost is not started anew more often than that
MENDING_BYTES = 2**20  # nor on a disk with less than that
MOST_WAITING = 256  # calls, some of them with a grid of images

P = ParamSpec("P")


def _aside(method: Callable[Concatenate[Tracker, P], None]) -> Callable[Concatenate[Tracker, P], None]:
    """Have a method of Tracker done by its thread, in order, with what the arguments hold at the call."""

    def call(self: Tracker, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._thread is None:
            return
        if self._calls.qsize() < MOST_WAITING:
            self._calls.put(functools.partial(method, self, *copy.deepcopy(args), **copy.deepcopy(kwargs)))
        else:
            self._tell(f"it does not keep up; what comes while {MOST_WAITING} calls wait for it is left out")

    functools.update_wrapper(call, method)
    return call


class Tracker:
    """Logs scalars, images and histograms by images_seen; on every process but the main one it does nothing.

    No method raises or waits for the dashboard (`finish` does, for a bounded time); what goes wrong is told once, with
    what there is to be done. Where a dashboard's process or file is lost, it is started anew under the same id.

    Args:
        kind: "wandb", "tensorboard" or "none".
        accelerator: of this process; it needs no `log_with`.
        project: the dashboard's project; runs of one project are compared.
        config: the resolved settings and the versions of code and data, nested dictionaries of plain values.
        out: the run's folder; the tracker's files go below it.
        run_id: of the run that is resumed, else None.
        images_seen: where the run goes on; TensorBoard drops what was logged later than that.

    Raises:
        UserError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        kind: TrackerKind,
        accelerator: Accelerator,
        *,
        project: str,
        config: Mapping[str, Any],
        out: Path,
        run_id: str | None = None,
        images_seen: int = 0,
    ) -> None:
        if kind == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "--tracker tensorboard: it is not installed; run `pip install tensorboard` or choose another"
            )
        self.run_id: str | None = run_id
        """Names the run to W&B; saved with the state, it lets a resumed run go on in the same place."""
        self._kind, self._accelerator, self._project, self._config, self._out = kind, accelerator, project, config, out
        self._tracker: WandBTracker | TensorBoardTracker | None = None
        self._service: WandbService | None = None
        self._thread: threading.Thread | None = None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._told: set[object] = set()
        self._given_up = False
        self._mended: float = -MEND_S
        if not accelerator.is_main_process or kind == "none":
            return
        if kind == "wandb":
            self.run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if trouble := failure_of(functools.partial(self._start, images_seen + 1 if images_seen else None)):
            self._tell(trouble)
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()
        atexit.register(self.finish)  # where an error keeps the caller from it

    @_aside
    def log(self, scalars: Mapping[str, float], images_seen: int) -> None:
        """Log numbers under stable names such as Loss/G/adversarial."""
        if isinstance(self._tracker, WandBTracker):
            self._tracker.log({**scalars, KIMG: images_seen / 1000})
        elif self._tracker is not None:
            self._tracker.log(dict(scalars), step=images_seen)

    @_aside
    def log_image(self, name: str, image: NDArray[np.uint8] | Path, images_seen: int) -> None:
        """Log a picture: [H, W, 3] uint8, or the path of one."""
        if self._tracker is None:
            return
        pixels = np.asarray(Image.open(image).convert("RGB")) if isinstance(image, Path) else image
        if isinstance(self._tracker, WandBTracker):
            import wandb

            self._tracker.log({name: [wandb.Image(pixels)], KIMG: images_seen / 1000})
        else:
            self._tracker.log_images({name: pixels[None]}, step=images_seen, dataformats="NHWC")

    @_aside
    def log_histogram(self, name: str, values: NDArray[Any], images_seen: int) -> None:
        """Log how numbers are distributed; what is not finite is left out, and nothing is logged if nothing is left."""
        finite = np.asarray(values, dtype=np.float64).ravel()
        finite = finite[np.isfinite(finite)]
        if self._tracker is None or finite.size == 0:
            return
        if isinstance(self._tracker, WandBTracker):
            import wandb

            self._tracker.log({name: wandb.Histogram(finite.tolist()), KIMG: images_seen / 1000})
        else:
            self._tracker.tracker.add_histogram(name, finite, global_step=images_seen)

    @_aside
    def log_clip(self, name: str, path: Path, images_seen: int) -> None:
        """Log an animated GIF."""
        if isinstance(self._tracker, WandBTracker):
            import wandb

            self._tracker.log({name: wandb.Video(str(path), format="gif"), KIMG: images_seen / 1000})
        elif self._tracker is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # What add_video does, which would have the frames and moviepy.
            with Image.open(path) as clip:
                image = Summary.Image(height=clip.height, width=clip.width, colorspace=3)
            image.encoded_image_string = path.read_bytes()
            summary = Summary(value=[Summary.Value(tag=name, image=image)])
            self._tracker.tracker.file_writer.add_summary(summary, images_seen)

    @_aside
    def summarize(self, values: Mapping[str, float | str], images_seen: int) -> None:
        """Have these stand for the run where runs are compared; TensorBoard draws numbers and shows words."""
        if isinstance(self._tracker, WandBTracker):
            self._tracker.tracker.summary.update(dict(values))
        elif self._tracker is not None:
            for name, value in values.items():
                if isinstance(value, str):
                    self._tracker.tracker.add_text(name, value, global_step=images_seen)
                else:
                    self._tracker.tracker.add_scalar(name, value, global_step=images_seen)

    @_aside
    def log_artifact(self, path: Path, aliases: Sequence[str]) -> None:
        """Upload a network file, to be found under the run's id, version by version. TensorBoard has no such thing.

        A version that has been uploaded already only gets the aliases.
        """
        if isinstance(self._tracker, WandBTracker):
            import wandb

            artifact = wandb.Artifact(f"network-{self.run_id}", type="model")
            artifact.add_file(str(path))  # into W&B's cache: a run that is rolled back writes other files of this name
            self._tracker.tracker.log_artifact(artifact, aliases=list(aliases))

    @_aside
    def alert(self, name: str, text: str, images_seen: int) -> None:
        """Call the user: W&B notifies as its settings there say, TensorBoard shows a text."""
        if isinstance(self._tracker, WandBTracker):
            self._tracker.tracker.alert(title=name, text=text, level="WARN", wait_duration=0)
        elif self._tracker is not None:
            self._tracker.tracker.add_text(f"Alarm/{name}", text, global_step=images_seen)

    @_aside
    def rewind(self, images_seen: int) -> None:
        """Let the run go on from before: TensorBoard drops what came later, W&B draws its lines back from there."""
        if isinstance(self._tracker, TensorBoardTracker):
            self._tracker.finish()
            self._tracker = self._start_tensorboard(images_seen + 1)

    def finish(self, timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """Send or write what is still waiting, for so many seconds at the most; what W&B lacks then is on the disk."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        atexit.unregister(self.finish)
        self._calls.put(None)
        try:
            thread.join(timeout_s)
        finally:  # a Ctrl-C says that the user does not want to wait
            if thread.is_alive():
                self._tell(f"it had not taken everything after {timeout_s:g} s")
                self._given_up = True
                kill_wandb()
                thread.join(KILLED_S)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            trouble = failure_of(call)
            lost = self._lost(trouble)
            if lost or trouble:
                self._tell(lost or trouble)
            if lost:
                self._mend(call)
        lost = self._lost(None)
        if trouble := failure_of(self._close):
            self._tell(lost or trouble)

    def _lost(self, trouble: BaseException | None) -> object:
        """Return why nothing can be logged any more, or None."""
        if self._service is not None:
            return self._service.failure()
        return trouble if isinstance(trouble, OSError) else None  # the first one ends TensorBoard's writer

    def _mend(self, call: Callable[[], None]) -> None:
        """Start a dashboard anew that is lost and do the call with it, if the disk has room and not too often."""
        if self._given_up or time.monotonic() - self._mended < MEND_S:
            return
        self._mended = time.monotonic()
        with suppress(OSError):
            with tempfile.TemporaryFile(dir=self._out) as file:
                file.write(bytes(MENDING_BYTES))
            failure_of(self._close)
            if failure_of(self._start) is None:
                self._told.clear()  # what goes wrong from here on is in another folder
                failure_of(call)

    def _tell(self, trouble: object) -> None:
        """Warn once of each kind of trouble, and say what there is to be done."""
        kind = (type(trouble), getattr(trouble, "errno", None)) if isinstance(trouble, BaseException) else trouble
        if self._given_up or kind in self._told:
            return
        self._told.add(kind)
        if self._tracker is None:
            remedy = "--tracker none does without"
        elif self._service is None:
            remedy = "it goes on as soon as it can"
        else:
            remedy = f"to upload what it lacks: wandb sync --include-online {shlex.quote(self._service.folder)}"
        name = "W&B" if self._kind == "wandb" else "TensorBoard"
        what = one_line(str(trouble) or type(trouble).__name__)
        logger.warning("%s: %s; stats.jsonl has all numbers nevertheless; %s", name, what, remedy)

    def _start(self, purge_step: int | None = None) -> None:
        if self._kind == "wandb":
            assert self.run_id is not None
            self._tracker = start_wandb(self._accelerator, self._project, self._config, self._out, self.run_id)
            self._service = WandbService(self._tracker.run, self._tell)
        else:
            self._tracker = self._start_tensorboard(purge_step)
            self._tracker.tracker.add_text("config", "\n".join(f"    {line}" for line in _lines(self._config)))
            logger.info("TensorBoard: tensorboard --logdir %s", self._out / "tensorboard")

    def _close(self) -> None:
        try:
            if self._tracker is not None:
                self._tracker.finish()
        finally:
            if self._kind == "wandb":
                import wandb

                wandb.run = None  # one that could not be finished would be in the way of the next
                wandb.teardown()  # here, where somebody minds the time, rather than at the interpreter's end

    def _start_tensorboard(self, purge_step: int | None) -> TensorBoardTracker:
        tracker = TensorBoardTracker("tensorboard", self._out, purge_step=purge_step)
        start_tracker(self._accelerator, tracker, self._project)
        return tracker


def _lines(config: Mapping[str, Any], path: str = "") -> list[str]:
    """Write nested settings as lines such as "network.z_dim: 512"."""
    lines = []
    for key, value in config.items():
        lines += _lines(value, f"{path}{key}.") if isinstance(value, Mapping) else [f"{path}{key}: {value}"]
    return lines
