"""`stylepipe ema`: what training stores for it, the networks that it makes of that, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from poisoned_train import poison
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stylepipe
from stylepipe.cli.main import main
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.interop import network_file
from stylepipe.interop.network_file import read_header

TINY = [
    *("--res", "16", "--batch-size", "8", "--tracker", "none", "--seed", "3", "--workers", "0"),
    *("--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16"),
    *("--loss.r1-interval", "4", "--loss.r1-gamma", "10", "--tick-kimg", "0.016", "--grid-kimg", "10"),
    *("--snapshot-kimg", "0.032", "--metrics", "none", "--clip-kimg", "10"),
]
STYLED = [*TINY, "--network.w-dim", "16"]
STORED = [f"000000.{kimg:03d}.safetensors" for kimg in range(16, 129, 16)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, out = tmp_path_factory.mktemp("photographs") / "faces", tmp_path_factory.mktemp("prepared") / "faces16"
    folder.mkdir()
    for index in range(24):
        draw_face(index, 32).save(folder / f"{index:02d}.png")
    prepare(folder, out, Preparation(16, levels=True), workers=1, progress=False)
    return out


def train(shards: Path, out: Path, kimg: float, *more: str, interval: float = 0.016) -> int:
    options = ["--data", str(shards), "--out", str(out), "--kimg", str(kimg), "--ema.posthoc-kimg", str(interval)]
    return main(["train", *options, *(STYLED if "--preset" not in more else TINY), *more])


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 0.128 kimg with 8 stored averages, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert train(shards, out, 0.128) == 0
    return out


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to damage."""
    return Path(shutil.copytree(run, tmp_path / "copied"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights_of(path: Path, name: str | None = None) -> dict[str, torch.Tensor]:
    return {
        key: p.clone() for key, p in stylepipe.interop.network_file.load_network(path, name=name).named_parameters()
    }


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Up to what adding up in float64 leaves of a difference: a rounding to float32."""
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7) for name in ours)


def test_a_run_stores_both_averages_as_network_files(run: Path) -> None:
    assert names(run / "ema") == STORED
    path = run / "ema" / STORED[-1]
    metadata = read_header(path).metadata
    assert (metadata["images_seen"], metadata["ema_start"], metadata["resolution"]) == ("128", "0", "16")
    assert metadata["data"] == "faces"
    state = load_file(run / "state-000000.128" / "state.safetensors")
    for name, length in ((None, "0.050"), ("0.100", "0.100")):
        G = network_file.load_network(path, name=name)
        assert G(torch.randn(2, 16), truncation_psi=0.7).shape == (2, 3, 16, 16)
        sizes = [-(-p.numel() // 16) * 16 for p in G.parameters()]  # the arena pads each parameter to 16 numbers
        parts = zip(state[f"G.power_{length}"].split(sizes), G.parameters(), strict=True)
        assert all(torch.equal(part[: p.numel()], p.flatten()) for part, p in parts)
        assert torch.equal(G.mapping.w_avg, state["G.buffer.mapping.w_avg"]), "of that moment"


def test_an_average_of_a_chosen_length_can_be_sampled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "long.safetensors"
    assert main(["ema", str(run), "--length", "0.15", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: length 0.15 at 0.128 kimg, profile error 3.")
    assert printed.err == ""
    header = read_header(out)
    assert header.beside == {}
    assert (header.metadata["images_seen"], header.metadata["sigma_rel"]) == ("128", "0.15")
    assert not {"ema_start", "resolution", "alpha"} & header.metadata.keys()
    assert main(["sample", str(out), "--seeds", "0-3", "--grid", "2x2", "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").exists()


def test_the_stored_lengths_come_out_as_they_went_in(run: Path, tmp_path: Path) -> None:
    assert main(["ema", str(run), "--length", "0.05,0.1", "--kimg", "0.08", "--out", str(tmp_path)]) == 0
    stored = run / "ema" / "000000.080.safetensors"
    assert same(weights_of(tmp_path / "network-000000.080-ema0.05.safetensors"), weights_of(stored))
    assert same(weights_of(tmp_path / "network-000000.080-ema0.1.safetensors"), weights_of(stored, "0.100"))


def test_several_lengths_are_written_beside_the_networks_of_the_run(copied: Path) -> None:
    before = names(copied)
    assert main(["ema", str(copied), "--length", "0.05, 0.2,0.05"]) == 0
    made = [f"network-000000.128-ema{length}.safetensors" for length in ("0.05", "0.2")]
    assert [name for name in names(copied) if name not in before] == made
    short, long = (weights_of(copied / name) for name in made)
    assert not same(short, long)


def test_a_moment_between_the_stored_ones_takes_the_one_before(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ema", str(run), "--length", "0.1", "--kimg", "0.09", "--out", str(tmp_path)]) == 0
    assert names(tmp_path) == ["network-000000.080-ema0.1.safetensors"]
    assert "the newest averages up to 0.09 kimg are of 0.08 kimg" in capsys.readouterr().out


def test_a_length_out_of_reach_is_warned_of(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ema", str(run), "--length", "0.01,0.1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "length 0.01 at 0.128 kimg, profile error 52" in printed.out
    assert printed.err.count("warning") == 1
    assert "--length 0.01: the 8 stored files come no nearer to it" in printed.err


@pytest.mark.slow
def test_resuming_stores_what_an_uninterrupted_run_does(run: Path, shards: Path, tmp_path: Path) -> None:
    """Averages later than the state that a run goes on from, as a killed run leaves them, make place for its own."""
    out = tmp_path / "cut"
    assert train(shards, out, 0.064) == 0
    later = out / "ema" / "000000.080.safetensors"
    save_file({"of another": torch.zeros(3)}, later)
    (out / "ema" / ".000000.096.safetensors.1.tmp").touch()
    assert train(shards, out, 0.128) == 0
    assert names(out / "ema") == STORED
    for name in STORED:
        ours, theirs = load_file(out / "ema" / name), load_file(run / "ema" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


@pytest.mark.slow
def test_the_end_of_a_run_is_stored_whatever_the_interval(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train(shards, out, 0.024, interval=10) == 0
    assert names(out / "ema") == ["000000.024.safetensors"]
    (out / "ema" / "000000.024.safetensors").unlink()  # as if the disk had been full
    assert train(shards, out, 0.024, interval=10) == 0
    assert names(out / "ema") == ["000000.024.safetensors"]


@pytest.mark.slow
def test_a_longer_training_goes_on_with_another_interval(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for kimg, interval in ((0.064, 0.008), (0.128, 0.016)):
        assert train(shards, out, kimg, interval=interval) == 0
        assert yaml.safe_load((out / "config.yaml").read_text())["ema"]["posthoc_kimg"] == interval
    assert len(names(out / "ema")) == 8 + 4
    assert main(["ema", str(out), "--length", "0.07"]) == 0


def test_with_0_nothing_is_stored(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(shards, out, 0.032, interval=0) == 0
    assert not (out / "ema").exists()
    assert main(["ema", str(out), "--length", "0.1"]) == 2
    assert "no averages in" in capsys.readouterr().err
    assert train(shards, out, 0.096) == 0, "averages can begin later"
    assert names(out / "ema") == [f"000000.{kimg}.safetensors" for kimg in ("048", "064", "080", "096")]
    capsys.readouterr()
    assert main(["ema", str(out), "--length", "0.05"]) == 0
    assert "averages were kept from 0.032 kimg on" in capsys.readouterr().out
    stored = weights_of(out / "ema" / "000000.096.safetensors")
    assert same(weights_of(out / "network-000000.096-ema0.05.safetensors"), stored)


@pytest.mark.slow
def test_averages_that_began_at_another_time_are_not_mixed(
    copied: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two stretches in one run: what each stored belongs to its own clock."""
    assert train(shards, copied, 0.144, interval=0) == 0
    assert train(shards, copied, 0.176) == 0
    assert [read_header(copied / "ema" / name).metadata["ema_start"] for name in names(copied / "ema")] == [
        *["0"] * 8,
        *["144"] * 2,
    ]
    capsys.readouterr()
    assert main(["ema", str(copied), "--length", "0.15"]) == 0
    assert "from 0.144 kimg on" in capsys.readouterr().out
    assert main(["ema", str(copied), "--length", "0.15", "--kimg", "0.14"]) == 0
    assert "from 0.144 kimg on" not in capsys.readouterr().out
    assert "network-000000.128-ema0.15.safetensors" in names(copied)


@pytest.mark.slow
def test_a_branch_of_a_run_begins_with_the_averages_of_its_state(run: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "branch"
    (out / "ema").mkdir(parents=True)
    shutil.copy(run / "ema" / STORED[0], out / "ema" / STORED[1])  # of a run that was killed before its first state
    assert train(shards, out, 0.112, "--resume", str(run / "state-000000.096")) == 0
    assert names(out / "ema") == ["000000.096.safetensors", "000000.112.safetensors"]


@pytest.mark.slow
def test_a_divergence_sets_its_averages_aside(shards: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    with poison(40, cured_by=2):
        more = ["--divergence-updates", "4", "--on-divergence", "rollback"]
        assert train(shards, out, 0.096, *more) == 0
    stored = [f"000000.{kimg}.safetensors" for kimg in ("016", "032", "048", "064", "080", "096")]
    aside = [f"diverged-000000.{kimg}.safetensors" for kimg in ("048", "064")]
    assert set(names(out / "ema")) >= {*stored, *aside}
    assert train(shards, other, 0.032) == 0
    assert train(shards, other, 0.096, "--loss.r1-gamma", "20") == 0
    for name in stored:
        ours, theirs = load_file(out / "ema" / name), load_file(other / "ema" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert main(["ema", str(out), "--length", "0.1"]) == 0


@pytest.mark.slow
def test_a_growing_training_is_averaged_as_it_had_grown(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    more = ["--preset", "progan", "--growth.start-res", "4", "--growth.stable-kimg", "0.016"]
    more += ["--growth.fade-kimg", "0.016"]
    assert train(shards, out, 0.096, *more, interval=0.008) == 0
    for kimg, res, alpha in (("0.016", 4, 1), ("0.032", 8, 0.5), ("0.056", 16, 0), ("0.096", 16, 1)):
        made = tmp_path / f"{kimg}.safetensors"
        assert main(["ema", str(out), "--length", "0.1", "--kimg", kimg, "--out", str(made)]) == 0
        config = read_header(made).config
        stored = json.loads(header_of(out / "ema" / f"{float(kimg):010.3f}.safetensors")["config"])
        assert stored["res"] == 16, "the whole network"
        assert config["res"] == res
        assert config["alpha"] == alpha
        G = stylepipe.load_network(made)
        assert G(torch.randn(2, 16)).shape == (2, 3, res, res)
    network = out / "network-000000.096.safetensors"
    assert weights_of(tmp_path / "0.096.safetensors").keys() == weights_of(network).keys()


def header_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--length", "0"], "--length 0: '0' found, expected numbers from 0.01 to 0.28"),
        (["--length", "-0.1"], "expected numbers from 0.01 to 0.28"),
        (["--length", "0.1,0.3"], "'0.3' found, expected numbers from 0.01 to 0.28"),
        (["--length", "nan"], "expected numbers from 0.01 to 0.28"),
        (["--length", "0.1,"], "'' found, expected numbers"),
        (["--length", "long"], "'long' found, expected numbers"),
        (["--length", "0.1", "--kimg", "0.2"], "--kimg 0.2: expected 0.016 to 0.128"),
        (["--length", "0.1", "--kimg", "0.001"], "--kimg 0.001: expected 0.016 to 0.128"),
        (["--length", "0.1", "--kimg", "nan"], "--kimg nan: expected 0.016 to 0.128"),
        (["--length", "0.1,0.2", "--out", "a.safetensors"], "one file for the 2 lengths of --length; give a folder"),
        (["--length", "0.1", "--out", "{run}/config.yaml"], "expected a file that ends in .safetensors, or a folder"),
        (["--length", "0.1", "--out", "{run}/ema"], "among the stored averages"),
        (["--length", "0.1", "--out", "{run}/config.yaml/a.safetensors"], "config.yaml"),
    ],
)
def test_a_mistake_gets_one_message(
    arguments: list[str], named: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    before = names(run)
    assert main(["ema", str(run), *(argument.format(run=run) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert (names(run), names(tmp_path)) == (before, [])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("cut short", "000000.064.safetensors: cut short"),
        ("another name", "000000.064.safetensors: holds no averages that training stored (its header says it is of"),
        ("a network of the run", "holds no averages that training stored ('sigma_rel')"),
        ("another kind", "so it is of another network than 000000.128.safetensors"),
        ("another shape", "so it is of another network than 000000.128.safetensors"),
        ("a missing tensor", "damaged, or of another network"),
        ("no file", "no averages in"),
        ("no folder", "no such folder; expected the folder of a run"),
        ("no run", "a file; expected the folder of a run"),
    ],
)
def test_files_that_do_not_belong_there_are_named(
    damage: str, named: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = copied / "ema" / "000000.064.safetensors", copied
    tensors, header = load_file(path), header_of(path)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "another name":
        shutil.copy(copied / "ema" / STORED[0], path)
    elif damage == "a network of the run":
        shutil.copy(copied / "network-000000.064.safetensors", path)
    elif damage == "another kind":
        save_file(tensors, path, header | {"class": "dcgan.Generator"})
    elif damage == "another shape":
        save_file(tensors | {"synthesis.b4.const": torch.zeros(2)}, path, header)
    elif damage == "a missing tensor":
        del tensors["0.100/synthesis.b4.const"]
        save_file(tensors, path, header)
    elif damage == "no file":
        shutil.rmtree(copied / "ema")
    else:
        run = copied / ("nothing" if damage == "no folder" else "config.yaml")
    before = names(copied)
    assert main(["ema", str(run), "--length", "0.1"]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1
    assert names(copied) == before
