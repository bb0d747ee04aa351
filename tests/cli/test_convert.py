"""`stylepipe convert`: files of other projects in, network files out, and the licence that goes along."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_checkpoints import golden, official_file, rosinality_checkpoint
from PIL import Image

from stylepipe.cli.main import run
from stylepipe.images import to_uint8
from stylepipe.interop.network_file import load_network, read_header, save_network
from stylepipe.networks.stylegan2 import Discriminator


class Terminal(io.StringIO):
    """A standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _without_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.fixture
def official(tmp_path: Path) -> str:
    return official_file(tmp_path / "ffhq.pkl", "skip_resnet_32").name


@pytest.fixture
def theirs(tmp_path: Path) -> str:
    torch.save(rosinality_checkpoint(), tmp_path / "theirs.pt")
    return "theirs.pt"


def test_an_official_file_becomes_a_network_file(official: str, capsys: pytest.CaptureFixture[str]) -> None:
    license = "the NVIDIA Source Code License"
    assert run("convert", [official, "ffhq.safetensors", "--license", license]) == 0
    said = capsys.readouterr()
    assert said.out == "ffhq.safetensors\n"
    assert "non-commercial" in said.err
    header = read_header("ffhq.safetensors")
    expected = {"license": license, "derived_from": "ffhq.pkl", "imported_from": "NVIDIA's StyleGAN2"}
    assert expected.items() <= header.metadata.items()
    assert header.metadata["num_fp16_res"] == "4"
    assert set(header.beside) == {"G", "D"}
    _, arrays = golden("skip_resnet_32")
    img = load_network("ffhq.safetensors").synthesis(torch.from_numpy(arrays["ws"]), noise_mode="const")
    assert np.linalg.norm(img.numpy() - arrays["img_noise_const"]) < 1e-5 * np.linalg.norm(arrays["img_noise_const"])


def test_an_imported_network_makes_images_on_a_cpu_and_shows_its_licence(
    official: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("convert", [official, "a.safetensors", "--license", "CC-BY-NC-4.0"])
    capsys.readouterr()
    assert run("sample", ["a.safetensors", "--seeds", "3", "--out", "a.png", "--device", "cpu"]) == 0
    assert capsys.readouterr().err.splitlines() == ["network a.safetensors is under CC-BY-NC-4.0"]
    assert np.asarray(Image.open("a.png")).shape == (32, 32, 3)


def test_a_network_without_a_licence_is_sampled_without_a_word(theirs: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("convert", [theirs, "a.safetensors", "--license", "MIT"])
    save_network("own.safetensors", load_network("a.safetensors"))
    capsys.readouterr()
    assert run("sample", ["own.safetensors", "--seeds", "3", "--out", "a.png"]) == 0
    assert capsys.readouterr().err == ""


def test_without_a_terminal_the_licence_must_be_given(theirs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", [theirs, "a.safetensors"]) == 2
    assert "such as --license MIT" in capsys.readouterr().err
    assert not Path("a.safetensors").exists()


def test_on_a_terminal_it_is_asked_for(
    theirs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("  BSD-2-Clause\n"))
    assert run("convert", [theirs, "a.safetensors"]) == 0
    assert "Licence under which you hold these weights" in capsys.readouterr().err
    assert read_header("a.safetensors").metadata["license"] == "BSD-2-Clause"
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    assert run("convert", [theirs, "b.safetensors"]) == 2
    assert not Path("b.safetensors").exists()


def test_there_and_back_again(theirs: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The licence goes along without being told again."""
    assert run("convert", [theirs, "a.safetensors", "--license", "MIT"]) == 0
    assert run("convert", ["a.safetensors", "back.pt", "--to", "rosinality"]) == 0
    assert "network a.safetensors is under MIT" in capsys.readouterr().err
    assert run("convert", ["back.pt", "again.safetensors"]) == 0
    assert "the licence is what back.pt says: MIT" in capsys.readouterr().err
    assert read_header("again.safetensors").metadata["license"] == "MIT"
    assert read_header("again.safetensors").metadata["derived_from"] == "back.pt < a.safetensors < theirs.pt"
    for name in (None, "G", "D"):
        first, again = (load_network(path, name=name).state_dict() for path in ("a.safetensors", "again.safetensors"))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)
    before, after = torch.load("back.pt", weights_only=True), rosinality_checkpoint()
    assert before["g_ema"].keys() == after["g_ema"].keys()


def test_another_licence_than_the_known_one_is_said(theirs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", [theirs, "a.safetensors", "--license", "MIT"]) == 0
    assert "the licence becomes" not in capsys.readouterr().err
    assert run("convert", ["a.safetensors", "b.pt", "--to", "rosinality", "--license", "BSD-2-Clause"]) == 0
    assert "the licence becomes BSD-2-Clause; a.safetensors says MIT" in capsys.readouterr().err
    assert run("convert", ["b.pt", "c.safetensors", "--license", "GPL-3.0"]) == 0
    assert "the licence becomes GPL-3.0; b.pt says BSD-2-Clause" in capsys.readouterr().err
    assert read_header("c.safetensors").metadata["license"] == "GPL-3.0"


def test_what_can_be_refused_at_once_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def read(path: Path) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("stylepipe.cli.convert.import_checkpoint", read)
    assert run("convert", ["a.pkl", "a.safetensors"]) == 2
    assert "such as --license MIT" in capsys.readouterr().err
    assert run("convert", ["a.pkl", "new/a.safetensors", "--license", "MIT"]) == 2
    assert "new/a.safetensors: there is no folder new; make it, or name another" in capsys.readouterr().err


def test_the_same_image_by_whichever_form(official: str) -> None:
    z = torch.randn(2, 32)
    run("convert", [official, "a.safetensors", "--license", "x"])
    run("convert", ["a.safetensors", "a.pt", "--to", "rosinality"])
    run("convert", ["a.pt", "b.safetensors"])
    first, again = (load_network(path) for path in ("a.safetensors", "b.safetensors"))
    assert first.config["conv_clamp"] == 256
    assert torch.equal(to_uint8(first(z)), to_uint8(again(z))), "nothing of it is near the clamp"


def test_mistakes(theirs: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.safetensors").write_text("mine")
    save_network("d.safetensors", Discriminator(8, channel_base=32, channel_max=4))
    mistakes = {
        r"there.safetensors: there already": [theirs, "there.safetensors", "--license", "MIT"],
        r"expected a name that ends in .safetensors": [theirs, "a.pt"],
        r"expected a name that ends in .pt": [theirs, "a.safetensors", "--to", "rosinality"],
        r"a network file already; to another form": ["there.safetensors", "a.safetensors"],
        r"cannot read absent.pkl: No such file": ["absent.pkl", "a.safetensors", "--license", "MIT"],
        r"cannot read .: Is a directory": [".", "a.safetensors"],
        r"--license '': expected one line": [theirs, "a.safetensors", "--license", ""],
        r"--license 'a\nb': expected one line": [theirs, "a.safetensors", "--license", "a\nb"],
        r"theirs.pt OUT.safetensors makes one": [theirs, "a.pt", "--to", "rosinality"],
        r"holds a stylegan2.Discriminator; expected a generator": ["d.safetensors", "a.pt", "--to", "rosinality"],
    }
    for message, argv in mistakes.items():
        assert run("convert", argv) == 2, message
        found = capsys.readouterr().err
        assert message.replace("\n", "\\n") in found
        assert not Path("a.safetensors").exists()
        assert not Path("a.pt").exists()
    assert Path("there.safetensors").read_text() == "mine"
    assert run("convert", [theirs, "there.safetensors", "--license", "MIT", "--overwrite"]) == 0
    assert read_header("there.safetensors").metadata["license"] == "MIT"


def test_a_licence_in_a_file_may_not_play_tricks_on_the_terminal(
    theirs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = rosinality_checkpoint()
    torch.save({"g_ema": content["g_ema"], "license": "\x1b[2Jfree"}, "trick.pt")
    assert run("convert", ["trick.pt", "a.safetensors"]) == 2
    assert "\x1b" not in capsys.readouterr().err
