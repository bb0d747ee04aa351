"""The metrics of a run: measured at their intervals, kept in metrics.jsonl, and the best network found by them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from stylepipe.config import Config
from stylepipe.datasets.streaming import StreamedDataset
from stylepipe.datasets.training_data import TrainingData
from stylepipe.errors import UserError
from stylepipe.files import atomic_path, cache_folder
from stylepipe.metrics.registry import WITHOUT_BEST, metrics_named, parse_names
from stylepipe.parsing import parse_json
from stylepipe.run_files import BEST_NETWORK, METRICS_FILE, images_seen_of, network_file, network_files
from stylepipe.training.distributed import on_main_process, together
from stylepipe.training.evaluation import Evaluation, Measurement, MeasuringStoppedError
from stylepipe.training.growth import Stage
from stylepipe.training.memory import is_out_of_memory
from stylepipe.training.phase import Recipe
from stylepipe.training.progress import append_measured
from stylepipe.training.tracker import Tracker

logger = logging.getLogger(__name__)

FALLBACK = "swd"  # needs nothing but the images


def evaluation_of(config: Config, dataset: TrainingData, accelerator: Accelerator) -> Evaluation | None:
    """Return what measures a run; None where nothing is measured.

    Metrics whose weights or libraries are not here are warned of, and SWD stands in.

    Raises:
        UserError: a name is unknown, or the data has too few or too small images for a metric.
    """
    asked = parse_names("--metrics", FALLBACK if config.metrics is None else config.metrics)
    if config.best_metric is not None and config.best_metric not in asked:
        what = f"expected one of {', '.join(asked)}" if asked else "nothing is"
        raise UserError(f"--best-metric {config.best_metric}: is not measured by --metrics; {what}")
    if config.best_metric in WITHOUT_BEST:
        raise UserError(f"--best-metric {config.best_metric}: neither its lowest nor its highest is best; give another")
    if isinstance(dataset, StreamedDataset):
        if config.metrics is not None and asked:
            raise UserError(f"--metrics {config.metrics}: a stream has no fixed images to compare with; prepare it")
        return None
    names, notices = available(asked, cache_folder(), accelerator)
    if accelerator.is_main_process:
        for notice in notices:
            logger.warning("%s", notice)
    metrics = metrics_named(names, cache_folder())
    evaluation = Evaluation(
        metrics, dataset, accelerator, cache_folder(), config.metrics_images, config.on_bad == "skip"
    )
    try:
        evaluation.check(config.res)
    except UserError as error:
        if config.metrics is not None:
            raise UserError(f"--metrics {config.metrics}: {error}") from error
        return None
    return evaluation if metrics else None


def available(names: Sequence[str], cache: Path, accelerator: Accelerator) -> tuple[list[str], list[str]]:
    """Return the metrics that all processes can measure, and a sentence for each that they cannot."""
    missing = {}
    for name in names:
        try:
            metrics_named([name], cache)
        except UserError as error:
            missing[name] = str(error)
    if accelerator.num_processes > 1:
        with together("what all processes can measure"):
            everywhere = gather_object([missing])
        for other in everywhere:
            missing = {**other, **missing}
    found = [name for name in names if name not in missing]
    if missing and FALLBACK not in found:
        found.append(FALLBACK)
    notices = [f"--metrics {name}: {why}; this run measures {', '.join(found)}" for name, why in missing.items()]
    return found, notices


class RunMetrics:
    """Measures the averaged network of a run and keeps what came out.

    Args:
        config: resolved settings.
        recipe: what is trained.
        evaluation: what measures it, or None.
        accelerator: device and processes.
        out: folder of the run.
        tracker: where numbers go as well.
        say: tells the user.

    Attributes:
        best_metric: by which a network is the best; None where nothing can tell.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        evaluation: Evaluation | None,
        accelerator: Accelerator,
        out: Path,
        tracker: Tracker,
        say: Callable[[str], None],
    ) -> None:
        self._recipe, self._evaluation, self._accelerator = recipe, evaluation, accelerator
        self._out, self._tracker, self._say = out, tracker, say
        self._keep, self._artifacts = config.keep, config.tracker_artifacts
        self._names = [] if evaluation is None else [metric.name for metric in evaluation.metrics]
        self.best_metric = best_metric_of(config, evaluation)

    def measures(self, stage: Stage) -> bool:
        """Tell whether there is anything to measure at a stage."""
        return self._evaluation is not None and bool(self._evaluation.metrics_at(stage.resolution))

    def misses(self, stage: Stage, images_seen: int) -> bool:
        """Tell, on every process, whether a network that this run has saved at a stage is still to be measured."""
        assert self._evaluation is not None
        names = {metric.name for metric in self._evaluation.metrics_at(stage.resolution)}
        return on_main_process(self._accelerator, self._misses, network_file(images_seen), names)

    def measure(self, stage: Stage, images_seen: int, stopping: Callable[[], bool]) -> bool:
        """Measure the network of now, whose file has been saved; every process takes part.

        Args:
            stage: of its last step.
            images_seen: by then.
            stopping: is asked now and then whether to leave it for when the run goes on.

        Returns:
            whether it was measured; not where that was broken off to stop.
        """
        assert self._evaluation is not None
        if self._accelerator.device.type == "cuda":
            torch.cuda.empty_cache()  # what training has reserved is of other sizes
        try:
            with together("measuring", "unlimited"):
                found = self._evaluation.measure(self._recipe.generated(stage), stopping)
        except MeasuringStoppedError:
            return False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"--metrics {','.join(self._names)}: out of memory while measuring; the training is saved: start the "
                f"same command with --out {self._out} and fewer --metrics-images, or a lower --batch-gpu"
            ) from error
        on_main_process(self._accelerator, self._note, found, images_seen)
        return True

    def follow_best(self) -> None:
        """Have network-best.safetensors be the best network of those that are there, or nothing."""
        best, path = self._best(), self._out / BEST_NETWORK
        if best is None:
            path.unlink(missing_ok=True)
            return
        file = self._out / best["network"]
        if path.exists() and path.samefile(file):
            return
        with atomic_path(path) as temporary:
            try:
                os.link(file, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(file, temporary)

    def thin_networks(self, images_seen: int) -> None:
        """Delete network files beyond `--keep`: never the best or that of now, and of the others the closest ones.

        Later ones, of a run that goes on from an older state, are no part of it.
        """
        if self._keep == 0:
            return
        best = self._best()
        kept = {best["network"]} if best is not None else set()
        files = [path for path in network_files(self._out) if images_seen_of(path) <= images_seen]
        for path in surplus(files, self._keep, kept):
            path.unlink(missing_ok=True)

    def _misses(self, file: str, names: set[str]) -> bool:
        measured = {line["metric"] for line in measured_lines(self._out) if line["network"] == file}
        return (self._out / file).exists() and not names <= measured

    def _best(self) -> Mapping[str, Any] | None:
        lines = [line for line in measured_lines(self._out) if (self._out / line["network"]).exists()]
        return best_line(lines, self.best_metric)

    def _note(self, found: Sequence[Measurement], images_seen: int) -> None:
        file = network_file(images_seen)
        scalars = {"Timing/measuring_sec": found[0].seconds}
        for measurement in found:
            scalars |= {f"Metrics/{name}": value for name, value in measurement.results.items()}
            self._say(f"measured: {measurement} ({measurement.settings['images']:,} images)")
        try:
            append_measured(self._out / METRICS_FILE, [m.line(images_seen, file) for m in found])
            self.follow_best()
        except OSError as error:
            self._say(f"ALARM metrics: cannot write to {self._out}: {error}; what was measured is not kept there")
        self._tracker.log(scalars, images_seen)
        best = self._best()
        if best is None:
            return
        name, value = next(iter(best["results"].items()))
        summary = {
            f"best/{name}": value,
            f"best/{name}_kimg": best["images_seen"] / 1000,
            f"best/{name}_network": best["network"],
        }
        self._tracker.summarize(summary, images_seen)
        if best["images_seen"] == images_seen:
            self._say(f"best {name} so far: {value:.4g}, now {BEST_NETWORK}")
            if self._artifacts:
                self._tracker.log_artifact(self._out / file, ["latest", "best"])


def measured_lines(out: Path) -> Iterator[dict[str, Any]]:
    """Yield what metrics.jsonl of a run says, line by line; half a line of a killed process is passed over."""
    try:
        text = (out / METRICS_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for text_of_line in text.splitlines():
        try:
            line = parse_json(text_of_line)
        except ValueError:
            continue
        if _is_measured(line):
            yield line


def _is_measured(line: Any) -> bool:
    """Tell whether this is what `Measurement.line` returns."""
    if not isinstance(line, dict):
        return False
    of_types = {"metric": str, "network": str, "results": dict, "settings": dict, "images_seen": int | None}
    if not all(key in line and isinstance(line[key], of) for key, of in of_types.items()):
        return False
    numbers = list(line["results"].values())
    return "best" in line and bool(numbers) and all(isinstance(n, int | float | None) for n in numbers)


def best_metric_of(config: Config, evaluation: Evaluation | None) -> str | None:
    """Return by which of the metrics that are measured a network is the best."""
    names = [] if evaluation is None else [metric.name for metric in evaluation.metrics if metric.best is not None]
    return config.best_metric if config.best_metric in names else next(iter(names), None)


def best_line(lines: Sequence[Mapping[str, Any]], metric: str | None) -> Mapping[str, Any] | None:
    """Return the best line of a metric among those of the run's own networks; the first of equal ones.

    Only those with the settings of the newest can be compared, and none that is not finite.
    """
    own = [
        line
        for line in lines
        if line["metric"] == metric
        and line["images_seen"] is not None
        and line["network"] == network_file(line["images_seen"])
        and next(iter(line["results"].values())) is not None
    ]
    if not own:
        return None
    settings = max(own, key=lambda line: line["images_seen"])["settings"]
    sign = 1 if own[-1]["best"] == "lowest" else -1
    alike = [line for line in own if line["settings"] == settings]
    return min(alike, key=lambda line: sign * next(iter(line["results"].values())))


def surplus(files: Sequence[Path], keep: int, kept: set[str]) -> list[Path]:
    """Return which of a run's network files to delete so that `keep` are left, evenly spread over the training.

    Args:
        files: by their moments, ascending.
        keep: how many are to be left, the first and the last among them.
        kept: names of others that stay.
    """
    left = list(files)
    while len(left) > keep:
        times = [images_seen_of(path) for path in left]
        gaps = {
            path: after - before
            for path, before, after in zip(left[1:-1], times, times[2:], strict=False)
            if path.name not in kept
        }
        if not gaps:
            break
        left.remove(min(gaps, key=lambda path: gaps[path]))
    return [path for path in files if path not in left]
