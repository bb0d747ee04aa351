"""Fine-tuning as a user runs it: `stylepipe train --init`."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from stylepipe.cli.initial import origin_of, settings_of, start_from
from stylepipe.cli.main import main
from stylepipe.cli.options import parse
from stylepipe.config import Config, LossConfig
from stylepipe.datasets.drawn import draw_face
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.errors import UserError
from stylepipe.interop.network_file import load_network, read_header, save_network
from stylepipe.kernels import downsample2d, upsample2d
from stylepipe.networks.layers import resample_filter
from stylepipe.networks.stylegan2 import Discriminator, Generator
from stylepipe.presets import resolve, with_precision
from stylepipe.recipes.gan import GANRecipe

ROOT = Path(__file__).resolve().parents[2]
COMMON = [
    *("--batch-size", "8", "--batch-gpu", "4", "--tracker", "none", "--seed", "3", "--loss.r1-interval", "4"),
    *("--tick-kimg", "0.008", "--grid-kimg", "0.016", "--snapshot-kimg", "0.016"),
]
CHANNELS = {"channel_base": 512, "channel_max": 16}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared folders of the same drawn faces: `16` and `32` px."""
    place = tmp_path_factory.mktemp("photographs")
    (place / "faces").mkdir()
    for index in range(16):
        draw_face(index, 32).save(place / "faces" / f"{index:02d}.png")
    for res in (16, 32):
        prepare(place / "faces", place / str(res), Preparation(res), workers=1, progress=False)
    return place


@pytest.fixture(scope="module")
def source(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network file of a run of 32 images, the last grid of which lies beside it."""
    out = tmp_path_factory.mktemp("source") / "run"
    network = ["--network.channel-base", "512", "--network.channel-max", "16", "--network.z-dim", "16"]
    network += ["--network.w-dim", "24", "--network.mapping-layers", "3", "--network.mbstd-channels", "2"]
    arguments = ["--data", str(photographs / "16"), "--res", "16", "--out", str(out), "--kimg", "0.032", *network]
    assert main(["train", *arguments, *COMMON]) == 0
    return out / "network-000000.032.safetensors"


def tune(source: Path, photographs: Path, out: Path, *more: str, kimg: float = 0.016, data: str = "16") -> list[str]:
    common = ["--init", str(source), "--data", str(photographs / data), "--out", str(out), "--kimg", str(kimg)]
    return ["train", *common, *COMMON, *more]


def grid(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def state_tensors(out: Path, kimg: str) -> dict[str, torch.Tensor]:
    return load_file(out / f"state-{kimg}" / "state.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def recipe_for(path: Path, c_dim: int = 0, **changes: Any) -> GANRecipe:
    """Make the recipe that training from `path` would."""
    config = dataclasses.replace(parse(["--init", str(path), "--batch-size", "8"]), **changes)
    labels = torch.eye(c_dim)
    config = with_precision(resolve(config, 1), "fp32")
    return GANRecipe(config, torch.device("cpu"), c_dim, lambda rows: labels[rows], max(c_dim, 1))


@pytest.fixture(scope="module")
def tuned(source: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert main(tune(source, photographs, out, kimg=0.032)) == 0
    return out


def test_the_first_grid_shows_what_the_network_file_makes(source: Path, tuned: Path) -> None:
    last, first = source.parent / "grids" / "000000.032.png", tuned / "grids" / "000000.000.png"
    assert np.array_equal(grid(last), grid(first))
    assert not np.array_equal(grid(first), grid(tuned / "grids" / "000000.032.png"))


def test_settings_come_from_the_file_and_the_preset(source: Path, tuned: Path) -> None:
    config = yaml.safe_load((tuned / "config.yaml").read_text())
    assert (config["init"], config["preset"], config["res"]) == (str(source), "transfer", 16)
    network = config["network"]
    assert (network["z_dim"], network["w_dim"], network["mapping_layers"], network["mbstd_channels"]) == (16, 24, 3, 2)
    assert (network["channel_base"], network["channel_max"]) == (512, 16)
    assert (config["augment"], config["aug"]["speed_kimg"]) == ("ada", 100)
    assert config["ema"] == {"kimg": pytest.approx(8 * 2.5 / 32), "decay": None, "rampup": 0, "posthoc_kimg": 1}
    assert f"starting from {source}: G and its average and D" in (tuned / "log.txt").read_text()


def test_what_the_user_says_wins_over_the_file(source: Path, tmp_path: Path) -> None:
    flags = ["--init", str(source), "--network.conv-clamp", "100", "--network.mbstd-group-size", "2"]
    network = parse(flags).network
    assert (network.conv_clamp, network.mbstd_group_size, network.z_dim) == (100, 2, 16)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"network": {"conv_clamp": 7.0}, "res": 32, "init": str(source)}))
    config = parse(["--config", str(file), "--seed", "5"])
    assert (config.network.conv_clamp, config.res, config.seed, config.network.w_dim) == (7, 32, 5, 24)


def test_its_networks_say_where_they_come_from(source: Path, photographs: Path, tuned: Path) -> None:
    header = read_header(tuned / "network-000000.032.safetensors")
    assert set(header.beside) == {"G", "D"}
    assert header.metadata["derived_from"] == source.name
    assert "license" not in header.metadata
    assert "derived_from" not in read_header(source).metadata


def test_a_licence_is_told_and_carried_on(source: Path, photographs: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "imported.safetensors"
    save_network(path, load_network(source), metadata={"license": "CC-BY-NC-4.0", "data": "elsewhere"})
    out = tmp_path / "run"
    assert main(tune(path, photographs, out)) == 0
    said = capsys.readouterr().out
    assert "network imported.safetensors is under CC-BY-NC-4.0" in said
    assert f"starting from {path}: the averaged G; it has no D, so that one is new" in said
    again = ["train", "--config", str(out / "config.yaml"), "--resume", str(out / "state-000000.016")]
    assert main([*again, "--out", str(tmp_path / "branch"), "--kimg", "0.024"]) == 0
    for network in (out / "network-000000.016.safetensors", tmp_path / "branch" / "network-000000.024.safetensors"):
        metadata = read_header(network).metadata
        assert (metadata["license"], metadata["derived_from"]) == ("CC-BY-NC-4.0", "imported.safetensors")
        assert metadata["data"] == "faces"


def test_going_on_needs_nothing_from_the_file_but_its_header(
    source: Path, photographs: Path, tuned: Path, tmp_path: Path, capsys: Any
) -> None:
    """The state in --out wins: the same command goes on where it was, to the bit."""
    out = tmp_path / "run"
    assert main(tune(source, photographs, out)) == 0
    first = (out / "grids" / "000000.000.png").stat().st_mtime_ns
    capsys.readouterr()
    assert main(tune(source, photographs, out, kimg=0.032)) == 0
    said = capsys.readouterr().out
    assert "going on from 0.016" in said
    assert "starting from" not in said
    assert (out / "grids" / "000000.000.png").stat().st_mtime_ns == first
    assert_same(state_tensors(out, "000000.032"), state_tensors(tuned, "000000.032"))


def test_its_config_file_repeats_it(tuned: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(tuned / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert_same(state_tensors(tmp_path / "again", "000000.032"), state_tensors(tuned, "000000.032"))


@pytest.mark.slow
def test_a_killed_fine_tuning_goes_on_to_the_bit(source: Path, photographs: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    script = [sys.executable, str(ROOT / "launch" / "train.py")]
    command = [*script, *tune(source, photographs, out, kimg=0.032)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (out / "state-000000.016").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    if (out / "state-000000.032").exists():
        pytest.skip("the run was over before it could be killed")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same(state_tensors(out, "000000.032"), state_tensors(tuned, "000000.032"))


def test_a_run_may_leave_g_and_d_out_of_its_network_files(source: Path, photographs: Path, tmp_path: Path) -> None:
    assert main(tune(source, photographs, tmp_path / "run", "--no-snapshot-with-d")) == 0
    path = tmp_path / "run" / "network-000000.016.safetensors"
    assert read_header(path).beside == {}
    recipe = recipe_for(path)
    fresh = {name: tensor.clone() for name, tensor in recipe.D.state_dict().items()}
    start_from(recipe, str(path), None)
    assert_same(recipe.D.state_dict(), fresh)
    assert_same(recipe.G.state_dict(), load_network(path).state_dict())


def test_g_its_average_and_d_each_start_from_their_like(source: Path) -> None:
    recipe = recipe_for(source)
    assert start_from(recipe, str(source), None) == [f"starting from {source}: G and its average and D"]
    for network, name in ((recipe.G_ema, None), (recipe.D, "D")):
        assert_same(network.state_dict(), load_network(source, name=name).state_dict())
    own, average = load_network(source, name="G"), load_network(source)
    assert not torch.equal(own.synthesis.b16.conv1.weight, average.synthesis.b16.conv1.weight)
    assert torch.equal(recipe.G.synthesis.b16.conv1.weight, own.synthesis.b16.conv1.weight)
    assert recipe.G.mapping.w_avg is recipe.G_ema.mapping.w_avg
    assert all(p.requires_grad for network in recipe.networks.values() for p in network.parameters())


def test_the_mean_path_length_starts_where_the_generator_is(source: Path) -> None:
    found = []
    for batch_gpu in (2, 4):
        recipe = recipe_for(source, batch_gpu=batch_gpu)
        start_from(recipe, str(source), None)
        found.append(recipe.pl_mean)
    assert found[0] > 0
    assert torch.equal(*found)
    recipe = recipe_for(source, loss=LossConfig(pl_weight=0))
    start_from(recipe, str(source), None)
    assert recipe.pl_mean == 0


def test_growing_starts_with_the_old_image_and_the_old_verdict(
    source: Path, photographs: Path, tmp_path: Path, capsys: Any
) -> None:
    recipe = recipe_for(source, res=32)
    lines = start_from(recipe, str(source), None)
    assert lines[1:] == ["resolution: 16 px there, 32 px here"]
    z, img = torch.randn(4, 16), torch.randn(4, 3, 32, 32)
    assert torch.equal(recipe.G_ema(z), upsample2d(load_network(source)(z), resample_filter()))
    old = load_network(source, name="D")
    torch.testing.assert_close(recipe.D(img), old(downsample2d(img, resample_filter())), rtol=1e-4, atol=1e-4)
    assert main(tune(source, photographs, tmp_path / "run", "--res", "32", data="32")) == 0
    assert "resolution: 16 px there, 32 px here" in capsys.readouterr().out


def test_labels_of_the_same_names_are_kept_and_others_made_anew(tmp_path: Path) -> None:
    G = Generator(16, z_dim=16, w_dim=24, c_dim=2, mapping_layers=3, **CHANNELS)
    D = Discriminator(16, c_dim=2, **CHANNELS)
    torch.nn.init.normal_(G.mapping.embed.weight)  # other weights than a new network's of the same seed
    path = tmp_path / "classes.safetensors"

    def kept(c_dim: int, classes: list[str] | None) -> bool:
        recipe = recipe_for(path, c_dim)
        lines = start_from(recipe, str(path), classes)
        assert len(lines) == 1 or lines[1].startswith(f"labels: 2 there, {c_dim} here")
        equal = c_dim == 2 and torch.equal(recipe.G.mapping.embed.weight, G.mapping.embed.weight)
        assert equal == (len(lines) == 1)
        return equal

    save_network(path, G, beside={"D": D}, metadata={"classes": '["cats", "dogs"]'})
    assert kept(2, ["cats", "dogs"])
    assert not kept(2, ["dogs", "cats"])
    assert not kept(2, None), "vectors"
    assert not kept(3, ["cats", "dogs", "foxes"])
    assert not kept(0, None)
    save_network(path, G, beside={"D": D})
    assert kept(2, ["dogs", "cats"]), "imported: nothing is known of their names"


def test_parts_of_equal_labels_that_are_left_out_or_new_are_told(tmp_path: Path) -> None:
    G = Generator(16, z_dim=16, w_dim=24, c_dim=2, mapping_layers=3, class_w_avg=True, **CHANNELS)
    D, path = Discriminator(16, c_dim=2, conditioning="both", **CHANNELS), str(tmp_path / "classes.safetensors")

    def told(class_w_avg: bool, conditioning: str) -> list[str]:
        network = dataclasses.replace(
            parse(["--init", path]).network, d_conditioning=conditioning, class_w_avg=class_w_avg
        )
        loss = LossConfig(acgan_weight=float(conditioning != "projection"))
        return start_from(recipe_for(Path(path), 2, cond=True, network=network, loss=loss), path, ["cats", "dogs"])[1:]

    save_network(path, G, beside={"D": D})
    assert told(True, "both") == []
    assert told(False, "projection") == [
        "left out: mean styles of classes of the file, which --network.class-w-avg would keep",
        "left out: D's auxiliary classifier of the file, which --network.d-conditioning aux or both, with "
        "--loss.acgan-weight would keep",
    ]
    (line,) = told(True, "aux")
    assert line.startswith("left out: D's projection of labels")
    plain = Generator(16, z_dim=16, w_dim=24, c_dim=2, mapping_layers=3, **CHANNELS)
    save_network(path, plain, beside={"D": Discriminator(16, c_dim=2, **CHANNELS)})
    assert told(False, "projection") == []
    assert told(True, "both") == [
        "new: mean styles of classes, which the file has not",
        "new: D's auxiliary classifier, which the file has not",
    ]


def test_what_a_file_is_derived_from_is_kept(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_network(path, load_network(source), metadata={"derived_from": "a.pkl", "license": "MIT"})
    assert origin_of(str(path)) == {"derived_from": "b.safetensors < a.pkl", "license": "MIT"}


def test_going_on_without_init_says_what_is_missing(source: Path, tuned: Path, tmp_path: Path, capsys: Any) -> None:
    """Before any photograph is opened."""
    arguments = ["train", "--data", str(tmp_path / "absent"), "--out", str(tuned), "--res", "16", *COMMON]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "--network.z-dim 512: " in error
    assert f"is of a run with --network.z-dim 16; give --init {source}, as that run had, " in error


def test_freezing_keeps_the_first_levels_of_the_file(source: Path, photographs: Path, tmp_path: Path) -> None:
    assert main(tune(source, photographs, tmp_path / "run", "--freeze-d", "1")) == 0
    before = load_network(source, name="D").state_dict()
    after = load_network(tmp_path / "run" / "network-000000.016.safetensors", name="D").state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == name.startswith("b16."), name


def test_the_settings_of_a_file_are_complete(tmp_path: Path) -> None:
    G = Generator(8, conv_clamp=64, architecture="orig", **CHANNELS)
    D = Discriminator(8, architecture="skip", mbstd_group_size=2, **CHANNELS)
    path = tmp_path / "a.safetensors"
    save_network(path, G, beside={"D": D})
    assert settings_of(str(path)) == {
        "res": 8,
        "network": {
            "z_dim": 512,
            "w_dim": 512,
            "mapping_layers": 8,
            "conv_clamp": 64,
            **CHANNELS,
            "g_architecture": "orig",
            "d_architecture": "skip",
            "mbstd_group_size": 2,
            "mbstd_channels": 1,
        },
    }
    assert isinstance(parse(["--init", str(path)]), Config)


MISTAKES = {
    "absent": (["--init", "absent.safetensors"], "absent.safetensors: no such file"),
    "truncated": (["--init", "{truncated}"], "truncated.safetensors: cut short"),
    "no generator": (
        ["--init", "{d_only}"],
        "main network is a stylegan2.Discriminator; expected a stylegan2.Generator",
    ),
    "mixed": (["--init", "{mixed}"], "its D has channel_max 8, its main network 16; expected networks of one training"),
    "z_dim": (["--network.z-dim", "32"], "--network.z-dim 32: --init {source} has 16"),
    "channels": (["--network.channel-max", "32"], "--network.channel-max 32: --init {source} has 16"),
    "layers": (["--network.mapping-layers", "8"], "--network.mapping-layers 8: --init {source} has 3"),
    "architecture": (["--network.d-architecture", "skip"], "--network.d-architecture skip: --init {source} has resnet"),
    "too large": (["--res", "128"], "--res 128: the discriminator to start from would have 4 feature maps there"),
    "resume": (["--resume", "state-000000.016"], "a state holds networks already; give one of them"),
    "freeze grown": (
        ["--res", "32", "--freeze-d", "1"],
        "--freeze-d 1: at --res 32 the discriminator has first layers",
    ),
    "freeze shrunk": (["--res", "8", "--freeze-d", "1"], "--freeze-d 1: at --res 8 the discriminator has first layers"),
    "names": (["--init", "{names}"], "names.safetensors: the names of its classes in the header are damaged"),
    "convert": (["--init", "{foreign}"], "a.pkl OUT.safetensors makes one"),
    "freeze all": (["--freeze-d", "3"], "--freeze-d 3: expected at most 2, the levels above 4 px at --res 16"),
    "freeze nothing": (
        ["--init", "{no_d}", "--freeze-d", "1"],
        "has no discriminator, and a new one has learnt nothing",
    ),
    "empty": (["--init", ""], "a folder; expected network-"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_message(case: str, source: Path, photographs: Path, tmp_path: Path, capsys: Any) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("truncated", "d_only", "mixed", "no_d")}
    files |= {"names": tmp_path / "names.safetensors", "foreign": tmp_path / "a.pkl"}
    files["foreign"].write_bytes(b"\x80\x04}.")
    save_network(files["names"], Generator(16, c_dim=2, z_dim=16, **CHANNELS), metadata={"classes": "oops"})
    files["truncated"].write_bytes(source.read_bytes()[:-10])
    save_network(files["d_only"], Discriminator(16, **CHANNELS))
    G = Generator(16, z_dim=16, **CHANNELS)
    save_network(files["mixed"], G, beside={"D": Discriminator(16, channel_base=512, channel_max=8)})
    save_network(files["no_d"], G)
    more, message = MISTAKES[case]
    more = [argument.format(source=source, **files) for argument in more]
    assert main(tune(source, photographs, tmp_path / "run", *more)) == 2
    captured = capsys.readouterr()
    assert message.format(source=source) in captured.out + captured.err
    assert not (tmp_path / "run").exists()


def test_a_header_without_a_setting_is_refused(tmp_path: Path) -> None:
    G, path = Generator(8, **CHANNELS), tmp_path / "a.safetensors"
    del G.config["w_dim"]
    save_network(path, G)
    with pytest.raises(UserError, match="its header says nothing of w_dim"):
        settings_of(str(path))


def test_new_networks_have_nothing_to_freeze(photographs: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["train", "--data", str(photographs / "16"), "--res", "16", "--out", str(tmp_path / "run"), *COMMON]
    assert main([*arguments, "--freeze-d", "1"]) == 2
    assert "new networks have learnt nothing to keep; expected --init NETWORK" in capsys.readouterr().err
