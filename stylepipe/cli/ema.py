"""`stylepipe ema`: averages of a run's generator over other lengths than it was trained with."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from stylepipe.errors import UserError
from stylepipe.interop.network_file import load_network, read_header, save_network
from stylepipe.parsing import one_line
from stylepipe.recipes.growing import grown_so_far
from stylepipe.run_files import EMA_FOLDER, images_seen_of, kimg_name
from stylepipe.training.growth import Stage
from stylepipe.training.power_ema import (
    MAX_SIGMA_REL,
    MIN_SIGMA_REL,
    averages_files,
    profile_weights,
)

SUFFIX = ".safetensors"
FAR = 0.1  # relative error of a profile from which on it is another one than was asked for
_OF_STORED = ("sigma_rel", "ema_start", "resolution", "alpha")  # what headers of stored averages say beside the run


@dataclass(frozen=True)
class EMAOptions:
    """Average the generator over any length when the training is done, and write a network file to sample from.

    Karras et al. 2024, arXiv:2312.02696: from the averages that training stored in RUN/ema (see
    stylepipe train --ema.posthoc-kimg). Which length looks best differs from run to run: try several."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a training run."""
    length: Annotated[str, tyro.conf.arg(metavar="L,...")]
    """How far the average reaches back, as a share of the training up to there: the relative standard deviation of its
    weights over time, such as 0.1, from 0.01 to 0.28; or several, 0.05,0.1,0.15."""
    kimg: float | None = None
    """Average at this point of the training: at the newest stored up to there. Default: the newest of all."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """File to write, .safetensors, or folder. Default: RUN/network-<kimg>-ema<L>.safetensors."""


@dataclass(frozen=True)
class Stored:
    """A file of power-function averages.

    Attributes:
        images_seen: when they were stored.
        start: images seen when they began.
        prefixes: of the names of tensors, by the length of the average.
    """

    path: Path
    images_seen: int
    start: int
    prefixes: dict[float, str]
    class_name: str
    metadata: dict[str, str]


def main(argv: list[str]) -> None:
    """Parse the options, write the networks, and say how near each comes to the length that was asked for."""
    options = tyro.cli(EMAOptions, args=argv, prog="stylepipe ema")
    lengths = _lengths(options.length)
    stored = _stored_up_to(options)
    newest = stored[-1]
    paths = [_place(options, newest, length, len(lengths)) for length in lengths]
    fits = [_fit(stored, length) for length in lengths]
    network = load_network(newest.path)
    sums = _weighted_sums(network, stored, [weights for weights, _ in fits])
    for length, path, values, (_, error) in zip(lengths, paths, sums, fits, strict=True):
        _write(path, network, newest, values, length)
        print(f"{path}: length {length:g} at {_kimg(newest.images_seen)} kimg, profile error {error:.2%}")
        if error > FAR:
            print(
                f"warning: --length {length:g}: the {len(stored)} stored files come no nearer to it than this; it is "
                f"best between 0.04 and 0.2, and a smaller --ema.posthoc-kimg brings more into reach",
                file=sys.stderr,
            )


def _lengths(text: str) -> list[float]:
    """Read "0.05,0.1" as numbers, each once."""
    found: list[float] = []
    for part in text.split(","):
        try:
            length = float(part)
        except ValueError:
            length = math.nan
        if not MIN_SIGMA_REL <= length <= MAX_SIGMA_REL:
            raise UserError(
                f"--length {text}: {part.strip()!r} found, expected numbers from {MIN_SIGMA_REL:g} to "
                f"{MAX_SIGMA_REL:g} (a plain mean over the whole training has 0.289), such as 0.05,0.1"
            )
        found.append(length)
    return list(dict.fromkeys(found))


def _stored_up_to(options: EMAOptions) -> list[Stored]:
    """Return what is stored up to --kimg, ascending, of averages that began together with the newest of these."""
    run = options.run
    if not run.is_dir():
        raise UserError(f"{run}: {'a file' if run.exists() else 'no such folder'}; expected the folder of a run")
    files = [_read(path) for path in averages_files(run)]
    if not files:
        raise UserError(
            f"{run}: no averages in {run / EMA_FOLDER}; they are stored by training with --ema.posthoc-kimg above 0, "
            f"from where it is given on"
        )
    first, last = files[0].images_seen, files[-1].images_seen
    kimg = last / 1000 if options.kimg is None else options.kimg
    if not (math.isfinite(kimg) and first <= round(kimg * 1000) <= last):
        raise UserError(f"--kimg {kimg:g}: expected {_kimg(first)} to {_kimg(last)}, where {run} has stored averages")
    wanted = [file for file in files if file.images_seen <= round(kimg * 1000)]
    newest = wanted[-1]
    if newest.images_seen != round(kimg * 1000):
        print(f"the newest averages up to {kimg:g} kimg are of {_kimg(newest.images_seen)} kimg")
    if newest.start > 0:
        print(f"averages were kept from {_kimg(newest.start)} kimg on: lengths are shares of the training since then")
    return [file for file in wanted if file.start == newest.start]


def _kimg(images_seen: int) -> str:
    """Return thousands of images with every digit that --kimg may need."""
    return f"{images_seen / 1000:.10g}"


def _read(path: Path) -> Stored:
    """Read the header of a file that training stored."""
    header = read_header(path)
    try:
        prefixes = {float(header.metadata["sigma_rel"]): ""} | {float(name): f"{name}/" for name in header.beside}
        images_seen, start = int(header.metadata["images_seen"]), int(header.metadata["ema_start"])
        stored = Stored(path, images_seen, start, prefixes, header.class_name, header.metadata)
        stage, full = _stage(stored), header.config["res"]
        resolutions = [full >> level for level in range(full.bit_length() - 2)]
        if images_seen != images_seen_of(path):
            raise ValueError(f"its header says it is of {one_line(images_seen)} images")
        if not (start < images_seen and all(MIN_SIGMA_REL <= length <= MAX_SIGMA_REL for length in prefixes)):
            raise ValueError("no time that averages are of, or no length that they have")
        if stage.resolution not in resolutions or not 0 <= stage.alpha <= 1:
            raise ValueError(f"no stage of a network of {full} px")
    except (KeyError, ValueError, OverflowError) as error:
        found = one_line(error)
        raise UserError(f"{path}: holds no averages that training stored ({found}); move it elsewhere") from error
    return stored


def _stage(stored: Stored) -> Stage:
    """Return what the training looked like, as far as `grown_so_far` asks."""
    resolution, alpha = int(stored.metadata["resolution"]), float(stored.metadata["alpha"])
    return Stage(resolution, alpha, 1, 1.0, 0, stored.images_seen, 1, fading=alpha < 1)


def _fit(stored: Sequence[Stored], length: float) -> tuple[list[dict[str, float]], float]:
    """Return by how much each average of each file counts, by its prefix, and the error of the profile."""
    each = [(file.images_seen - file.start, sigma_rel) for file in stored for sigma_rel in file.prefixes]
    times, sigma_rels = zip(*each, strict=True)
    weights, error = profile_weights(times, sigma_rels, times[-1], length)
    rest = iter(weights.tolist())
    return [{prefix: next(rest) for prefix in file.prefixes.values()} for file in stored], error


def _weighted_sums(
    network: nn.Module, stored: Sequence[Stored], fits: Sequence[Sequence[dict[str, float]]]
) -> list[dict[str, Tensor]]:
    """Return the sum of every parameter, float64, for each fit: weights by file and prefix. Reads one file at a time.

    Args:
        network: that of the newest file.
    """
    shapes = {name: p.shape for name, p in network.named_parameters()}
    sums = [{name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()} for _ in fits]
    for index, file in enumerate(tqdm(stored, unit="file", disable=None, leave=False)):
        if file.class_name != stored[-1].class_name:
            raise _other_network(file, stored[-1], f"a {file.class_name}")
        try:
            with safe_open(str(file.path), framework="pt") as tensors:
                for name, shape in shapes.items():
                    for prefix in file.prefixes.values():
                        tensor = tensors.get_tensor(prefix + name)
                        if tensor.shape != shape:
                            raise _other_network(file, stored[-1], f"{name} of shape {list(tensor.shape)}")
                        for values, fit in zip(sums, fits, strict=True):
                            values[name].add_(tensor, alpha=fit[index][prefix])
        except (OSError, SafetensorError) as error:
            found = one_line(error)
            raise UserError(f"{file.path}: damaged, or of another network ({found}); move it elsewhere") from error
    return sums


def _other_network(file: Stored, newest: Stored, found: str) -> UserError:
    return UserError(
        f"{file.path}: holds {found}, so it is of another network than {newest.path.name}; move it elsewhere"
    )


def _place(options: EMAOptions, newest: Stored, length: float, count: int) -> Path:
    """Return where to write the network of a length; make its folder."""
    name = f"network-{kimg_name(newest.images_seen)}-ema{length:g}{SUFFIX}"
    out = options.run if options.out is None else options.out
    if out.suffix == SUFFIX and not out.is_dir():
        if count > 1:
            raise UserError(f"--out {out}: one file for the {count} lengths of --length; give a folder")
        out, name = out.parent, out.name
    elif out.is_file():
        raise UserError(f"--out {out}: expected a file that ends in {SUFFIX}, or a folder")
    path = out / name
    if path.resolve().parent == (options.run / EMA_FOLDER).resolve():
        raise UserError(f"--out {path}: among the stored averages, from which others are made; give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out: cannot make the folder {out}: {error.strerror or error}; choose another one"
        ) from error
    return path


def _write(path: Path, network: nn.Module, newest: Stored, values: dict[str, Tensor], length: float) -> None:
    """Write the average as an ordinary network, as far as it had grown, with the buffers of that moment."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(values[name])
    about = {key: text for key, text in newest.metadata.items() if key not in (*_OF_STORED, "stylepipe_version")}
    save_network(path, grown_so_far(network, _stage(newest)), metadata=about | {"sigma_rel": f"{length:g}"})
