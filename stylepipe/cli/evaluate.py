"""`stylepipe evaluate`: how good the images of trained networks are, in numbers."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator

from stylepipe.cli.joined import joined
from stylepipe.config import MAX_SEED, Config
from stylepipe.datasets.cache import dataset_for_training
from stylepipe.datasets.shards import ShardDataset, file_sha256, is_prepared, open_dataset
from stylepipe.datasets.streaming import is_stream
from stylepipe.errors import UserError
from stylepipe.files import cache_folder
from stylepipe.interop.network_file import NetworkHeader, license_notice, load_network, read_header, same_labels
from stylepipe.metrics.registry import METRICS, metrics_named, parse_names
from stylepipe.metrics.weights import WEIGHTS_VARIABLE
from stylepipe.recipes.conditioning import Labels
from stylepipe.recipes.generated import MEASURED_SEED, GeneratedImages
from stylepipe.run_files import METRICS_FILE
from stylepipe.training.distributed import on_every_process, on_main_process
from stylepipe.training.draws import Draws
from stylepipe.training.evaluation import Evaluation, Measurement
from stylepipe.training.progress import append_measured
from stylepipe.training.watchdog import Watchdog

DESCRIPTION = """Measure the images of trained networks against photographs. Several processes share the work:

  accelerate launch launch/evaluate.py NETWORK --data PHOTOGRAPHS --metrics swd,msssim

""" + "\n".join(f"  {name:<11} {what}" for name, what in METRICS.items())


@dataclass(frozen=True)
class EvaluateOptions:
    """See DESCRIPTION."""

    networks: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="NETWORK...")]
    """Network files, network-<kimg>.safetensors."""
    data: str | None = None
    """What to compare with, as for `stylepipe train`: a prepared folder, photographs, or the location of a prepared
    folder. Default: drawn faces, built in."""
    metrics: Annotated[str, tyro.conf.arg(metavar="NAME,...")] = "swd"
    """What to measure."""
    images: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Generated images to take. Default: each metric's own number, as published: 16,384 for swd (as many as there are
    real ones at the most), 40,000 for msssim, 50,000 for the others."""
    trunc: float = 1.0
    """Truncation psi; published numbers have 1."""
    seed: int = MEASURED_SEED
    """Seed of latents, noise and everything else that is drawn."""
    batch: int = 16
    """Images at a time on one device."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with the weights of feature networks. Default: STYLEPIPE_WEIGHTS, the cache's weights/, torch.hub's."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where to append the results, with all that moves them. Default: metrics.jsonl beside each network."""


def main(argv: Sequence[str]) -> None:
    """Parse the options, measure, and print a line for each metric of each network."""
    options = tyro.cli(EvaluateOptions, args=list(argv), prog="stylepipe evaluate", description=DESCRIPTION)
    with joined() as accelerator, Watchdog(Config.stall_minutes * 60):
        evaluate(options, accelerator)


def evaluate(options: EvaluateOptions, accelerator: Accelerator) -> None:
    """Measure each network; every process takes part.

    Raises:
        UserError: an option does not make sense; see also `load_network`, `open_dataset`, `metrics_named`.
    """
    names, headers, dataset = on_every_process(accelerator, look_up, options)
    if options.weights is not None:
        os.environ[WEIGHTS_VARIABLE] = str(options.weights)
    metrics = on_every_process(accelerator, metrics_named, names, cache_folder())
    evaluation = Evaluation(metrics, dataset, accelerator, cache_folder(), options.images)
    for path, header in zip(options.networks, headers, strict=True):
        if (notice := license_notice(path, header)) and accelerator.is_main_process:
            print(notice, file=sys.stderr)
        generated = on_every_process(accelerator, generated_images, path, header, dataset, options, accelerator.device)
        measurements = evaluation.measure(generated)
        on_main_process(accelerator, _report, path, header, measurements, options)


def look_up(options: EvaluateOptions) -> tuple[list[str], list[NetworkHeader], ShardDataset]:
    """Check options and files, and open the data; what is quick to refuse comes first."""
    names = parse_names("--metrics", options.metrics)
    if not names:
        raise UserError(f"--metrics {options.metrics}: nothing to measure; expected some of {', '.join(METRICS)}")
    if not 0 <= options.seed < MAX_SEED:
        raise UserError(f"--seed {options.seed}: expected 0 or more, and less than 2^63")
    for option, number in (("--images", options.images), ("--batch", options.batch)):
        if number is not None and number < 2:
            raise UserError(f"{option} {number}: expected at least 2")
    if not options.networks:
        raise UserError(
            "no network is named; expected files such as runs/00000-auto-faces-64/network-000040.000.safetensors"
        )
    headers = [read_header(path) for path in options.networks]
    for path, header in zip(options.networks, headers, strict=True):
        if "z_dim" not in header.config:
            raise UserError(f"{path}: holds a {header.class_name}; expected a generator")
        if missing := [key for key in ("res", "c_dim") if key not in header.config]:
            raise UserError(f"{path}: its header says nothing of {missing[0]}; copy or download it again")
    if len(sizes := sorted({header.config["res"] for header in headers})) > 1:
        raise UserError(f"the networks make images of {sizes} px; measure those of one resolution at a time")
    if options.data is not None and is_stream(options.data):
        raise UserError(f"--data {options.data}: a stream has no fixed images to compare with; prepare it first")
    for path in options.networks:
        _see_writable(_results_file(path, options))
    dataset = open_data(options.data, sizes[0], labels=any(header.config["c_dim"] for header in headers))
    for path, header in zip(options.networks, headers, strict=True):
        if header.config["c_dim"] and not same_labels(path, header, dataset.c_dim, dataset.classes):
            raise UserError(
                f"{path}: its labels are not those of {dataset.name} ({header.config['c_dim']} dimensions there, "
                f"{dataset.c_dim} here, or other classes); measure it on data with the labels it was trained on"
            )
    return names, headers, dataset


def open_data(data: str | None, res: int, labels: bool) -> ShardDataset:
    """Open the real images at a resolution; of a prepared folder of a higher one, at a level that it holds."""
    if data is not None and is_prepared(data) and (dataset := open_dataset(data)).resolution > res:
        return dataset.level(res)
    return open_dataset(dataset_for_training(data, res, labels=labels), res)


def generated_images(
    path: Path, header: NetworkHeader, dataset: ShardDataset, options: EvaluateOptions, device: torch.device
) -> GeneratedImages:
    """Return the images of a network file; labels are drawn from those of the data."""
    G = load_network(path, device)
    if options.trunc != 1 and not hasattr(G, "mapping"):
        raise UserError(f"--trunc {options.trunc:g}: {path} holds a generator without styles, which has no truncation")
    draws = Draws(options.seed, device)

    def labels_at(ids: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(dataset.labels(ids))

    labels = Labels(draws, header.config["c_dim"], labels_at, len(dataset))
    return GeneratedImages(
        G,
        draws,
        labels.draw,
        resolution=header.config["res"],
        batch=options.batch,
        truncation_psi=options.trunc,
        checked=True,
    )


def _report(path: Path, header: NetworkHeader, measurements: Sequence[Measurement], options: EvaluateOptions) -> None:
    images_seen = re.fullmatch("[0-9]{1,18}", header.metadata.get("images_seen", ""))
    lines: list[dict[str, Any]] = []
    for measurement in measurements:
        line = measurement.line(int(images_seen[0]) if images_seen else None, path.name)
        lines.append({**line, "network_sha256": file_sha256(path)})
        print(f"{path.name}: {measurement} ({measurement.settings['images']:,} images)")
    out = _results_file(path, options)
    try:
        append_measured(out, lines)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); the numbers above are not kept") from error


def _results_file(path: Path, options: EvaluateOptions) -> Path:
    return options.out or path.parent / METRICS_FILE


def _see_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab"):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file with --out") from error
