"""The training loop: batches in, steps, and at their intervals log lines, grids, states and network files."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stylepipe.config import Config, filled
from stylepipe.datasets.order import ORDER_VERSION
from stylepipe.datasets.reader import Batch
from stylepipe.datasets.training_data import TrainingData
from stylepipe.errors import UserError
from stylepipe.run_files import clear_half_files, network_file
from stylepipe.training import activity
from stylepipe.training.alarms import Alarms, divergence_in
from stylepipe.training.averaging import Exchange
from stylepipe.training.checkpoint import (
    State,
    check_fits,
    clear_remains,
    load_state,
    newest_healthy_state,
    set_aside_damaged,
)
from stylepipe.training.distributed import on_every_process, on_main_process, sum_, together
from stylepipe.training.diversity_watch import DiversityWatch
from stylepipe.training.engine import Engine
from stylepipe.training.evaluation import Evaluation
from stylepipe.training.feed import Feed
from stylepipe.training.growth import Schedule, Stage, end_of
from stylepipe.training.interrupt import Interrupt
from stylepipe.training.keeper import Keeper
from stylepipe.training.launched import command_again, launcher_process
from stylepipe.training.lines import opening_line, stage_line, tick_line
from stylepipe.training.measuring import RunMetrics
from stylepipe.training.memory import is_out_of_memory, peak_memory_gib
from stylepipe.training.phase import Recipe
from stylepipe.training.power_ema import remove_later_averages
from stylepipe.training.progress import Progress, RunLog
from stylepipe.training.rollbacks import Rollbacks
from stylepipe.training.settings import changes_since, check_growth, config_mapping, penalties_changed
from stylepipe.training.snapshots import Snapshots
from stylepipe.training.tracker import Tracker
from stylepipe.training.wandb_run import FINISH_TIMEOUT_S, STOP_TIMEOUT_S
from stylepipe.version import code_version

logger = logging.getLogger(__name__)

PROJECT = "stylepipe"


class Trainer:
    """Trains a recipe on a data set and leaves the run in `out`.

    Args:
        config: resolved settings.
        recipe: what to train.
        dataset: of the run's resolution.
        accelerator: device and processes.
        out: folder of the run, there already.
        state: where to go on from, or None to start anew; its tensors are needed on the main process only.
        origin: what network files shall say of where a run that starts anew comes from, such as `derived_from`; one
            that goes on says what it said before.
        evaluation: what measures the averaged network, or None.

    Attributes:
        first_image, total_images: where this process takes the training up, and where it ends.
        sec_per_kimg: speed of all steps of this process, without grids and snapshots; None before the first log line.

    Raises:
        UserError: the state belongs to other networks, or the tracker is not to be had.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        dataset: TrainingData,
        accelerator: Accelerator,
        out: Path,
        state: State | None = None,
        origin: Mapping[str, str] | None = None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.config, self.recipe, self.dataset, self.accelerator, self.out = config, recipe, dataset, accelerator, out
        self.is_main = accelerator.is_main_process
        self.engine = Engine(
            recipe,
            optim=config.optim,
            ema=config.ema,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            exchange=Exchange(config.reduce_dtype),
        )
        run_id = None
        origin = dict(origin or {})
        if state is not None:
            check_growth(state, config)
            check_fits(state, self.engine.layout())
            if self.is_main:
                self.engine.load_state(state.tensors, state.images_seen)
            self.engine.share_state()
            origin = state.info.get("origin", {})
            if state.path.resolve().parent == out.resolve():  # a branch of a run is a run of its own
                run_id = state.info.get("tracker_run_id")
            if state.info.get("order_version") != ORDER_VERSION:
                logger.warning(
                    "%s was saved with another order of images; from here on the new order holds", state.path
                )
        history = {} if state is None or penalties_changed(state, config) else state.info
        self._rollbacks = Rollbacks(recipe, history)
        self._alarms = Alarms({} if state is None else state.info.get("alarms"))
        self._diversity = DiversityWatch(recipe, dataset, config.on_bad == "skip")
        self.first_image = self.engine.images_seen
        self.total_images = last_image(recipe.schedule, self.first_image, filled(config.kimg))
        self._last = self._stage_before()
        self.sec_per_kimg: float | None = None
        self._seconds, self._images = 0.0, 0
        self._tick_start, self._tick_images = time.perf_counter(), self.first_image
        self._saved_at = self.first_image  # up to here there is nothing that is not saved, or is on its way
        self._stats: dict[str, float] = {}  # of the last tick
        self._interrupt = Interrupt(launcher_process(), config.max_hours)
        self._feed = Feed(config, dataset, accelerator, self.engine.record, self.say, lambda: self._interrupt.asked)
        self._asked_to_stop = False
        self._measured = True  # what is due
        self._lacks_network = False
        self._changes = [] if state is None else changes_since(state, config, dataset)
        self.log: RunLog | None = None
        self._on_main(partial(self._take_over_folder, state))
        self.tracker = Tracker(
            config.tracker,
            accelerator,
            project=PROJECT,
            config={**config_mapping(config), "versions": {"code": code_version(), "data": dataset.facts}},
            out=out,
            run_id=run_id,
            images_seen=self.engine.images_seen,
        )
        self.snapshots = Snapshots(config, self.engine, dataset, out, self.tracker, self.say, origin)
        self.metrics = RunMetrics(config, recipe, evaluation, accelerator, out, self.tracker, self.say)
        self.keeper = Keeper(config, out, self.snapshots, self.log, self._thin_networks, self._raise_alarms)
        self._note_history()
        self.progress = Progress(self.total_images / 1000, self.engine.images_seen, shown=self.is_main)

    def run(self) -> None:
        """Train to the end, or until asked to stop; the last state and network are always written."""
        parts = (self.config, self.recipe, self.dataset, self.accelerator, self.out)
        self.say(opening_line(*parts, self.first_image, self.total_images))
        for line in self._changes:
            self.say(line)
        if self._rollbacks.count:
            self.say(f"rolled back {self._rollbacks.count} times so far: {self._rollbacks.penalties}")
        with self._interrupt as interrupt:
            if self.engine.images_seen == 0:
                self._on_main(self.snapshots.real_grid)
                self.keeper.show(self.snapshots.grid, self._last)
            if self.config.on_divergence == "rollback":
                self._on_main(self._see_to_a_healthy_state)
            self.keeper.averages(self._last)  # a full disk, or another folder, may lack them
            if not self.finished:
                self._on_main(self.keeper.write_config)
            if self._lacks_network:
                self.keeper.begin(self._last, interim=False)
            self._make_up_for_measuring()
            on_every_process(self.accelerator, self._open_data)
            self._tick_start, self._tick_images = time.perf_counter(), self.engine.images_seen
            failure = None
            while not self.finished:
                stage = self.stage
                batch, failure = self._next_batch(stage)
                if interrupt.agreed(failed=batch is None):
                    break
                assert batch is not None
                self._step(batch)
                self._last = stage
                self.progress.update(self.engine.images_seen)
                self._keep_up()
            self._save_the_end()
            self._asked_to_stop = interrupt.asked
            on_every_process(self.accelerator, _stop_for, failure)
        self.say(self._closing(interrupt.cause))

    def _take_over_folder(self, state: State | None) -> None:
        """Have the run's folder hold nothing later than the state to go on from, and open its logs."""
        clear_remains(self.out)
        clear_half_files(self.out)
        own = state is not None and state.path.resolve().parent == self.out.resolve()
        if state is not None and own:
            set_aside_damaged(state.passed_over)
            network = self.out / network_file(state.images_seen)
            self._lacks_network = not (state.info.get("interim", False) or network.exists())
        remove_later_averages(self.out, self.first_image if own else 0)
        self.log = RunLog(self.out, None if state is None else state.images_seen)

    @property
    def stage(self) -> Stage:
        """What the training looks like now."""
        return self.recipe.schedule.at(self.engine.images_seen)

    def _stage_before(self) -> Stage:
        """Return what the last step looked like; before the first, what that will look like."""
        seen, schedule = self.engine.images_seen, self.recipe.schedule
        if seen == 0:
            return self.stage
        return schedule.at(max(0, seen - schedule.at(seen - 1).batch_size))

    @property
    def finished(self) -> bool:
        """Whether all images have been seen."""
        return self.engine.images_seen >= self.total_images

    def close(self) -> None:
        """Let go of data, terminal, tracker and log."""
        self._feed.close()
        self.snapshots.close()
        self.progress.close()
        self.tracker.finish(STOP_TIMEOUT_S if self._asked_to_stop else FINISH_TIMEOUT_S)
        if self.log is not None:
            self.log.close()

    def _open_data(self) -> None:
        """Open the data where the training stands."""
        self._feed.open(self.stage, self.engine.images_seen)

    def _next_batch(self, stage: Stage) -> tuple[Batch | None, UserError | None]:
        """Return the next batch; none where the data cannot be read, with the reason, or on a request to stop."""
        try:
            if not self._feed.serves(stage):
                self.say(stage_line(stage))
                self._open_data()
            return self._feed.next(self.engine.images_seen), None
        except UserError as error:
            return None, error

    def _step(self, batch: Batch) -> None:
        """Take a step.

        Raises:
            UserError: there is too little memory for it; what was learnt before is saved where that can still be done.
        """
        try:
            self.engine.step(batch)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Behind the handler, which keeps alive all that the step has allocated.
        saved = ""
        if self.is_main and self.engine.whole and self.engine.images_seen != self._saved_at:
            self._note_history()
            self.keeper.begin(self._last, interim=False)
            self.keeper.finish(self._last)
            saved = f", all up to {self.engine.images_seen / 1000:g} kimg is saved"
        raise UserError(
            f"--batch-gpu {self.stage.batch_gpu}: out of memory on {self.accelerator.device}{saved}; start the same "
            f"command with --out {self.out} and half of it, or with --batch-gpu auto"
        )

    def _keep_up(self, stopping: bool = False) -> None:
        """Do what is due after a step, or before the training stops short of its end."""
        self.keeper.settle(wait=False)
        ends_level = self.stage.resolution != self._last.resolution
        measure = not stopping and self._measures_now()
        network = stopping or measure or self.finished or ends_level or self._due(self.config.snapshot_kimg)
        state = network or self._due(self.config.state_kimg)
        grid = not stopping and (self.finished or self._due(self.config.grid_kimg))
        clip = not stopping and (self.finished or self._due(self.config.clip_kimg))
        diversity = not stopping and self._due(self.config.diversity_kimg)
        if state or grid or clip or diversity or self._due(self.config.tick_kimg):
            self._on_main(self.keeper.see_to_folder)
            if self.engine.images_seen > self._tick_images:
                self._stats = self._tick(diversity)
            divergence = divergence_in(self._stats, self.config.divergence_updates)
            if grid:
                self.keeper.show(self.snapshots.grid, self._last)
            if clip:
                self.keeper.show(self.snapshots.clip, self._last)
            if divergence:
                self._recover(divergence)
            elif state:
                self._save(interim=not network)
            else:
                self.keeper.try_again(self._last)
            if measure and not divergence:
                self.keeper.settle(wait=True)  # what took so long to learn is safe before
                self._measured = self.metrics.measure(
                    self._last, self.engine.images_seen, lambda: self._interrupt.asked
                )
            self._tick_start, self._tick_images = time.perf_counter(), self.engine.images_seen
        if self._due(filled(self.config.ema.posthoc_kimg)):
            self.keeper.averages(self._last)

    def _save(self, *, interim: bool) -> None:
        """Begin to save state and, but for an interim one, network."""
        if not divergence_in(self._stats, 1):
            self._rollbacks.end_the_row()
        self._note_history()
        self._saved_at = self.engine.images_seen
        self.keeper.begin(self._last, interim=interim)

    def _save_the_end(self) -> None:
        """Save where the training ends or stops, on every process.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        if self.engine.images_seen != self._saved_at:
            self._keep_up(stopping=True)
        self._on_main(partial(self.keeper.finish, self._last))

    def _thin_networks(self) -> None:
        self.metrics.thin_networks(self.engine.images_seen)

    def _measures_now(self) -> bool:
        """Tell whether the network of now is to be measured."""
        return (self.finished or self._due(filled(self.config.metrics_kimg))) and self.metrics.measures(self._last)

    def _make_up_for_measuring(self) -> None:
        """Measure where the run goes on, if it was stopped between saving that and measuring it."""
        seen = self.engine.images_seen
        if seen > 0 and self._measures_now() and self.metrics.misses(self._last, seen):
            self._measured = self.metrics.measure(self._last, seen, lambda: self._interrupt.asked)

    def _recover(self, divergence: str) -> None:
        """Roll back to the last healthy state, or stop; either way a state is kept of what happened.

        Raises:
            UserError: the training stops here.
        """
        self.keeper.settle(wait=True)
        with activity.during("saving"):
            kept, healthy = on_main_process(self.accelerator, self.snapshots.set_aside)
        self._on_main(self.metrics.follow_best)
        happened = f"training has diverged at {self.engine.images_seen / 1000:g} kimg: {divergence}"
        stops = self.config.on_divergence == "stop"
        if stops or healthy is None or self._rollbacks.exhausted:
            way_out = self._rollbacks.way_out(self.out, healthy, stops=stops)
            self._on_main(partial(_stop, f"{happened}; {way_out}; {kept}"))
        assert healthy is not None
        alarms = on_main_process(self.accelerator, self._go_back_to, healthy)
        self.engine.share_state()
        self._rollbacks.add()
        self._alarms = Alarms(alarms)
        self._note_history()
        self._last, self._saved_at = self._stage_before(), self.engine.images_seen
        self._on_main(partial(self.snapshots.amend, healthy))  # before it is told: a resumed run goes on the same way
        told = f"{happened}; rolled back to {healthy}, with {self._rollbacks.penalties} from there on; {kept}"
        self._on_main(partial(self._tell_rollback, told))
        on_every_process(self.accelerator, self._open_data)

    def _go_back_to(self, path: Path) -> Mapping[str, Any] | None:
        """Take over a state; return what it says of alarms."""
        state = load_state(path)
        self.engine.load_state(state.tensors, state.images_seen)
        return state.info.get("alarms")

    def _tell_rollback(self, told: str) -> None:
        assert self.log is not None
        seen = self.engine.images_seen
        try:
            self.log.rewind(seen)
        except OSError as error:
            raise UserError(f"cannot write to {self.out}: {error}; make room, then start the same command") from error
        self.tracker.rewind(seen)
        self._raise_alarms({"rollback": told})
        self.log.stats(seen, {"Alarm/rollback": told})

    def _see_to_a_healthy_state(self) -> None:
        """Save a state to roll back to where there is none yet."""
        if newest_healthy_state(self.out) is None:
            self.keeper.begin(self._last, interim=False)
            self.keeper.finish(self._last)

    def _due(self, kimg: float) -> bool:
        """Tell whether the last step crossed a multiple of `kimg`."""
        interval = max(1, round(kimg * 1000))
        seen = self.engine.images_seen
        return seen // interval != (seen - self._last.batch_size) // interval

    def _tick(self, diversity: bool) -> dict[str, float]:
        """Report the means since the last tick and return them, on every process."""
        self.engine.note_skipped()
        stats = self._gather_statistics()
        seen = self.engine.images_seen
        seconds, images = time.perf_counter() - self._tick_start, seen - self._tick_images
        self._seconds, self._images = self._seconds + seconds, self._images + images
        self.sec_per_kimg = self._seconds / self._images * 1000
        stats |= {
            "Progress/kimg": seen / 1000,
            "Progress/step": self._last.step + 1,
            **self._growth(),
            "Timing/sec_per_kimg": seconds / images * 1000,
            "Timing/saving_total_sec": self.keeper.held_s,
            "Resources/peak_memory_gib": peak_memory_gib(self.accelerator.device),
        }
        if diversity:
            with activity.during("measuring diversity", "unlimited"):
                stats |= on_main_process(self.accelerator, self._diversity.measure, self._last)
        alarms = self._alarms.look(stats)
        if divergence := divergence_in(stats, self.config.divergence_updates):
            alarms["divergence"] = divergence
        if self.log is not None:
            told = {f"Alarm/{name}": text for name, text in alarms.items()}
            self.log.stats(seen, stats | {"world_size": self.accelerator.num_processes} | told)
            self.tracker.log(stats, seen)
            for name, tensor in self.engine.record.histograms.items():
                self.tracker.log_histogram(name, tensor.float().cpu().numpy(), seen)
            headline = {label: stats.get(name) for label, name in self.recipe.headline.items()}
            line = tick_line(stats, headline)
            self.log.line(line)
            self.progress.tick(line, {label: value for label, value in headline.items() if value is not None})
            self._raise_alarms(alarms)
        return stats

    def _raise_alarms(self, alarms: Mapping[str, str]) -> None:
        for name, text in alarms.items():
            self.say(f"ALARM {name}: {text}")
            self.tracker.alert(name, text, self.engine.images_seen)

    def _note_history(self) -> None:
        """Have the next state say how the run fares."""
        self.snapshots.history = {**self._rollbacks.history, "alarms": self._alarms.state}

    def _gather_statistics(self) -> dict[str, float]:
        sums = self.engine.record.take_sums()
        with together("statistics"):
            totals = sum_(torch.stack(list(sums.values()))).cpu()
        return dict(zip(sums, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))

    def _on_main(self, save: Callable[[], None]) -> None:
        """Save on the main process; if that fails, all processes end together."""
        on_main_process(self.accelerator, save)

    def _growth(self) -> dict[str, float]:
        """Return what a log line says of growing; nothing where nothing grows."""
        if len(self.recipe.schedule.stages()) == 1:
            return {}
        return {"Progress/resolution": self._last.resolution, "Progress/alpha": self._last.alpha}

    def _closing(self, cause: str | None) -> str:
        seen = self.engine.images_seen
        if cause is None or (seen >= self.total_images and self._measured):
            return f"done: {seen / 1000:g} kimg in {self.out}"
        again = command_again(self.out)
        if seen == 0:
            return f"stopped at 0 kimg ({cause}), before the first step; to begin: {again}"
        left = "" if self._measured else ", but not measured"
        return f"stopped at {seen / 1000:g} kimg ({cause}), and saved{left}; to go on from there: {again}"

    def say(self, line: str, images_seen: int | None = None) -> None:
        """Write a line to log.txt and the terminal, on the main process; by default it is of the last tick."""
        if self.log is not None:
            self.log.line(line, images_seen)
            self.progress.say(line)


def last_image(schedule: Schedule, first_image: int, kimg: float) -> int:
    """Return where whole batches from `first_image` on first reach `kimg` thousand images."""
    wanted = max(1, math.ceil(round(kimg * 1000, 6)))  # 1.1 * 1000 is a little above 1100
    return end_of(schedule, first_image, wanted)


def _stop(message: str) -> None:
    raise UserError(message)


def _stop_for(failure: UserError | None) -> None:
    if failure is not None:
        raise failure
