"""`stylepipe bench scaling`: what averaging gradients costs: predicted for many GPUs, measured among processes here."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from stylepipe.config import Config, ReduceType, filled
from stylepipe.datasets.processes import available_cpus
from stylepipe.errors import UserError
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe
from stylepipe.training.allocator import keep_freed_memory
from stylepipe.training.averaging import SENT_AS, Exchange, Handle, start_sum
from stylepipe.training.distributed import leave
from stylepipe.training.engine import Engine
from stylepipe.training.estimate import FlopCounter
from stylepipe.training.timing import amortised, random_batch, time_phases

NODE = 8
"""GPUs in one machine."""

PROCESSES = (1, 2, 4)
"""That are measured."""

# StyleGAN2, configuration F at 1024 px, on eight A100s: published with a later version of its code.
_PUBLISHED = Config(res=1024, preset="stylegan2")
_PUBLISHED_S_PER_KIMG = 14.57

_ACHIEVED = 0.8  # share of its nominal rate that large sums get out of a link


@dataclass(frozen=True)
class Scaling:
    """Predict what averaging gradients costs on 8, 64 and 512 GPUs, from what each phase sends; or measure it here.

    Counts the bytes that a step hands over to be added up; nothing is trained. Prints them by phase, then seconds per
    step with sums after and during the backward pass, computing taken from --sec-per-step. Every GPU works on as many
    images as one of 8 would, so that the batch grows with the GPUs. See docs/scaling.md for the model.
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=partial(Config, res=1024))
    """Settings of the training, on 8 GPUs."""
    sec_per_step: float | None = None
    """Seconds that a GPU computes for a step. Default: by the published 14.57 s/kimg of StyleGAN2 at 1024 px on eight
    A100s; other trainings have none."""
    measure: bool = False
    """Instead time training by 1, 2 and 4 processes on this machine's CPU, which share a batch."""
    repeats: int = 5
    """Measurements of each phase; the median is printed."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Link:
    """What connects GPUs, or machines.

    Attributes:
        bytes_per_s: nominal and in one direction, of a GPU within a machine, or of a machine.
        latency_s: of one hop.
    """

    bytes_per_s: float
    latency_s: float


NVLINK = Link(450e9, 2e-6)  # of the fourth generation
BETWEEN = {"InfiniBand": Link(NODE * 50e9, 5e-6), "Ethernet": Link(12.5e9, 30e-6)}
"""Between machines: 400 Gbit/s for each GPU; 100 Gbit/s for each machine."""

CLUSTERS: Sequence[tuple[int, str]] = [(8, "NVLink"), *((n, name) for name in BETWEEN for n in (64, 512))]
"""How many GPUs, and what the slowest link is called."""


@dataclass(frozen=True)
class Sum:
    """Something that is added up over the GPUs.

    Attributes:
        size: bytes.
        done: share of the phase's arithmetic that is done when it can begin.
    """

    size: int
    done: float


@dataclass(frozen=True)
class PhaseSums:
    """What one run of a phase adds up over the GPUs, in order, and its arithmetic on one GPU."""

    name: str
    interval: int
    flops: float
    sums: list[Sum]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(each.size for each in self.sums)

    @property
    def left(self) -> float:
        """Share of the arithmetic that is still to come when the average byte can be sent."""
        return sum(each.size * (1 - each.done) for each in self.sums) / self.size


def bench_scaling(options: Scaling) -> dict[str, Any]:
    """Predict or measure, print the tables, and return the figures that the JSON file holds.

    Raises:
        UserError: an option that nothing can be predicted or measured with.
    """
    if options.config.batch_gpu == "auto":
        raise UserError("--batch-gpu auto: expected a number; a benchmark must be repeatable")
    return _measured(options) if options.measure else _predicted(options)


def count_sums(config: Config) -> list[PhaseSums]:
    """Run each phase twice on the meta device, as one of 8 processes, and return what the second run sends.

    It is sent while the backward pass runs, as on GPUs.
    """
    counter = FlopCounter()
    began: list[tuple[int, float]] = []

    def start(tensor: Tensor) -> Handle:
        began.append((tensor.nbytes, counter.flops))
        return _Done()

    recipe = GANRecipe(config, torch.device("meta"), world_size=NODE)
    exchange = Exchange(config.reduce_dtype, overlap=True, start=start)
    engine = Engine(recipe, optim=config.optim, ema=config.ema, world_size=NODE, exchange=exchange)
    stage = recipe.schedule.final()
    batch = random_batch(engine, stage, c_dim=0)
    phases = []
    for phase in recipe.phases:
        engine.gradients(phase, stage, *batch)  # shows what is complete when
        began.clear()
        counter.flops = 0.0
        with counter:
            engine.gradients(phase, stage, *batch)
        sums = [Sum(size, flops / counter.flops) for size, flops in began]
        phases.append(PhaseSums(phase.name, phase.interval, counter.flops, sums))
    return phases


def seconds_of(size: int, gpus: int, slowest: str) -> float:
    """Return how long a sum takes as a ring through all GPUs, machine by machine (see docs/scaling.md)."""
    machines, rate = gpus // NODE, NVLINK.bytes_per_s
    latency = 2 * (min(gpus, NODE) - 1) * NVLINK.latency_s
    if slowest in BETWEEN:
        rate = min(rate, BETWEEN[slowest].bytes_per_s)
        latency += 2 * (machines - 1) * BETWEEN[slowest].latency_s
    return 2 * (gpus - 1) / gpus * size / (_ACHIEVED * rate) + latency


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step: of its sums alone, and in all with sums after and during the backward pass."""

    alone: float
    after: float
    during: float


def predict(phases: Sequence[PhaseSums], gpus: int, slowest: str, sec_per_step: float) -> Prediction:
    """Return a step's time, lazy phases at their share; phases compute in proportion to their arithmetic."""
    flops = sum(phase.flops / phase.interval for phase in phases)
    alone = late = 0.0
    for phase in phases:
        computing = sec_per_step * phase.flops / flops
        took = [seconds_of(each.size, gpus, slowest) for each in phase.sums]
        end = 0.0  # of the sum before; one after the other
        for each, seconds in zip(phase.sums, took, strict=True):
            end = max(end, each.done * computing) + seconds
        alone += sum(took) / phase.interval
        late += max(0.0, end - computing) / phase.interval
    return Prediction(alone, sec_per_step + alone, sec_per_step + late)


def _predicted(options: Scaling) -> dict[str, Any]:
    config = _on_gpus(options.config)
    sec_per_step, source = _sec_per_step(options.sec_per_step, config)
    images = filled(config.batch_size) // NODE
    print(
        f"{config.preset} at {config.res} px, {images} images a GPU, computing {sec_per_step:.3f} s a step ({source})"
    )
    phases = {sent_as: count_sums(replace(config, reduce_dtype=sent_as)) for sent_as in SENT_AS}
    _print_sums(phases)
    print(f"\n{'':<32} seconds of a step, sums")
    print(f"GPUs {'slowest link':<13} {'type':<5} {'alone':>8} {'after':>8} {'during':>8} {'s/kimg':>8} efficiency")
    rows = []
    for (gpus, slowest), sent_as in product(CLUSTERS, SENT_AS):
        found = predict(phases[sent_as], gpus, slowest, sec_per_step)
        s_per_kimg, efficiency = found.during / (images * gpus) * 1000, sec_per_step / found.during
        print(
            f"{gpus:>4} {slowest:<13} {sent_as:<5} {found.alone:8.4f} {found.after:8.4f} {found.during:8.4f} "
            f"{s_per_kimg:8.3f} {efficiency:10.1%}"
        )
        figures = {"s_per_step": asdict(found), "s_per_kimg": s_per_kimg, "efficiency": efficiency}
        rows.append({"gpus": gpus, "slowest_link": slowest, "reduce_dtype": sent_as} | figures)
    counted = {sent_as: [asdict(phase) for phase in each] for sent_as, each in phases.items()}
    setting = {"res": config.res, "images_per_gpu": images, "sec_per_step": sec_per_step}
    return setting | {"phases": counted, "predicted": rows}


def _print_sums(phases: Mapping[ReduceType, Sequence[PhaseSums]]) -> None:
    heading = "".join(f" {sent_as + ' MB':>9}" for sent_as in phases)
    print(f"\n{'':<14} every sums{heading} left to compute")
    for each in zip(*phases.values(), strict=True):
        sizes = "".join(f" {phase.size / 1e6:9.1f}" for phase in each)
        print(f"{each[0].name:<14} {each[0].interval:>5} {len(each[0].sums):>4}{sizes} {each[0].left:15.1%}")
    means = "".join(f" {sum(p.size / p.interval for p in each) / 1e6:9.1f}" for each in phases.values())
    print(f"{'a step':<25}{means}")


def _on_gpus(config: Config) -> Config:
    """Return the settings of a training on 8 GPUs; --batch-gpu alone means as many images a step on each."""
    if config.batch_size is None and config.batch_gpu is not None:
        config = replace(config, batch_size=NODE * int(config.batch_gpu))
    return _resolved(config, NODE, "bf16")


def _resolved(config: Config, processes: int, precision: str) -> Config:
    config = resolve(config, processes)
    return with_precision(config, precision if config.precision == "auto" else config.precision)


def _sec_per_step(given: float | None, config: Config) -> tuple[float, str]:
    """Return how long a GPU computes for a step, and who says so."""
    if given is not None:
        if not 0 < given < float("inf"):
            raise UserError(f"--sec-per-step {given:g}: expected seconds, above 0")
        return given, "as given"
    published = _on_gpus(_PUBLISHED)
    if (config.preset, config.res, config.network) != (published.preset, published.res, published.network):
        raise UserError(
            "--sec-per-step: nothing is published of this training; give the seconds that one of your GPUs takes for a "
            "step, as `stylepipe bench step` measures them"
        )
    seconds = filled(config.batch_size) / 1000 * _PUBLISHED_S_PER_KIMG
    return seconds, f"by the published {_PUBLISHED_S_PER_KIMG} s/kimg of eight A100s"


class _Done:
    def wait(self) -> None: ...


def _measured(options: Scaling) -> dict[str, Any]:
    """Train as 1, 2 and 4 processes, one after the other."""
    configs = [_resolved(options.config, count, "fp32") for count in PROCESSES]
    batch_size = filled(configs[0].batch_size)
    print(f"{configs[0].preset} at {configs[0].res} px, batch {batch_size}, {available_cpus()} cores")
    print(f"processes images threads {'s/kimg':>9} {'speed':>6} {'s/step':>9} {'sums s':>9} {'share':>6}")
    rows: list[dict[str, Any]] = []
    for count, config in zip(tqdm(PROCESSES, unit="run", disable=not sys.stderr.isatty()), configs, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            spawn(_train, (config, count, options.repeats, folder), nprocs=count)
            row = json.loads((Path(folder) / "figures").read_text())
        rows.append(row)
        tqdm.write(
            f"{count:>9} {batch_size // count:>6} {row['threads']:>7} {row['s_per_step'] / batch_size * 1000:9.2f} "
            f"{rows[0]['s_per_step'] / row['s_per_step']:6.2f} {row['s_per_step']:9.4f} {row['sums_s']:9.4f} "
            f"{row['sums_s'] / row['s_per_step']:6.1%}"
        )
    setting = {"res": configs[0].res, "batch_size": batch_size, "repeats": options.repeats, "cores": available_cpus()}
    return setting | {"measured": rows}


def _train(rank: int, config: Config, processes: int, repeats: int, folder: str) -> None:
    """Time the phases, then their sums alone; the first process leaves the figures in `folder`."""
    keep_freed_memory()
    torch.set_num_threads(max(1, available_cpus() // processes))
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    sent: list[Tensor] = []

    def start(tensor: Tensor) -> Handle:
        sent.append(tensor)
        return start_sum(tensor)

    recipe = GANRecipe(config, torch.device("cpu"), world_size=processes)
    exchange = Exchange(config.reduce_dtype, start=start)
    engine = Engine(recipe, optim=config.optim, ema=config.ema, rank=rank, world_size=processes, exchange=exchange)
    batch = random_batch(engine, recipe.schedule.final(), c_dim=0)
    seconds = time_phases(engine, *batch, repeats)
    sums: dict[str, float] = {}
    for phase in recipe.phases:
        sent.clear()
        engine.gradients(phase, recipe.schedule.final(), *batch)
        sums[phase.name] = statistics.median(_time_sums(sent) for _ in range(repeats)) if sent else 0.0
    if rank == 0:
        figures: Mapping[str, Any] = {
            "processes": processes,
            "threads": torch.get_num_threads(),
            "s_per_step": amortised(engine, seconds),
            "sums_s": amortised(engine, sums),
            "phase_seconds": seconds,
        }
        (Path(folder) / "figures").write_text(json.dumps(figures))
    leave()


def _time_sums(tensors: Sequence[Tensor]) -> float:
    """Return the seconds of adding up tensors of which every process has its own, when nothing else is to do."""
    dist.barrier()
    begin = time.perf_counter()
    for handle in [start_sum(tensor) for tensor in tensors]:
        handle.wait()
    return time.perf_counter() - begin
