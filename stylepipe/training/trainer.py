"""The training loop: batches in, steps, and at their intervals log lines, grids, states and network files."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from stylepipe.config import Config, filled
from stylepipe.datasets.order import ORDER_VERSION
from stylepipe.datasets.processes import available_cpus
from stylepipe.datasets.reader import Batch
from stylepipe.datasets.training_data import TrainingData, batches_of
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
from stylepipe.training.distributed import local_processes, on_every_process, on_main_process, sum_, together
from stylepipe.training.engine import Engine
from stylepipe.training.evaluation import Evaluation
from stylepipe.training.growth import Schedule, Stage, end_of
from stylepipe.training.interrupt import Interrupt
from stylepipe.training.keeper import Keeper
from stylepipe.training.launched import command_again, launcher_process
from stylepipe.training.measuring import RunMetrics
from stylepipe.training.memory import is_out_of_memory, peak_memory_gib
from stylepipe.training.phase import Recipe
from stylepipe.training.power_ema import remove_later_averages
from stylepipe.training.progress import Progress, RunLog
from stylepipe.training.settings import changes_since, check_growth, config_mapping, penalties_changed
from stylepipe.training.snapshots import Snapshots
from stylepipe.training.tracker import FINISH_TIMEOUT_S, STOP_TIMEOUT_S, Tracker
from stylepipe.training.watch import DiversityWatch
from stylepipe.version import code_version

logger = logging.getLogger(__name__)

PROJECT = "stylepipe"
ROLLBACK_FACTOR = 2.0  # of penalties, each time
MAX_ROLLBACKS = 4
WAITING_TOLD_S = 10.0  # without data
MAX_WORKERS = 8  # decoding threads per GPU: more than one GPU's training asks for


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
        resumed, run_id = None, None
        origin = dict(origin or {})
        if state is not None:
            check_fits(state, self.engine.layout())
            check_growth(state, config)
            if self.is_main:
                self.engine.load_state(state.tensors, state.images_seen)
            self.engine.share_state()
            resumed = state.images_seen
            origin = state.info.get("origin", {})
            if state.path.resolve().parent == out.resolve():  # a branch of a run is a run of its own
                run_id = state.info.get("tracker_run_id")
            if state.info.get("order_version") != ORDER_VERSION:
                logger.warning(
                    "%s was saved with another order of images; from here on the new order holds", state.path
                )
        history = {} if state is None or penalties_changed(state, config) else state.info
        self.rollbacks: int = history.get("rollbacks", 0)
        self._rollbacks_in_a_row: int = history.get("rollbacks_in_a_row", 0)
        self._penalties = recipe.regularize(ROLLBACK_FACTOR**self.rollbacks)
        self._alarms = Alarms({} if state is None else state.info.get("alarms"))
        self._diversity = DiversityWatch(recipe, dataset, config.on_bad == "skip")
        self.first_image = self.engine.images_seen
        self.total_images = last_image(recipe.schedule, self.first_image, filled(config.kimg))
        self._last = self._stage_before()
        self._opened: tuple[int, int] | None = None  # what the data was opened for
        self.sec_per_kimg: float | None = None
        self._seconds, self._images = 0.0, 0
        self._saved_at = self.first_image  # up to here there is nothing that is not saved, or is on its way
        self._stats: dict[str, float] = {}  # of the last tick
        self._data = _nothing()
        self._asked_to_stop = False
        self._lacks_network = False
        self._waited = 0.0  # seconds for the latest batch that was late
        self._bad: set[str] = set()  # what has been told of images that cannot be read
        self._changes = [] if state is None else changes_since(state, config, dataset)
        if self.is_main:
            clear_remains(out)
            clear_half_files(out)
            own = state is not None and state.path.resolve().parent == out.resolve()
            if state is not None and own:
                set_aside_damaged(state.passed_over)
                network = out / network_file(state.images_seen)
                self._lacks_network = not (state.info.get("interim", False) or network.exists())
            remove_later_averages(out, self.engine.images_seen if own else 0)
        self.log = RunLog(out, resumed) if self.is_main else None
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

    def run(self) -> Interrupt:
        """Train to the end, or until asked to stop; return what asked, if anything did.

        The last state and network are always written.
        """
        self.say(self._opening())
        for line in self._changes:
            self.say(line)
        if self.rollbacks:
            self.say(f"rolled back {self.rollbacks} times so far: {self._penalties}")
        with Interrupt(launcher_process(), self.config.max_hours) as interrupt:
            self._interrupt = interrupt
            if self.engine.images_seen == 0:
                self._on_main(self.snapshots.real_grid)
                self.keeper.show(self.snapshots.grid, self._last)
            if self.config.on_divergence == "rollback":
                self._on_main(self._see_to_a_healthy_state)
            self.keeper.averages(self._last)  # a full disk, or another folder, may lack them
            if self._lacks_network:
                self.keeper.begin(self._last, interim=False)
            self._make_up_for_measuring()
            on_every_process(self.accelerator, self._open_data)
            self._tick_start, self._tick_images = time.perf_counter(), self.engine.images_seen
            failure = None
            while not self.finished:
                stage = self.stage
                if _data_of(stage) != self._opened:
                    self.say(self._stage_line())
                    failure = failure or _failure(self._open_data)
                batch, late = self._next_batch() if failure is None else (None, failure)
                if interrupt.agreed(failed=batch is None):
                    failure = late
                    break
                assert batch is not None
                self._step(batch)
                self._last = stage
                self.progress.update(self.engine.images_seen)
                self._keep_up()
            self._save_the_end()
            self._asked_to_stop = interrupt.asked
            on_every_process(self.accelerator, _stop_for, failure)
        self.say(self._closing(interrupt))
        return interrupt

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
        self._data.close()
        self.snapshots.close()
        self.progress.close()
        self.tracker.finish(STOP_TIMEOUT_S if self._asked_to_stop else FINISH_TIMEOUT_S)
        if self.log is not None:
            self.log.close()

    def _open_data(self) -> None:
        """Open the data where the training stands, at the resolution and batch size of its stage."""
        stage = self.stage
        self._opened = _data_of(stage)
        self._data.close()  # first the old one's threads end, and give their memory back
        self._data = batches_of(
            self.dataset,
            stage.resolution,
            window_shards=filled(self.config.data_window),
            seed=self.config.seed,
            batch_size=stage.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            mirror=self.config.mirror,
            start=self.engine.images_seen,
            skip_bad=self.config.on_bad == "skip",
            workers=self._workers(),
            device=self.accelerator.device,
            waiting=self._while_waiting,
        )

    def _next_batch(self) -> tuple[Batch | None, UserError | None]:
        """Return the next batch; none where the data cannot be read, with the reason, or on a request to stop."""
        try:
            with activity.during("reading data", "unlimited" if self.dataset.waits else "working"):
                batch = next(self._data)
        except _StoppedWaitingError:
            return None, None
        except UserError as error:
            return None, error
        if self.config.on_bad == "skip":
            self.engine.record.stat(
                "Data/replaced", torch.full((), len(batch.bad) / len(batch.images), device=self.accelerator.device)
            )
            for text in sorted(set(batch.bad) - self._bad):
                self.say(f"another image stands in: {text}")
                if not self.is_main:
                    logger.warning("another image stands in: %s", text)
            self._bad.update(batch.bad)
        return batch, None

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

    def _while_waiting(self, seconds: float) -> None:
        """Say so when the data is late, and leave off for a request to stop."""
        if seconds >= WAITING_TOLD_S > self._waited:
            self.say(f"waiting for data since {seconds:.0f} s, at {self.engine.images_seen / 1000:g} kimg")
        self._waited = seconds
        if self._interrupt.asked:
            raise _StoppedWaitingError

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
            self.keeper.see_to_folder()
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
                self.metrics.measure(self._last, self.engine.images_seen, lambda: self._interrupt.asked)
            self._tick_start, self._tick_images = time.perf_counter(), self.engine.images_seen
        if self._due(filled(self.config.ema.posthoc_kimg)):
            self.keeper.averages(self._last)

    def _save(self, *, interim: bool) -> None:
        """Begin to save state and, but for an interim one, network."""
        if not divergence_in(self._stats, 1):
            self._rollbacks_in_a_row = 0
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
            self.metrics.measure(self._last, seen, lambda: self._interrupt.asked)

    def _recover(self, divergence: str) -> None:
        """Roll back to the last healthy state, or stop; either way a state is kept of what happened.

        Raises:
            UserError: the training stops here.
        """
        self.keeper.settle(wait=True)
        kept, healthy = on_main_process(self.accelerator, self.snapshots.set_aside)
        self._on_main(self.metrics.follow_best)
        happened = f"training has diverged at {self.engine.images_seen / 1000:g} kimg: {divergence}"
        given_up = self._rollbacks_in_a_row == MAX_ROLLBACKS
        if self.config.on_divergence == "stop" or healthy is None or given_up:
            self._on_main(partial(_stop, f"{happened}; {self._way_out(healthy, given_up)}; {kept}"))
        assert healthy is not None
        alarms = on_main_process(self.accelerator, self._go_back_to, healthy)
        self.engine.share_state()
        self.rollbacks += 1
        self._rollbacks_in_a_row += 1
        self._penalties = self.recipe.regularize(ROLLBACK_FACTOR**self.rollbacks)
        self._alarms = Alarms(alarms)
        self._note_history()
        self._last, self._saved_at = self._stage_before(), self.engine.images_seen
        self._on_main(partial(self.snapshots.amend, healthy))  # before it is told: a resumed run goes on the same way
        told = f"{happened}; rolled back to {healthy}, with {self._penalties} from there on; {kept}"
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

    def _way_out(self, healthy: Path | None, given_up: bool) -> str:
        """Return what to do about a divergence that stops the training."""
        again = f"start the same command with --out {self.out}"
        if healthy is None:
            way = "no healthy state was saved before; start anew in another --out"
        elif given_up:
            way = f"it was rolled back {MAX_ROLLBACKS} times in a row, up to {self._penalties}; {again}"
        else:
            way = f"{again} to go on from {healthy.name}"
        remedies = ["a lower --optim.g-lr and --optim.d-lr", "stronger regularization"]
        if self.config.on_divergence == "stop":
            remedies.append("--on-divergence rollback")
        return f"{way}, with {', or '.join(remedies)}"

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
        self.snapshots.history = {
            "rollbacks": self.rollbacks,
            "rollbacks_in_a_row": self._rollbacks_in_a_row,
            "alarms": self._alarms.state,
        }

    def _gather_statistics(self) -> dict[str, float]:
        sums = self.engine.record.take_sums()
        with together("statistics"):
            totals = sum_(torch.stack(list(sums.values()))).cpu()
        return dict(zip(sums, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))

    def _on_main(self, save: Callable[[], None]) -> None:
        """Save on the main process; if that fails, all processes end together."""
        on_main_process(self.accelerator, save)

    def _workers(self) -> int:
        """Return how many threads decode: on a CPU none, which they would take from the training."""
        if self.config.workers is not None:
            return self.config.workers
        if self.accelerator.device.type == "cpu":
            return int(self.dataset.waits)  # a server, not the data, is what one thread waits for then
        return max(1, min(MAX_WORKERS, available_cpus() // local_processes() - 1))

    def _opening(self) -> str:
        config, seen = self.config, self.engine.images_seen
        count = self.accelerator.num_processes
        processes = "1 process" if count == 1 else f"{count} processes"
        sizes = [
            f"{name} {sum(p.numel() for p in network.parameters()) / 1e6:.2f}M parameters"
            for name, network in self.recipe.networks.items()
        ]
        return (
            f"{config.preset} at {config.res} px on {self.dataset.name} ({self.dataset.summary}), "
            f"{processes} on {self.accelerator.device.type}, "
            f"batch {self.stage.batch_size} ({self.stage.batch_gpu} at a time per device), {config.precision}; "
            f"{', '.join(sizes)}; {self._plan()}"
            f"{'from' if seen == 0 else 'going on from'} {seen / 1000:g} to {self.total_images / 1000:g} kimg"
        )

    def _growth(self) -> dict[str, float]:
        """Return what a log line says of growing; nothing where nothing grows."""
        if len(self.recipe.schedule.stages()) == 1:
            return {}
        return {"Progress/resolution": self._last.resolution, "Progress/alpha": self._last.alpha}

    def _plan(self) -> str:
        """Say where growing begins and how far it comes; nothing where nothing grows."""
        if len(self.recipe.schedule.stages()) == 1:
            return ""
        last, full = self.recipe.schedule.at(max(self.first_image, self.total_images - 1)), self.config.res
        short = ""
        if (last.resolution, last.fading) != (full, False):
            whole = next(s for s in self.recipe.schedule.stages() if (s.resolution, s.fading) == (full, False))
            short = (
                f" (the full {full} px are there from {whole.images_seen / 1000:g} kimg on; --growth.stable-kimg and "
                f"--growth.fade-kimg make it sooner)"
            )
        return f"growing from {self.stage.resolution} to {last.resolution} px{short}; "

    def _stage_line(self) -> str:
        stage = self.stage
        return f"now at {stage.resolution} px, batch {stage.batch_size} ({stage.batch_gpu} at a time per device)"

    def _closing(self, interrupt: Interrupt) -> str:
        seen = self.engine.images_seen
        if interrupt.cause is not None and seen < self.total_images:
            return (
                f"stopped at {seen / 1000:g} kimg ({interrupt.cause}), and saved; to go on from there: "
                f"{command_again(self.out)}"
            )
        return f"done: {seen / 1000:g} kimg in {self.out}"

    def say(self, line: str, images_seen: int | None = None) -> None:
        """Write a line to log.txt and the terminal, on the main process; by default it is of the last tick."""
        if self.log is not None:
            self.log.line(line, images_seen)
            self.progress.say(line)


def last_image(schedule: Schedule, first_image: int, kimg: float) -> int:
    """Return where whole batches from `first_image` on first reach `kimg` thousand images."""
    wanted = max(1, math.ceil(round(kimg * 1000, 6)))  # 1.1 * 1000 is a little above 1100
    return end_of(schedule, first_image, wanted)


class _StoppedWaitingError(Exception):
    """A request to stop came while the training waited for data."""


def _nothing() -> Generator[Batch, None, None]:
    yield from ()


def _stop(message: str) -> None:
    raise UserError(message)


def _stop_for(failure: UserError | None) -> None:
    if failure is not None:
        raise failure


def _failure(open_data: Callable[[], None]) -> UserError | None:
    try:
        open_data()
    except UserError as error:
        return error
    return None


def _data_of(stage: Stage) -> tuple[int, int]:
    """Return what of a stage the data is opened for."""
    return stage.resolution, stage.batch_size


def tick_line(stats: Mapping[str, float], headline: Mapping[str, float | None]) -> str:
    """Return the line of the log for one tick; a dash stands for what no step since the last one has measured."""
    parts = [f"kimg {stats['Progress/kimg']:<9.3f}", f"s/kimg {stats['Timing/sec_per_kimg']:<8.2f}"]
    parts += [f"{label} {'-' if value is None else format(value, '.4f'):<8}" for label, value in headline.items()]
    return "  ".join(parts) + f"  mem {stats['Resources/peak_memory_gib']:.2f} GiB"
