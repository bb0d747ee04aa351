"""The metrics of a run: when they are measured, what is kept, and the best network."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from stylepipe.cli.main import main
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.interop.network_file import read_header
from stylepipe.run_files import network_file
from stylepipe.training import evaluation
from stylepipe.training.measuring import best_line, measured_lines, surplus
from stylepipe.training.progress import append_measured

TINY = [
    *("--res", "16", "--batch-size", "8", "--tracker", "none", "--ema.kimg", "0", "--snapshot-kimg", "0.016"),
    *("--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16", "--network.w-dim", "16"),
    *("--augment", "none", "--optim.g-lr", "0.02", "--optim.d-lr", "0.02", "--grid-kimg", "1", "--clip-kimg", "1"),
]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLEPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(24):
        draw_face(index, 16).save(folder / f"{index:02d}.png")
    out = tmp_path_factory.mktemp("prepared") / "faces16"
    prepare(folder, out, Preparation(16), workers=1, progress=False)
    return out


def train(shards: Path, out: Path, kimg: float, *more: str) -> list[dict]:
    """Train and return what metrics.jsonl says then."""
    assert main(["train", "--data", str(shards), "--out", str(out), "--kimg", str(kimg), *TINY, *more]) == 0
    return lines_of(out)


def lines_of(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "straight"
    train(shards, out, 0.08)
    return out


def numbers_of(lines: list[dict]) -> list[dict]:
    return [{key: line[key] for key in ("metric", "images_seen", "results", "settings")} for line in lines]


def test_every_saved_network_is_measured_and_the_best_is_at_hand(straight):
    lines = lines_of(straight)
    assert [line["images_seen"] for line in lines] == [16, 32, 48, 64, 80]
    assert all(line["metric"] == "swd" and (straight / line["network"]).exists() for line in lines)
    values = {line["results"]["swd"]: line for line in lines}
    assert len(values) == 5
    best = values[min(values)]
    found = straight / "network-best.safetensors"
    assert found.samefile(straight / best["network"])
    assert read_header(found).metadata["images_seen"] == str(best["images_seen"])
    log = (straight / "log.txt").read_text()
    assert f"best swd so far: {min(values):.4g}, now network-best.safetensors" in log


def test_a_run_that_stops_and_goes_on_measures_the_same(shards, straight, tmp_path):
    train(shards, tmp_path / "run", 0.048)
    assert numbers_of(train(shards, tmp_path / "run", 0.08)) == numbers_of(lines_of(straight))


@pytest.mark.slow
def test_what_was_to_be_measured_when_a_run_was_killed_is_measured_when_it_goes_on(shards, straight, tmp_path):
    out = tmp_path / "run"
    lines = train(shards, out, 0.032)
    (out / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[1])[:40])
    assert numbers_of(train(shards, out, 0.048)) == numbers_of(lines_of(straight)[:3])


@pytest.mark.slow
def test_going_on_from_an_older_state_forgets_what_came_later(shards, straight, tmp_path):
    out = tmp_path / "run"
    train(shards, out, 0.048, "--keep-states", "0")
    for path in out.glob("state-000000.0[34]*"):
        path.rename(tmp_path / path.name)
    assert numbers_of(train(shards, out, 0.032)) == numbers_of(lines_of(straight)[:2])
    best = min(lines_of(out), key=lambda line: line["results"]["swd"])
    assert (out / "network-best.safetensors").samefile(out / best["network"])


def test_intervals_images_and_the_chosen_metric_are_the_users(shards, tmp_path):
    more = ["--metrics", "swd,fd-random", "--metrics-kimg", "0.04", "--metrics-images", "10", "--best-metric"]
    lines = train(shards, tmp_path / "run", 0.08, *more, "fd-random")
    assert [(line["metric"], line["images_seen"]) for line in lines] == [
        (name, seen) for seen in (40, 80) for name in ("swd", "fd-random")
    ]
    assert [line["settings"]["images"] for line in lines] == [10] * 4
    assert (tmp_path / "run" / network_file(40)).exists(), "what is measured is saved"
    best = min(lines[1::2], key=lambda line: line["results"]["fd-random"])
    assert (tmp_path / "run" / "network-best.safetensors").samefile(tmp_path / "run" / best["network"])


def test_weights_that_are_not_here_cost_a_sentence_and_no_training(shards, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("STYLEPIPE_WEIGHTS", str(tmp_path))
    lines = train(shards, tmp_path / "run", 0.016, "--metrics", "fid")
    assert [line["metric"] for line in lines] == ["swd"]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("--metrics fid: weights-inception-2015-12-05-6726825d.pth is not here: put the file")
    assert warnings[0].endswith(f"into {tmp_path}; this run measures swd")
    assert "metrics: swd" in (tmp_path / "run" / "config.yaml").read_text()


def test_none_measures_nothing_and_has_no_best(shards, tmp_path):
    assert train(shards, tmp_path / "run", 0.016, "--metrics", "none") == []
    assert not (tmp_path / "run" / "network-best.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "swdd"], "--metrics swdd: 'swdd' found, did you mean swd?"),
        (["--best-metric", "fid"], "--best-metric fid: is not measured by --metrics; expected one of swd"),
        (["--metrics", "msssim", "--best-metric", "msssim"], "neither its lowest nor its highest is best"),
        (["--metrics", "dc-random", "--metrics-images", "5"], "24 real and 5 generated images; expected 6 at least"),
        (["--metrics-images", "1"], "--metrics-images 1: expected at least 2"),
        (["--keep", "2"], "--keep 2: expected 0 for all, or 3 at least"),
        (["--metrics-kimg", "0"], "--metrics-kimg 0.0: expected a finite number above 0"),
    ],
)
def test_mistakes_are_refused_at_the_start(shards, tmp_path, capsys, options, message):
    out = ["--out", str(tmp_path / "run"), "--kimg", "0.016"]
    assert main(["train", "--data", str(shards), *out, *TINY, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_old_networks_are_thinned_but_never_the_best_or_the_newest(shards, tmp_path):
    out = tmp_path / "run"
    lines = train(shards, out, 0.16, "--keep", "4")
    left = sorted(path.name for path in out.glob("network-0*"))
    assert len(left) == 4
    best = min(lines, key=lambda line: line["results"]["swd"])["network"]
    assert {network_file(16), network_file(160), best} <= set(left)
    assert (out / "network-best.safetensors").samefile(out / best)


def test_a_branch_measures_its_own_networks_only(shards, straight, tmp_path):
    lines = train(shards, tmp_path / "branch", 0.096, "--resume", str(straight / "state-000000.080"))
    assert [line["images_seen"] for line in lines] == [96]
    assert (tmp_path / "branch" / "network-best.safetensors").samefile(tmp_path / "branch" / network_file(96))


@pytest.mark.slow
def test_later_networks_of_an_abandoned_end_are_no_reason_to_delete_that_of_now(shards, tmp_path):
    out = tmp_path / "run"
    train(shards, out, 0.064, "--keep-states", "0")
    for path in out.glob("state-000000.0[346]*"):
        path.rename(tmp_path / path.name)  # as a message of a damaged state advises
    train(shards, out, 0.024, "--keep", "3", "--snapshot-kimg", "0.008")
    assert (out / network_file(24)).exists()


def test_the_best_is_one_that_is_there(straight, tmp_path):
    lines = lines_of(straight)
    best = best_line(lines, "swd")
    left = [line for line in lines if line is not best]
    assert best_line(left, "swd")["results"]["swd"] > best["results"]["swd"]


@pytest.mark.slow
def test_a_config_file_with_metrics_that_are_not_here_can_be_used_again(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("STYLEPIPE_WEIGHTS", str(tmp_path))
    train(shards, tmp_path / "run", 0.016, "--metrics", "fid,msssim", "--best-metric", "fid", "--metrics-images", "8")
    config = ["--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main(["train", *config]) == 0
    assert numbers_of(lines_of(tmp_path / "again")) == numbers_of(lines_of(tmp_path / "run"))
    assert (tmp_path / "again" / "network-best.safetensors").exists(), "by swd"


@pytest.mark.slow
def test_a_signal_ends_the_measuring_and_the_next_start_makes_up_for_it(shards, tmp_path, monkeypatch):
    out = tmp_path / "run"
    collect = evaluation.collect
    with monkeypatch.context() as patch:

        def interrupted(*args, **options):
            signal.raise_signal(signal.SIGTERM)
            return collect(*args, **options)

        patch.setattr(evaluation, "collect", interrupted)
        assert main(["train", "--data", str(shards), "--out", str(out), "--kimg", "0.032", *TINY]) == 0
    assert lines_of(out) == []
    assert (out / network_file(16)).exists()
    assert [line["images_seen"] for line in train(shards, out, 0.032)] == [16, 32]


def test_lines_of_two_writers_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"metric": "swd", "resu')
    append_measured(path, [line(8, float("nan")), line(16, 2.0)])
    append_measured(path, [line(24, 3.0)])
    found = list(measured_lines(tmp_path))
    assert [entry["images_seen"] for entry in found] == [8, 16, 24]
    assert found[0]["results"]["swd"] is None
    assert best_line(found, "swd")["images_seen"] == 16, "what is not finite is not the best"


def line(seen: int, value: float, network: str | None = None, best: str = "lowest", **settings: object) -> dict:
    return {
        "metric": "swd",
        "images_seen": seen,
        "network": network or network_file(seen),
        "results": {"swd": value, "swd_16": 0.0},
        "best": best,
        "settings": {"images": 10, **settings},
    }


def test_the_best_is_found_among_what_can_be_compared():
    lines = [line(1000, 3.0, images=99), line(2000, 5.0), line(3000, 4.0), line(4000, 6.0)]
    assert best_line(lines, "swd")["images_seen"] == 3000, "the first was measured with other images"
    assert best_line([*lines, line(4000, 1.0, "ema-0.100.safetensors")], "swd")["images_seen"] == 3000
    assert best_line([line(1, 2.0, best="highest"), line(2, 3.0, best="highest")], "swd")["images_seen"] == 2
    assert best_line([line(1, 2.0), line(2, 2.0)], "swd")["images_seen"] == 1, "the first of equal ones"
    assert best_line(lines, "fid") is None
    assert best_line([], "swd") is None


def test_what_is_left_is_spread_over_the_training():
    files = [Path(network_file(1000 * n)) for n in range(1, 41)]
    kept: list[Path] = []
    for file in files:  # as a run saves them
        kept.append(file)
        gone = surplus(kept, 6, {files[6].name})
        kept = [path for path in kept if path not in gone]
    assert len(kept) == 6
    assert files[0] in kept
    assert files[6] in kept
    assert files[-1] in kept
    times = [float(path.name[8:18]) for path in kept]
    gaps = [b - a for a, b in pairwise(times)]
    assert max(gaps) <= 20, times
    assert surplus(files, 40, set()) == []
    assert len(surplus(files, 3, {path.name for path in files})) == 0
