"""The dashboard of a run, Weights & Biases or TensorBoard, through Accelerate's trackers.

The files in the run's folder (log.txt, stats.jsonl, grids/) are complete without it; see `stylepipe.training.progress`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from numpy.typing import NDArray
from PIL import Image

from stylepipe.config import TrackerKind
from stylepipe.errors import UserError

logger = logging.getLogger(__name__)

KIMG = "Progress/kimg"  # the axis of all that W&B draws
INIT_TIMEOUT_S = 30  # W&B's own is 90: too long a wait before training just because a node has no network


class Tracker:
    """Logs scalars, images and histograms by images_seen; on every process but the main one it does nothing.

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
        self._tracker: WandBTracker | TensorBoardTracker | None = None
        self._accelerator, self._project, self._out = accelerator, project, out
        if not accelerator.is_main_process or kind == "none":
            return
        if kind == "wandb":
            self.run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            self._tracker = _start_wandb(accelerator, project, dict(config), out, self.run_id)
        else:
            self._tracker = self._start_tensorboard(images_seen + 1 if images_seen else None)
            self._tracker.tracker.add_text("config", "\n".join(f"    {line}" for line in _lines(config)))
            logger.info("TensorBoard: tensorboard --logdir %s", out / "tensorboard")

    def log(self, scalars: Mapping[str, float], images_seen: int) -> None:
        """Log numbers under stable names such as Loss/G/adversarial."""
        if isinstance(self._tracker, WandBTracker):
            self._tracker.log({**scalars, KIMG: images_seen / 1000})
        elif self._tracker is not None:
            self._tracker.log(dict(scalars), step=images_seen)

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

    def log_artifact(self, path: Path, aliases: Sequence[str]) -> None:
        """Upload a network file, to be found under the run's id, version by version. TensorBoard has no such thing.

        A version that has been uploaded already only gets the aliases.
        """
        if isinstance(self._tracker, WandBTracker):
            import wandb

            artifact = wandb.Artifact(f"network-{self.run_id}", type="model")
            artifact.add_file(str(path))  # into W&B's cache: a run that is rolled back writes other files of this name
            self._tracker.tracker.log_artifact(artifact, aliases=list(aliases))

    def alert(self, name: str, text: str, images_seen: int) -> None:
        """Call the user: W&B notifies as its settings there say, TensorBoard shows a text."""
        if isinstance(self._tracker, WandBTracker):
            self._tracker.tracker.alert(title=name, text=text, level="WARN", wait_duration=0)
        elif self._tracker is not None:
            self._tracker.tracker.add_text(f"Alarm/{name}", text, global_step=images_seen)

    def rewind(self, images_seen: int) -> None:
        """Let the run go on from before: TensorBoard drops what came later, W&B draws its lines back from there."""
        if isinstance(self._tracker, TensorBoardTracker):
            self._tracker.finish()
            self._tracker = self._start_tensorboard(images_seen + 1)

    def finish(self) -> None:
        """Send or write what is still waiting."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

    def _start_tensorboard(self, purge_step: int | None) -> TensorBoardTracker:
        tracker = TensorBoardTracker("tensorboard", self._out, purge_step=purge_step)
        _start(self._accelerator, tracker, self._project)
        return tracker


def _start(
    accelerator: Accelerator, tracker: GeneralTracker, project: str, config: dict[str, Any] | None = None
) -> None:
    """Start a tracker as Accelerate does, so that it is also found through `accelerator.get_tracker`."""
    accelerator.log_with, accelerator.trackers = [tracker], []
    accelerator.init_trackers(project, config)


def _start_wandb(
    accelerator: Accelerator, project: str, config: dict[str, Any], out: Path, run_id: str
) -> WandBTracker:
    """Start W&B as the login and WANDB_MODE have it; offline if that fails, so that no run dies of its dashboard."""
    import wandb

    def start(mode: str) -> WandBTracker:
        # Accelerate's main process speaks for all; the group is where logs that a user adds on others find it.
        group = os.environ.get("WANDB_RUN_GROUP", run_id if accelerator.num_processes > 1 else None)
        quiet = wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S)
        name = os.environ.get("WANDB_NAME", out.name)
        tracker = WandBTracker(
            project, mode=mode, dir=str(out), id=run_id, name=name, group=group, resume="allow", settings=quiet
        )  # fmt: skip
        _start(accelerator, tracker, project, config)
        # W&B's own steps cannot go back, as a run that is rolled back does: it would drop what comes with earlier ones.
        tracker.run.define_metric("*", step_metric=KIMG)
        return tracker

    logging.getLogger("wandb").propagate = False  # it keeps its own debug.log; what matters is said below
    out.mkdir(parents=True, exist_ok=True)  # W&B would silently move to the system's temporary folder
    mode, reason = _wandb_mode()
    try:
        tracker = start(mode)
    except wandb.Error as error:
        wandb.teardown()  # else the id counts as in use
        reason = f"it cannot be reached: {' '.join(str(error).split())}"
        logger.warning("W&B: going on offline, since %s", reason)
        tracker = start("offline")
    if tracker.run.offline:
        # Each resume adds a folder with the same id; --append joins them.
        logger.info("W&B: offline (%s); to upload: wandb sync --append %s/wandb/offline-run-*-%s", reason, out, run_id)
    elif tracker.run.url:
        logger.info("W&B: %s", tracker.run.url)
    return tracker


def _wandb_mode() -> tuple[str, str]:
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


def _lines(config: Mapping[str, Any], path: str = "") -> list[str]:
    """Write nested settings as lines such as "network.z_dim: 512"."""
    lines = []
    for key, value in config.items():
        lines += _lines(value, f"{path}{key}.") if isinstance(value, Mapping) else [f"{path}{key}: {value}"]
    return lines
