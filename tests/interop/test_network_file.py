"""Network files: what is saved comes back, and everything else gets one clear sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import stylepipe
from stylepipe.errors import UserError
from stylepipe.interop import network_file
from stylepipe.interop.network_file import license_notice, load_network, read_header, save_network


class Generator(nn.Module):
    """The least that a generator is: parameters that are views of one arena, a buffer, a config."""

    def __init__(self, z_dim: int = 4, res: int = 8) -> None:
        super().__init__()
        self.config = {"z_dim": z_dim, "res": res}
        self.z_dim, self.res = z_dim, res
        pixels = 3 * res * res
        arena = torch.randn(pixels * z_dim + pixels)
        self.weight = nn.Parameter(arena[: pixels * z_dim].view(pixels, z_dim))
        self.bias = nn.Parameter(arena[pixels * z_dim :])
        self.register_buffer("w_avg", torch.randn(z_dim))

    def forward(self, z: Tensor) -> Tensor:
        img: Tensor = torch.tanh(nn.functional.linear(z + self.w_avg, self.weight, self.bias))
        return img.view(-1, 3, self.res, self.res)


STUB = f"{__name__.rpartition('.')[2]}.Generator"


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(network_file.NETWORKS, STUB, f"{__name__}:Generator")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "network-000001.000.safetensors"
    save_network(path, Generator(), metadata={"images_seen": "1000"})
    return path


def test_a_network_comes_back_to_the_bit_ready_to_use(tmp_path: Path) -> None:
    G = Generator(z_dim=6)
    path = tmp_path / "a.safetensors"
    save_network(path, G, metadata={"images_seen": "64", "data": "faces"})
    before = torch.get_rng_state()
    loaded = stylepipe.load_network(path)
    assert torch.equal(torch.get_rng_state(), before), "loading must not disturb anybody's random numbers"
    assert type(loaded) is Generator
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    z = torch.randn(2, 6)
    assert torch.equal(loaded(z), G(z))
    header = read_header(path)
    assert header.class_name == STUB
    assert header.config == {"z_dim": 6, "res": 8}
    assert header.metadata["images_seen"] == "64"
    assert header.metadata["data"] == "faces"
    assert header.metadata["stylepipe_version"] == stylepipe.__version__


def test_saving_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    G = Generator().train()
    storage = G.weight.untyped_storage().data_ptr()
    save_network(tmp_path / "a.safetensors", G)
    assert G.training
    assert G.weight.requires_grad
    assert G.weight.untyped_storage().data_ptr() == G.bias.untyped_storage().data_ptr() == storage


def test_other_networks_stand_beside_the_main_one(tmp_path: Path) -> None:
    main, G, D = Generator(), Generator(z_dim=6), Generator(res=4)
    path = tmp_path / "a.safetensors"
    save_network(path, main, beside={"G": G, "D": D}, metadata={"images_seen": "64"})
    for name, network in {None: main, "G": G, "D": D}.items():
        z = torch.randn(2, network.z_dim)
        assert torch.equal(load_network(path, name=name)(z), network(z)), name
    header = read_header(path)
    assert {name: other.config for name, other in header.beside.items()} == {"G": G.config, "D": D.config}
    assert header.beside["D"].class_name == STUB
    assert header.beside["D"].metadata == header.metadata
    assert header.metadata["images_seen"] == "64"
    with safe_open(str(path), framework="np") as file:
        assert file.metadata()["format_version"] == "2"
        assert {"weight", "G/weight", "D/w_avg"} <= set(file.keys())


def test_a_network_alone_is_written_in_the_format_that_older_versions_read(tmp_path: Path, saved: Path) -> None:
    with safe_open(str(saved), framework="np") as file:
        fields = {"format", "format_version", "stylepipe_version", "class", "config", "images_seen"}
        assert set(file.metadata()) == fields
        assert file.metadata()["format_version"] == "1"
    assert read_header(saved).beside == {}


def test_the_main_network_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_network(path, Generator(), beside={"D": Generator()})
    opened = []

    def open_and_watch(*args: Any, **kwargs: Any) -> Any:
        opened.append(Watched(safe_open(*args, **kwargs)))
        return opened[-1]

    monkeypatch.setattr(network_file, "safe_open", open_and_watch)
    load_network(path)
    assert opened[0].read == {"weight", "bias", "w_avg"}
    load_network(path, name="D")
    assert opened[1].read == {"D/weight", "D/bias", "D/w_avg"}


class Watched:
    """A safetensors file that notes which tensors are asked for."""

    def __init__(self, file: Any) -> None:
        self.file, self.read = file, set[str]()

    def __enter__(self) -> Watched:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> list[str]:
        names: list[str] = self.file.keys()
        return names

    def get_tensor(self, name: str) -> Tensor:
        self.read.add(name)
        tensor: Tensor = self.file.get_tensor(name)
        return tensor


def test_a_network_that_the_file_does_not_hold_is_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UserError, match="no network 'D' in it; it holds one only"):
        load_network(saved, name="D")
    save_network(saved, Generator(), beside={"G": Generator()})
    with pytest.raises(UserError, match="no network 'D' in it; besides the main one it holds G"):
        load_network(saved, name="D")


def test_the_licence_is_told_where_one_is_recorded(tmp_path: Path, saved: Path) -> None:
    assert license_notice(saved, read_header(saved)) is None
    save_network(saved, Generator(), metadata={"license": "CC-BY-NC-4.0"})
    assert license_notice(saved, read_header(saved)) == f"network {saved.name} is under CC-BY-NC-4.0"


def test_any_safetensors_reader_opens_the_file(saved: Path) -> None:
    with safe_open(str(saved), framework="np") as file:
        assert set(file.keys()) == {"weight", "bias", "w_avg"}
        assert json.loads(file.metadata()["config"]) == {"z_dim": 4, "res": 8}


def test_no_file_a_folder_and_other_kinds_of_file(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_network(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match=r"a folder; name a file in it, such as .*network-000001\.000\.safetensors"):
        load_network(tmp_path)
    others = {"text.txt": b"hello, I am a text of some length\n" * 9, "empty": b"", "short": b"abc", "json": b"{}"}
    others["pickle.pt"] = b"PK\x03\x04" + bytes(500)
    others["claims"] = (20).to_bytes(8, "little") + b"{ no json at all  }}" + bytes(40)
    others["list"] = (4).to_bytes(8, "little") + b"{[]}"
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a network file"):
            load_network(tmp_path / name)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.jpg")
    with pytest.raises(UserError, match="not a network file"):
        load_network(tmp_path / "photo.jpg")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a network written by stylepipe"):
        load_network(tmp_path / "other.safetensors")


def test_a_file_cut_short_anywhere_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for size in range(0, len(content), 97):
        saved.write_bytes(content[:size])
        with pytest.raises(UserError, match="cut short" if size >= 10 else "not a network file"):
            load_network(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="longer than its header says"):
        load_network(saved)


def rewrite(path: Path, tensors: dict[str, Tensor | None] | None = None, **fields: str) -> None:
    """Change tensors (None removes) and header strings of a network file."""
    with safe_open(str(path), framework="pt") as file:
        every: dict[str, Tensor | None] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata() | fields
    every |= tensors or {}
    save_file({name: tensor for name, tensor in every.items() if tensor is not None}, path, metadata=header)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": "3", "stylepipe_version": "9.1"}, r"format version 3, written by stylepipe 9\.1.*up to 2"),
        ({"format_version": "new"}, "format version new"),
        ({"class": "os.system"}, r"holds a 'os\.system'; this stylepipe knows stylegan2\.Generator"),
        ({"config": "{"}, "settings in the header are damaged"),
        ({"beside": '{"D": {"class": "os.system"}}'}, "settings in the header are damaged"),
        ({"beside": '{"D": {"class": "os.system", "config": {}}}'}, r"holds a 'os\.system'"),
        ({"config": '{"z_dim": 4, "colour": 1}'}, "do not make a .*colour"),
    ],
)
def test_headers_that_cannot_be_used(saved: Path, fields: dict[str, str], message: str) -> None:
    rewrite(saved, **fields)
    with pytest.raises(UserError, match=message):
        load_network(saved)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"bias": None}, "tensor bias is missing"),
        ({"bias": torch.zeros(7)}, r"tensor bias has another shape: \[7\] found, \[192\] expected"),
        ({"extra": torch.zeros(1)}, "tensor extra has no place"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, tensors: dict[str, Tensor | None], message: str) -> None:
    rewrite(saved, tensors)
    with pytest.raises(UserError, match=message):
        load_network(saved)


def test_a_full_disk_leaves_nothing_half_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fill_up(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(network_file, "save_file", fill_up)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        save_network(saved, Generator())
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_importing_stylepipe_does_not_import_torch() -> None:
    code = "import sys, stylepipe; assert stylepipe.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
