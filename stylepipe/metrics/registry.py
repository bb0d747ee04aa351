"""The metrics by name: what each takes from images, of how many, and the number it makes of that."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from stylepipe.errors import UserError
from stylepipe.metrics.density_coverage import density_coverage
from stylepipe.metrics.extraction import Extraction, Rows, Team
from stylepipe.metrics.frechet import Moments, frechet_distance
from stylepipe.metrics.inception_score import inception_score
from stylepipe.metrics.kid import kernel_distance
from stylepipe.metrics.msssim import PairSimilarities, mean_similarities
from stylepipe.metrics.path_length import PathLengths, mean_path_length
from stylepipe.metrics.precision_recall import precision_recall
from stylepipe.metrics.published_networks import DINOv2, Inception
from stylepipe.metrics.random_network import RandomNetwork
from stylepipe.metrics.swd import PatchExtraction, patch_distances

METRICS: Mapping[str, str] = {
    "swd": "sliced Wasserstein distance between patches, level by level; needs no network",
    "msssim": "similarity of pairs of generated images, beside that of real ones; needs no network",
    "fd-random": "Fréchet distance on random convolutions; needs no download",
    "kid-random": "kernel distance on random convolutions",
    "pr-random": "precision and recall on random convolutions",
    "dc-random": "density and coverage on random convolutions",
    "fid": "Fréchet Inception distance",
    "kid": "kernel Inception distance",
    "pr": "precision and recall on Inception",
    "dc": "density and coverage on Inception",
    "is": "Inception score",
    "ppl": "perceptual path length in w, end points, not cropped",
    "fd-dinov2": "Fréchet distance on DINOv2",
}
"""What each name stands for."""

SPLITS = 10  # of the Inception score, as published; so are the neighbours of precision and density
PR_NEIGHBORS, DC_NEIGHBORS = 3, 5
_ADDED_AT_A_TIME = 8192  # features, which are added up in float64

WITHOUT_BEST = ("msssim",)  # noise has the lowest; it is compared with that of real images
Best = Literal["lowest", "highest"] | None
Result = Callable[[Rows | None, Rows, int, Team], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """A number, or several, that generated images are judged by.

    Attributes:
        name: one of METRICS.
        extraction: what it looks at.
        best: which is better, of the first of its numbers; None where neither is, so that it makes no network the best.
        result: makes its numbers by name, of rows of real images (None where it compares with none) and of generated
            ones, the seed and the team. All processes call it.
        compares: with real images.
        at_least: images of either kind that it needs.
    """

    name: str
    extraction: Extraction
    best: Best
    result: Result
    compares: bool = True
    at_least: int = 2


def metrics_named(names: Sequence[str], cache: Path) -> list[Metric]:
    """Return metrics, sharing the networks that they have in common.

    Raises:
        UserError: a name is unknown, or weights or libraries are missing.
    """
    networks: dict[str, Extraction] = {}
    return [_metric(name, cache, networks) for name in dict.fromkeys(names)]


def parse_names(option: str, text: str) -> list[str]:
    """Read "swd,msssim"; "none" or nothing is no metric.

    Raises:
        UserError: a name is unknown; names the option.
    """
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, n=1)
            raise UserError(f"{option} {text}: {name!r} found, " + (f"did you mean {near[0]}?" if near else _known()))
    return list(dict.fromkeys(names))


def _known() -> str:
    return f"expected some of {', '.join(METRICS)}"


def _metric(name: str, cache: Path, networks: dict[str, Extraction]) -> Metric:
    if name == "swd":
        return Metric(name, PatchExtraction(), "lowest", _swd)
    if name == "msssim":
        return Metric(name, PairSimilarities(), None, _msssim)
    if name == "ppl":
        return Metric(name, PathLengths(cache), "lowest", _ppl, compares=False)
    kind, _, network = name.partition("-")
    features = _network(network or "inception", cache, networks)
    if name == "is":
        return Metric(name, features, "highest", _inception_score, compares=False, at_least=SPLITS)
    result, best, at_least = _ON_FEATURES[kind]
    return Metric(name, features, best, partial(result, f"-{network}" if network else ""), at_least=at_least)


def _network(name: str, cache: Path, networks: dict[str, Extraction]) -> Extraction:
    if name not in networks:
        networks[name] = RandomNetwork() if name == "random" else _PUBLISHED[name](cache)
    return networks[name]


def _swd(real: Rows | None, fake: Rows, seed: int, team: Team) -> dict[str, float]:
    assert real is not None
    return patch_distances(real, fake, seed, team)


def _msssim(real: Rows | None, fake: Rows, seed: int, team: Team) -> dict[str, float]:
    del seed, team
    assert real is not None
    return mean_similarities(real, fake)


def _ppl(real: Rows | None, fake: Rows, seed: int, team: Team) -> dict[str, float]:
    del real, seed, team
    return {"ppl": mean_path_length(fake["lengths"][:, 0])}


def _inception_score(real: Rows | None, fake: Rows, seed: int, team: Team) -> dict[str, float]:
    del real, team
    score = inception_score(fake["logits"], splits=SPLITS, seed=seed)
    return {"is": score.mean, "is_std": score.std}


def _frechet(suffix: str, real: Rows | None, fake: Rows, seed: int, team: Team) -> dict[str, float]:
    del seed, team
    name = f"fd{suffix}" if suffix else "fid"
    return {name: frechet_distance(_moments(_features(real)), _moments(_features(fake)))}


def _kernel(suffix: str, real: Rows | None, fake: Rows, seed: int, team: Team) -> dict[str, float]:
    del team
    distance = kernel_distance(_features(real), _features(fake), seed=seed)
    return {f"kid{suffix}": distance.mean, f"kid{suffix}_std": distance.std}


def _precision_recall(suffix: str, real: Rows | None, fake: Rows, seed: int, team: Team) -> dict[str, float]:
    del seed, team
    found = precision_recall(_features(real), _features(fake), neighbors=PR_NEIGHBORS)
    return {f"precision{suffix}": found.precision, f"recall{suffix}": found.recall}


def _density_coverage(suffix: str, real: Rows | None, fake: Rows, seed: int, team: Team) -> dict[str, float]:
    del seed, team
    found = density_coverage(_features(real), _features(fake), neighbors=DC_NEIGHBORS)
    return {f"density{suffix}": found.density, f"coverage{suffix}": found.coverage}


def _features(rows: Rows | None) -> Tensor:
    assert rows is not None
    return rows["features"]


def _moments(features: Tensor) -> Moments:
    moments = Moments(features.shape[1], features.device)
    for part in features.split(_ADDED_AT_A_TIME):
        moments.add(part)
    return moments


_ON_FEATURES: Mapping[str, tuple[Callable[..., dict[str, float]], Best, int]] = {
    "fid": (_frechet, "lowest", 2),
    "fd": (_frechet, "lowest", 2),
    "kid": (_kernel, "lowest", 2),
    "pr": (_precision_recall, "highest", PR_NEIGHBORS + 1),
    "dc": (_density_coverage, "highest", DC_NEIGHBORS + 1),
}
_PUBLISHED: Mapping[str, Callable[[Path], Extraction]] = {"inception": Inception, "dinov2": DINOv2}
