"""The batches of a training: opened anew for each stage of growing, waited for, and given up for a request to stop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator

import torch
from accelerate import Accelerator

from stylepipe.config import Config, filled
from stylepipe.datasets.processes import available_cpus
from stylepipe.datasets.reader import Batch
from stylepipe.datasets.training_data import TrainingData, batches_of
from stylepipe.training import activity
from stylepipe.training.distributed import local_processes
from stylepipe.training.growth import Stage
from stylepipe.training.phase import Record

logger = logging.getLogger(__name__)

WAITING_TOLD_S = 10.0  # without data
MAX_WORKERS = 8  # decoding threads per GPU: more than one GPU's training asks for


class Feed:
    """Brings this process its share of every batch.

    Args:
        config: resolved settings.
        dataset: of the run's resolution.
        accelerator: device and processes.
        record: where the share of images that could not be read goes, with --on-bad skip.
        say: tells the user.
        stopping: tells whether this process is to stop, while data is late.
    """

    def __init__(
        self,
        config: Config,
        dataset: TrainingData,
        accelerator: Accelerator,
        record: Record,
        say: Callable[[str], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._config, self._dataset, self._accelerator = config, dataset, accelerator
        self._record, self._say, self._stopping = record, say, stopping
        self._batches = _nothing()
        self._opened: tuple[int, int] | None = None
        self._images_seen = 0
        self._waited = 0.0  # seconds for the latest batch that was late
        self._bad: set[str] = set()  # what has been told of images that cannot be read

    def serves(self, stage: Stage) -> bool:
        """Tell whether what is opened has the resolution and batch size of a stage."""
        return self._opened == (stage.resolution, stage.batch_size)

    def open(self, stage: Stage, images_seen: int) -> None:
        """Open the data for a stage, from an image on.

        Raises:
            UserError: it cannot be read.
        """
        config, accelerator = self._config, self._accelerator
        self._opened = (stage.resolution, stage.batch_size)
        self._batches.close()  # first the old one's threads end, and give their memory back
        self._batches = batches_of(
            self._dataset,
            stage.resolution,
            window_shards=filled(config.data_window),
            seed=config.seed,
            batch_size=stage.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            mirror=config.mirror,
            start=images_seen,
            skip_bad=config.on_bad == "skip",
            workers=self._workers(),
            device=accelerator.device,
            waiting=self._while_waiting,
        )

    def next(self, images_seen: int) -> Batch | None:
        """Return the batch that begins with an image; None where this process was asked to stop while it was late.

        Raises:
            UserError: the data cannot be read.
        """
        self._images_seen = images_seen
        try:
            with activity.during("reading data", "unlimited" if self._dataset.waits else "working"):
                batch = next(self._batches)
        except _StoppedWaitingError:
            return None
        if self._config.on_bad == "skip":
            self._note_bad(batch)
        return batch

    def close(self) -> None:
        """Let go of the data."""
        self._batches.close()

    def _note_bad(self, batch: Batch) -> None:
        share = len(batch.bad) / len(batch.images)
        self._record.stat("Data/replaced", torch.full((), share, device=self._accelerator.device))
        for text in sorted(set(batch.bad) - self._bad):
            self._say(f"another image stands in: {text}")
            if not self._accelerator.is_main_process:  # which alone is heard by `say`
                logger.warning("another image stands in: %s", text)
        self._bad.update(batch.bad)

    def _while_waiting(self, seconds: float) -> None:
        """Say so when the data is late, and leave off for a request to stop."""
        if seconds >= WAITING_TOLD_S > self._waited:
            self._say(f"waiting for data since {seconds:.0f} s, at {self._images_seen / 1000:g} kimg")
        self._waited = seconds
        if self._stopping():
            raise _StoppedWaitingError

    def _workers(self) -> int:
        """Return how many threads decode: on a CPU none, which they would take from the training."""
        if self._config.workers is not None:
            return self._config.workers
        if self._accelerator.device.type == "cpu":
            return int(self._dataset.waits)  # a server, not the data, is what one thread waits for then
        return max(1, min(MAX_WORKERS, available_cpus() // local_processes() - 1))


class _StoppedWaitingError(Exception):
    """A request to stop came while the training waited for data."""


def _nothing() -> Generator[Batch, None, None]:
    yield from ()
