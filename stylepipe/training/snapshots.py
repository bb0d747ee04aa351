"""What a run leaves of its networks: grids of images, network files to use and states to go on from.

Networks and states are written by a thread of their own, from copies of the moment: the training does not wait for the
disk.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stylepipe.config import Config, filled
from stylepipe.datasets.order import ORDER_VERSION
from stylepipe.datasets.training_data import TrainingData
from stylepipe.errors import UserError
from stylepipe.images import grid_shape, make_grid, save_clip, save_image, shrunk
from stylepipe.interop.network_file import Content, content_of, write_network
from stylepipe.run_files import CLIPS_FOLDER, GRIDS_FOLDER, LOG_FILE, REAL_GRID, STATS_FILE, kimg_name, network_file
from stylepipe.training.checkpoint import (
    DIVERGED,
    DamagedStateError,
    amend_state,
    healthy_states,
    load_state,
    newest_state,
    prune_states,
    save_state,
    set_aside_later,
    state_folder,
)
from stylepipe.training.engine import Engine, is_healthy
from stylepipe.training.grids import real_images
from stylepipe.training.growth import Stage
from stylepipe.training.host_copies import HostCopies
from stylepipe.training.power_ema import averages_file
from stylepipe.training.settings import config_mapping
from stylepipe.training.tracker import Tracker

logger = logging.getLogger(__name__)

CLIP_CELLS, CLIP_SIDE = 4, 128  # images side by side, pixels
CLIP_STOPS, CLIP_FRAMES, CLIP_FRAME_MS = 3, 36, 80


@dataclass(frozen=True)
class Saving:
    """Something that is being written.

    Attributes:
        images_seen: of what moment.
        told: its name, for people; None where it is not told.
        network: the network file among it, if any.
    """

    images_seen: int
    told: str | None
    network: Path | None


class Snapshots:
    """Saves grids, networks and states of a run, on the main process.

    What is begun is to be settled: it may still fail.

    Args:
        config: resolved settings.
        engine: what is trained.
        dataset: of the run's resolution.
        out: folder of the run.
        tracker: where pictures go as well.
        say: tells the user of each file, and of what moment it is.
        origin: what network files shall say of where the run comes from, such as `derived_from`.

    Attributes:
        history: what states shall say of how the run fared until now; see `stylepipe.training.trainer`.
    """

    history: dict[str, Any]

    def __init__(
        self,
        config: Config,
        engine: Engine,
        dataset: TrainingData,
        out: Path,
        tracker: Tracker,
        say: Callable[..., None],
        origin: Mapping[str, str],
    ) -> None:
        self.config, self.engine, self.dataset, self.out = config, engine, dataset, out
        self.tracker, self.say, self.origin = tracker, say, origin
        self.history = {}
        self._writer = ThreadPoolExecutor(1, "saving")
        self._under_way: deque[tuple[Saving, Future[None]]] = deque()
        self._network_copies, self._state_copies, self._average_copies = HostCopies(), HostCopies(), HostCopies()

    def real_grid(self) -> None:
        """Save the data's images that every grid of the run is to be compared with."""
        columns, rows = grid_shape(self.config.res)
        classes = self.engine.recipe.classes_of_rows(rows)
        images = real_images(self.dataset, columns, rows, classes, self.config.on_bad == "skip")
        grid = make_grid(images, columns)
        if classes:
            names = [filled(self.dataset.classes)[number] for number in dict.fromkeys(classes)]
            self.say(f"rows of the grids, from the top: {', '.join(names)}")
        save_image(self.out / GRIDS_FOLDER / REAL_GRID, grid)
        self.tracker.log_image("Grids/real", grid, self.engine.images_seen)

    def grid(self, stage: Stage) -> None:
        """Save generated images at fixed latents."""
        columns, rows = grid_shape(self.config.res)
        grid = make_grid(self.engine.recipe.sample(columns, rows, stage).numpy(), columns)
        path = self.out / GRIDS_FOLDER / f"{kimg_name(self.engine.images_seen)}.png"
        save_image(path, grid)
        self.tracker.log_image("Grids/fake", grid, self.engine.images_seen)
        self.say(f"grid: {path}")

    def clip(self, stage: Stage) -> None:
        """Save images that turn into one another, along closed walks through latent space."""
        walks = self.engine.recipe.generated(stage).walks(CLIP_CELLS, CLIP_FRAMES, CLIP_STOPS)
        frames = [make_grid(shrunk(frame, CLIP_SIDE).cpu().numpy(), CLIP_CELLS) for frame in walks]
        path = self.out / CLIPS_FOLDER / f"{kimg_name(self.engine.images_seen)}.gif"
        save_clip(path, frames, CLIP_FRAME_MS)
        self.tracker.log_clip("Clips/fake", path, self.engine.images_seen)
        self.say(f"clip: {path}")

    def snapshot(self, stage: Stage, *, interim: bool = False) -> None:
        """Begin to save network and state; the state last, so that one that exists has its network beside it.

        The very first state comes before its network: networks without any state would be taken for another run's.

        Args:
            stage: of the last step.
            interim: save the state alone, to be deleted when there is a newer one.
        """
        seen = self.engine.images_seen
        path = None if interim else self.out / network_file(seen)
        save = self._saving_of_now(interim)
        content = None if interim else self._network(stage)

        def write() -> None:
            self._network_copies.wait()
            self._state_copies.wait()
            first = newest_state(self.out) is None
            if first:
                save()
            if path is not None and content is not None:
                new = not path.exists()
                write_network(path, content)
            if not first:
                try:
                    save()
                except OSError:
                    if path is not None and new:  # it takes the room that trying again needs
                        path.unlink()
                    raise
            with suppress(OSError):  # what should go and does not is no reason to save again
                prune_states(self.out, self.config.keep_states)

        told = f"{self.out / state_folder(seen)}" + ("" if path is None else f", {path.name}")
        self._begin(Saving(seen, told, path), write, self._network_copies, self._state_copies)

    def averages(self, stage: Stage) -> None:
        """Begin to save the power-function averages of now, if any are kept, for `stylepipe ema`.

        Those there already stay. They are of the whole network, however far it has grown: averages add up then.
        """
        seen = self.engine.images_seen
        path = averages_file(self.out, seen)
        if not self.engine.power_averages or path.exists():
            return
        ((first, *others),) = self.engine.power_averages.values()  # recipes average one network
        if first.start == seen:  # nothing to average yet
            return
        grown = {"resolution": str(stage.resolution), "alpha": str(stage.alpha)}
        length = {"sigma_rel": first.name, "ema_start": str(first.start)}
        beside = {other.name: other.average for other in others}
        content = content_of(first.average, beside=beside, metadata=self._about() | grown | length)
        copied = Content(self._average_copies.take(content.tensors), content.header)

        def write() -> None:
            self._average_copies.wait()
            path.parent.mkdir(exist_ok=True)
            write_network(path, copied)

        self._begin(Saving(seen, None, None), write, self._average_copies)

    def settle(self, *, wait: bool) -> tuple[list[Saving], list[tuple[Saving, str]]]:
        """Return what has been written since the last time, and what could not be, with the reason.

        Args:
            wait: until all that was begun has been written, or has failed.
        """
        written: list[Saving] = []
        failed: list[tuple[Saving, str]] = []
        while self._under_way and (wait or self._under_way[0][1].done()):
            saving, future = self._under_way.popleft()
            try:
                future.result()
            except (OSError, SafetensorError, UserError) as error:  # the last: a network that cannot be written
                failed.append((saving, str(error)))
                continue
            written.append(saving)
            if saving.told is not None:
                self.say(f"saved: {saving.told}", saving.images_seen)
            if saving.network is not None and self.config.tracker_artifacts:
                self.tracker.log_artifact(saving.network, ["latest"])
        return written, failed

    def close(self) -> None:
        """Wait for what is being written."""
        for _, reason in self.settle(wait=True)[1]:
            logger.warning("cannot save to %s: %s", self.out, reason)
        self._writer.shutdown()

    def set_aside(self) -> tuple[str, Path | None]:
        """Keep a diverged training's state and logs, and set aside what was saved since the last healthy state.

        No run goes on from these by itself. Where there is no room for it, the state is not kept.

        Returns:
            for people, where it was kept, or why not, and what healthy states are damaged; and the newest healthy one
            that is whole, if there is one.
        """
        healthy, damaged = self._healthy_state()
        set_aside_later(self.out, healthy)
        try:
            save = self._saving_of_now()
            self._state_copies.wait()
            kept = save(kind=DIVERGED)
            for name in (LOG_FILE, STATS_FILE):
                shutil.copy(self.out / name, kept)
        except (OSError, SafetensorError) as error:
            return f"the diverged state could not be kept ({error}){damaged}", healthy
        return f"the diverged state is kept as {kept}{damaged}", healthy

    def _healthy_state(self) -> tuple[Path | None, str]:
        """Return the newest healthy state that is as it was written; and what to say of those that are not."""
        damaged = ""
        for path in healthy_states(self.out):
            try:
                load_state(path)
                return path, damaged
            except DamagedStateError:
                damaged += f"; {path.name} is damaged and was passed over"
        return None, damaged

    def amend(self, path: Path) -> None:
        """Have a state that is there say how the run fares now.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        try:
            amend_state(path, {**self.history, "healthy": True})
        except OSError as error:
            raise UserError(f"cannot save to {self.out}: {error}; make room, then start the same command") from error

    def _about(self) -> dict[str, str]:
        """Return what network files say of the run and the moment."""
        seen = self.engine.images_seen
        metadata = {"images_seen": str(seen), "data": self.dataset.name, "preset": str(self.config.preset)}
        if self.config.cond:  # names by number, or null where labels are vectors
            metadata["classes"] = json.dumps(self.dataset.classes)
        return {**self.origin, **metadata}

    def _begin(self, saving: Saving, write: Callable[[], None], *read: HostCopies) -> None:
        future = self._writer.submit(write)
        self._under_way.append((saving, future))
        for copies in read:
            copies.reader = future

    def _network(self, stage: Stage) -> Content:
        """Return a copy of the network file of now."""
        network, beside = self.engine.recipe.export(stage)
        content = content_of(network, beside=beside if self.config.snapshot_with_d else {}, metadata=self._about())
        return Content(self._network_copies.take(content.tensors), content.header)

    def _saving_of_now(self, interim: bool = False) -> Callable[..., Path]:
        """Begin to copy the state of now; return what writes it once it is copied."""
        engine = self.engine
        info = {
            **self.history,
            "interim": interim,
            "tracker_run_id": self.tracker.run_id,
            "order_version": ORDER_VERSION,
            "data": self.dataset.facts,
            "config": config_mapping(self.config),
            "origin": self.origin,
        }
        seen, layout, copies = engine.images_seen, engine.layout(), self._state_copies.take(engine.state())

        def save(kind: str = "state") -> Path:
            return save_state(self.out, seen, copies, layout, info | {"healthy": is_healthy(copies)}, kind)

        return save
