"""`stylepipe sample`, with a generator whose images show which z, class and settings made them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stylepipe.cli.main import run
from stylepipe.cli.sample import SampleOptions, latents, parse_seeds, sample
from stylepipe.errors import UserError
from stylepipe.interop import network_file
from stylepipe.interop.network_file import save_network

RES = 8


class Mapping(nn.Module):
    def __init__(self, z_dim: int) -> None:
        super().__init__()
        self.z_dim = z_dim

    def forward(
        self,
        z: Tensor,
        c: Tensor | None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        class_centers: bool = True,
    ) -> Tensor:
        w = z * truncation_psi
        if c is None:
            return w
        if truncation_psi == 0:  # the centre shows in red
            return torch.full_like(w, 5 if class_centers else -5)
        return w + 2 * c @ torch.arange(c.shape[1]).float()[:, None]


class Generator(nn.Module):
    """Red shows w's first entry; green is lit by noise."""

    def __init__(self, z_dim: int = 4, c_dim: int = 0, class_w_avg: bool = False) -> None:
        super().__init__()
        self.config = {"z_dim": z_dim, "c_dim": c_dim, "class_w_avg": class_w_avg}
        self.z_dim, self.mapping = z_dim, Mapping(z_dim)
        self.scale = nn.Parameter(torch.tensor(0.2))

    def synthesis(self, ws: Tensor, noise_mode: str) -> Tensor:
        img = torch.full((len(ws), 3, RES, RES), -1.0)
        img[:, 0] = (ws[:, 0] * self.scale).view(-1, 1, 1).clamp(-1, 1)
        if noise_mode == "random":
            img[:, 1] = torch.rand(len(ws), RES, RES)
        return img


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, int] = {}
        self.b4 = nn.Parameter(torch.zeros(3))


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stem = __name__.rpartition(".")[2]
    for kind in ("Generator", "Discriminator"):
        monkeypatch.setitem(network_file.NETWORKS, f"{stem}.{kind}", f"{__name__}:{kind}")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    save_network(tmp_path / "network-000001.000.safetensors", Generator())
    return tmp_path / "network-000001.000.safetensors"


def red(path: Path) -> int:
    """Read the red byte of an image of one colour."""
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (RES, RES, 3)
    assert (pixels[:, :, 0] == pixels[0, 0, 0]).all()
    return int(pixels[0, 0, 0])


def expected_red(seed: int, psi: float = 1.0, label: float = 0) -> int:
    return int(min(max((latents([seed], 4)[0, 0] * psi + 2 * label) * 0.2 * 127.5 + 128, 0), 255))


def test_seeds() -> None:
    assert parse_seeds("0-3,42, 7 ,5-5") == [0, 1, 2, 3, 42, 7, 5]
    for wrong in ("", "a", "3-1", "1,,2", "-5", "1-", "0x3", "1.5", "9" * 20):
        with pytest.raises(UserError, match="--seeds"):
            parse_seeds(wrong)


def test_a_seeds_latent_is_its_own_and_never_changes() -> None:
    assert np.array_equal(latents([3, 5], 512)[1], latents([5], 512)[0])
    many = latents(list(range(200)), 512)
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
    # Pinned: published pictures name their seeds.
    assert latents([42], 3)[0] == pytest.approx(PINNED_42, rel=1e-6)


PINNED_42 = [0.1817047, -1.2426393, -0.551553]


def test_one_file_per_seed(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sample", [str(network), "--seeds", "0-2,1042", "--batch", "3"]) == 0
    folder = Path("samples/network-000001.000")
    assert capsys.readouterr().out == f"{folder}\n"
    assert sorted(path.name for path in folder.iterdir()) == [
        "seed0000.png", "seed0001.png", "seed0002.png", "seed1042.png",
    ]  # fmt: skip
    for seed in (0, 1, 2, 1042):
        assert red(folder / f"seed{seed:04d}.png") == expected_red(seed)


def test_a_grid_in_the_order_of_the_seeds(network: Path) -> None:
    path = sample(SampleOptions(network, seeds="5,3,9", grid="2x3", trunc=0.5))
    assert path == Path("samples/network-000001.000-seeds5,3,9.png")
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (3 * RES, 2 * RES, 3)
    cells = pixels[::RES, ::RES, 0].tolist()
    assert cells[:2] == [[expected_red(5, 0.5), expected_red(3, 0.5)], [expected_red(9, 0.5), 0]]
    assert not pixels[2 * RES :].any()


def test_without_seeds_the_grid_says_how_many(network: Path) -> None:
    path = sample(SampleOptions(network, grid="3x2", out=Path("a.webp")))
    pixels = np.asarray(Image.open(path))
    assert pixels[::RES, ::RES, 0].tolist() == [[expected_red(s) for s in row] for row in ([0, 1, 2], [3, 4, 5])]


def test_out_decides_between_a_picture_and_a_folder(network: Path) -> None:
    assert sample(SampleOptions(network, seeds="1-5", out=Path("x/y.png"))) == Path("x/y.png")
    assert np.asarray(Image.open("x/y.png")).shape == (2 * RES, 3 * RES, 3)
    assert red(sample(SampleOptions(network, seeds="7", out=Path("one.png")))) == expected_red(7)
    sample(SampleOptions(network, seeds="7", out=Path("folder"), format="webp"))
    assert red(Path("folder/seed0007.webp")) == expected_red(7)
    within = sample(SampleOptions(network, seeds="7", grid="1x1", out=Path("folder")))
    assert within == Path("folder/network-000001.000-seeds7.png")
    long = ",".join(str(seed) for seed in range(1000, 1100))
    assert sample(SampleOptions(network, seeds=long, grid="10x10")).name == "network-000001.000-seeds-100.png"


def test_random_noise_belongs_to_the_seed_not_to_the_company(network: Path) -> None:
    sample(SampleOptions(network, seeds="1,2,3", noise="random", out=Path("together")))
    sample(SampleOptions(network, seeds="2", noise="random", out=Path("alone")))
    files = [Path(folder, "seed0002.png").read_bytes() for folder in ("together", "alone")]
    assert files[0] == files[1]
    assert files[0] != Path("together/seed0001.png").read_bytes()


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Give a network of three classes with names, one of which looks like a number."""
    path = tmp_path / "c.safetensors"
    save_network(path, Generator(c_dim=3, class_w_avg=True), metadata={"classes": json.dumps(["cats", "0", "dogs"])})
    return path


@pytest.mark.parametrize(("asked", "number"), [("2", 2), ("dogs", 2), ("cats", 0), ("0", 1), ("1", 1)])
def test_a_class_by_name_or_number(labelled: Path, asked: str, number: int) -> None:
    assert sample(SampleOptions(labelled, seeds="3", class_name=asked)) == Path(f"samples/c-class{number}")
    assert red(Path(f"samples/c-class{number}/seed0003.png")) == expected_red(3, label=number)


def test_all_classes_have_a_row_each_of_the_same_seeds(labelled: Path) -> None:
    path = sample(SampleOptions(labelled, seeds="4,2", class_name="all", grid="3x3", batch=4))
    assert path == Path("samples/c-classes-seeds4,2.png")
    cells = np.asarray(Image.open(path))[::RES, ::RES, 0].tolist()
    assert cells == [[expected_red(4, label=k), expected_red(2, label=k), 0] for k in range(3)]
    without_seeds = sample(SampleOptions(labelled, class_name="all", grid="2x3", noise="random"))
    cells = np.asarray(Image.open(without_seeds))[::RES, ::RES, 0].tolist()
    assert cells == [[expected_red(0, label=k), expected_red(1, label=k)] for k in range(3)]
    green = np.asarray(Image.open(without_seeds))[:, :, 1]
    assert (green[:RES] == green[RES : 2 * RES]).all(), "a seed's noise is the same in each row"
    for options, message in (
        (SampleOptions(labelled, class_name="all", grid="3x4"), "--grid 3x4: .* each of the 3 classes; try 3x3"),
        (SampleOptions(labelled, class_name="all", seeds="0-4"), "--grid missing: .* try 5x3"),
        (SampleOptions(labelled, class_name="all", seeds="0-4", grid="4x3"), "4 places in a row for 5 seeds"),
    ):
        with pytest.raises(UserError, match=message):
            sample(options)


def test_a_label_of_numbers(tmp_path: Path, labelled: Path) -> None:
    network = tmp_path / "v.safetensors"
    save_network(network, Generator(c_dim=2), metadata={"classes": "null"})
    assert sample(SampleOptions(network, seeds="1", label="7, -0.5")) == Path("samples/v-label7,-0.5")
    assert red(Path("samples/v-label7,-0.5/seed0001.png")) == expected_red(1, label=-0.5)
    long = "0.1" + "0" * 300 + ",1"
    assert len(sample(SampleOptions(network, seeds="1", label=long)).name) < 60
    sample(SampleOptions(labelled, seeds="1", label="0.5,0.5,0", out=Path("mixture")))
    assert red(Path("mixture/seed0001.png")) == expected_red(1, label=0.5)
    for label in ("1", "1,2,3", "1,x", "1,nan", "1e39,0", ""):
        with pytest.raises(UserError, match=f"--label {label}: expected 2 finite numbers"):
            sample(SampleOptions(network, label=label))
    for options, message in (
        (
            SampleOptions(network),
            "--label missing: this network draws labels of 2 numbers; give them as --label 0.1,-0.7$",
        ),
        (SampleOptions(network, class_name="1"), "--class 1: this network draws labels of 2 numbers"),
        (SampleOptions(network, class_name="1", label="1,2"), "--label 1,2: there is --class 1 already"),
    ):
        with pytest.raises(UserError, match=message):
            sample(options)


def test_a_class_that_is_not_there(labelled: Path, tmp_path: Path) -> None:
    for wrong in (None, "3", "-1", "dog", "¹", "1" * 5000):
        found = wrong or "missing"
        with pytest.raises(UserError, match=f"--class {found}: .* 3 classes; expected 0 to 2, or all, or a name: cats"):
            sample(SampleOptions(labelled, class_name=wrong))
    with pytest.raises(UserError, match="did you mean 'dogs'"):
        sample(SampleOptions(labelled, class_name="dog"))
    nameless = tmp_path / "n.safetensors"  # as weights from elsewhere are
    save_network(nameless, Generator(c_dim=3))
    sample(SampleOptions(nameless, seeds="0", class_name="2", out=Path("two")))
    assert red(Path("two/seed0000.png")) == expected_red(0, label=2)
    with pytest.raises(UserError, match=r"--class cats: .* expected 0 to 2, or all$"):
        sample(SampleOptions(nameless, class_name="cats"))
    for damaged in ("[", '["one"]', "[1, 2, 3]", "[" * 100_000):
        save_network(nameless, Generator(c_dim=3), metadata={"classes": damaged})
        with pytest.raises(UserError, match="names of its classes in the header are damaged"):
            sample(SampleOptions(nameless, class_name="2"))


def test_the_centre_of_truncation(labelled: Path, tmp_path: Path) -> None:
    options = SampleOptions(labelled, seeds="0", class_name="2", trunc=0.0)
    assert red(sample(dataclasses.replace(options, out=Path("default.png")))) == 255
    assert red(sample(dataclasses.replace(options, trunc_center="class", out=Path("class.png")))) == 255
    assert red(sample(dataclasses.replace(options, trunc_center="all", out=Path("all.png")))) == 0
    without = tmp_path / "w.safetensors"
    save_network(without, Generator(c_dim=3))
    with pytest.raises(UserError, match="--trunc-center class: this network keeps no means of classes"):
        sample(SampleOptions(without, class_name="0", trunc_center="class"))


def test_mistakes(network: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    save_network(tmp_path / "d.safetensors", Discriminator())
    mistakes = {
        "--class 0: this network was trained without labels": SampleOptions(network, class_name="0"),
        "--label 1: this network was trained without labels": SampleOptions(network, label="1"),
        "4 places for 5 seeds": SampleOptions(network, seeds="0-4", grid="2x2"),
        "expected COLUMNSxROWS": SampleOptions(network, grid="4"),
        "--batch 0": SampleOptions(network, batch=0),
        "--trunc-cutoff -1": SampleOptions(network, trunc_cutoff=-1),
        "holds a Discriminator; expected a generator": SampleOptions(tmp_path / "d.safetensors"),
        "no such file": SampleOptions(tmp_path / "absent.safetensors"),
        r"\.gif found, expected \.png or \.webp": SampleOptions(network, out=Path("a.gif")),
        "cannot make the folder file": SampleOptions(network, out=Path("file/folder")),
    }
    if not torch.cuda.is_available():
        mistakes["no CUDA device here"] = SampleOptions(network, device="cuda")
    for message, options in mistakes.items():
        with pytest.raises(UserError, match=message):
            sample(options)
    assert not Path("samples").exists(), "a refused command leaves nothing behind"


def test_the_script_and_the_command_answer_alike(root: Path) -> None:
    for command in ([root / "launch" / "sample.py"], ["-m", "stylepipe", "sample"]):
        done = subprocess.run(
            [sys.executable, *command, "absent.safetensors"], check=False, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr == "error: absent.safetensors: no such file; expected a network-<kimg>.safetensors\n"
        assert done.stdout == ""
