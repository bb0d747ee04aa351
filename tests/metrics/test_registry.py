"""The metrics by name: real scores about nothing, noise badly, collapse shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stylepipe.datasets.drawn import draw_face
from stylepipe.errors import UserError
from stylepipe.metrics.extraction import Team, Wanted, collect
from stylepipe.metrics.path_length import mean_path_length
from stylepipe.metrics.registry import METRICS, WITHOUT_BEST, metrics_named, parse_names

CPU = torch.device("cpu")
LOCAL = ["swd", "msssim", "fd-random", "kid-random", "pr-random", "dc-random"]


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(draw_face(n, 16)) for n in range(120)]))


def measure(names, real, fake, cache):
    results = {}
    for metric in metrics_named(names, cache):
        rows = []
        for images, is_real in ((real, True), (fake, False)):
            extractor = metric.extraction.extractor(16, 0, is_real, CPU)
            wanted = {"rows": Wanted(extractor, len(images))}
            rows.append(collect(lambda n, of=images: of[list(n)], wanted, batch=32, team=Team(), device=CPU)["rows"])
        results |= metric.result(*rows, 0, Team())
    return results


def test_a_replay_of_the_real_set_scores_well_and_noise_badly(faces, tmp_path):
    half, other = faces[:60], faces[60:]
    same = measure(LOCAL, half, half, tmp_path)
    unseen = measure(LOCAL, half, other, tmp_path)
    noise = torch.randint(0, 256, half.shape, dtype=torch.uint8)
    bad = measure(LOCAL, half, noise, tmp_path)
    assert same["fd-random"] == pytest.approx(0, abs=1e-9)
    assert same["precision-random"] == same["recall-random"] == 1
    assert same["coverage-random"] == 1
    assert same["swd"] < 1.2 * unseen["swd"] < bad["swd"] / 4
    assert unseen["fd-random"] < bad["fd-random"] / 4
    assert abs(unseen["kid-random"]) < bad["kid-random"] / 4
    for name in ("precision-random", "recall-random", "density-random", "coverage-random"):
        assert bad[name] < 0.6 * unseen[name]


def test_a_collapsed_generator_shows_in_each(faces, tmp_path):
    half = faces[:60]
    alike = faces[7:8].expand(60, -1, -1, -1)
    collapsed = measure(LOCAL, half, alike, tmp_path)
    unseen = measure(LOCAL, half, faces[60:], tmp_path)
    assert collapsed["msssim"] == pytest.approx(1, abs=1e-5)
    assert unseen["msssim"] < 0.6
    assert collapsed["msssim_real"] == unseen["msssim_real"]
    assert collapsed["swd"] > 3 * unseen["swd"]
    assert collapsed["fd-random"] > 3 * unseen["fd-random"]
    assert collapsed["recall-random"] < 0.1 < unseen["recall-random"]
    assert collapsed["coverage-random"] < 0.2 < unseen["coverage-random"]


def test_numbers_on_random_features_never_go_by_the_published_names(faces, tmp_path):
    found = measure(LOCAL[2:], faces[:40], faces[40:80], tmp_path)
    assert all("random" in name for name in found)


def test_metrics_share_what_they_look_at(tmp_path):
    swd, fd, pr = metrics_named(["swd", "fd-random", "pr-random"], tmp_path)
    assert fd.extraction is pr.extraction
    assert swd.extraction is not fd.extraction
    assert [m.name for m in metrics_named(["swd", "swd"], tmp_path)] == ["swd"]


def test_how_many_images_each_takes(tmp_path):
    swd, fd = metrics_named(["swd", "fd-random"], tmp_path)
    assert swd.extraction.counts(70_000, None) == (16_384, 16_384)
    assert swd.extraction.counts(945, None) == (945, 945)
    assert swd.extraction.counts(945, 100) == (100, 100)
    assert fd.extraction.counts(945, None) == (945, 50_000)
    assert fd.extraction.counts(10_000_000, 100) == (200_000, 100)


@pytest.mark.parametrize(
    ("text", "names"), [("swd", ["swd"]), (" swd, kid ,swd", ["swd", "kid"]), ("none", []), ("", [])]
)
def test_names_are_read_from_a_list(text, names):
    assert parse_names("--metrics", text) == names


def test_similarity_makes_no_network_the_best(tmp_path):
    assert {m.name: m.best for m in metrics_named(LOCAL, tmp_path)} == {
        "swd": "lowest",
        "msssim": None,
        "fd-random": "lowest",
        "kid-random": "lowest",
        "pr-random": "highest",
        "dc-random": "highest",
    }
    assert {"msssim"} == set(WITHOUT_BEST)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"--metrics fids: 'fids' found, did you mean fid\?"):
        parse_names("--metrics", "fids")
    with pytest.raises(UserError, match=r"'loss' found, expected some of swd, msssim, "):
        parse_names("--metrics", "loss")
    assert all(what for what in METRICS.values())


def test_path_lengths_lose_the_hundredth_at_either_end():
    lengths = torch.arange(1.0, 1001.0)
    lengths[-1] = 1e9
    assert mean_path_length(lengths[torch.randperm(1000)]) == pytest.approx(np.arange(10, 992).mean(), rel=2e-3)
