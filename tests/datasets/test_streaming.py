"""Photographs streamed from plain tars: squares of them, drawn at random, and what cannot be read told."""

from __future__ import annotations

import io
import tarfile
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stylepipe.cli.main import main
from stylepipe.datasets.levels import box_averages
from stylepipe.datasets.order import flips
from stylepipe.datasets.photos import read_square
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.reader import Batch
from stylepipe.datasets.streaming import StreamedDataset, StreamReader, is_stream
from stylepipe.errors import UserError

RES = 16


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(photos: Path, tmp_path: Path) -> Path:
    """Give a folder of three tars that hold 23 photographs, each with a text beside it."""
    folder = tmp_path / "tars"
    folder.mkdir()
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    for number in range(3):
        members: dict[str, bytes] = {}
        for path in files[number::3]:
            members[f"{path.stem}.txt"] = b"a caption"
            members[f"{path.stem}{path.suffix}"] = path.read_bytes()
        write_tar(folder / f"set-{number:03d}.tar", members)
    return folder


@pytest.fixture
def squares(photos: Path) -> set[bytes]:
    """Give what each photograph becomes."""
    how = Preparation(RES)
    return {
        np.asarray(read_square(path.read_bytes(), how).image).tobytes() for path in photos.rglob("*") if path.is_file()
    }


def stream(tars: Path) -> StreamedDataset:
    return StreamedDataset(f"stream:{tars}/set-{{000..002}}.tar", RES)


def take(count: int, dataset: StreamedDataset, **options: Any) -> list[Batch]:
    return list(islice(StreamReader(dataset, batch_size=4, **{"seed": 0} | options), count))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        torch.equal(p.images, q.images) and torch.equal(p.positions, q.positions) for p, q in zip(a, b, strict=True)
    )


def test_what_is_a_stream() -> None:
    assert is_stream("stream:/data/a.tar")
    assert is_stream("stream:https://h/a-{000..123}.tar")
    assert not any(map(is_stream, ("/data/a.tar", "https://h/a.tar", None, Path("stream"))))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_hold_the_squares_of_the_photographs(tars: Path, squares: set[bytes], workers: int) -> None:
    batches = take(30, stream(tars), workers=workers, mirror=True, start=8)
    images = [image.numpy().tobytes() for batch in batches for image in batch.images]
    assert set(images) == squares, "120 draws of 23"
    positions = torch.cat([batch.positions for batch in batches])
    assert positions.tolist() == list(range(8, 128))
    assert torch.cat([batch.mirrored for batch in batches]).tolist() == flips(positions.numpy(), 0).tolist()
    assert batches[0].labels.shape == (4, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_arguments_give_the_same_batches(tars: Path, workers: int) -> None:
    first = take(10, stream(tars), workers=workers)
    assert same(first, take(10, stream(tars), workers=workers))
    for other in ({"seed": 1}, {"start": 40}, {"rank": 1, "world_size": 2}):
        batch = take(1, stream(tars), workers=workers, **other)[0]
        assert not torch.equal(batch.images, first[0].images[: len(batch.images)])


def test_a_smaller_level_is_the_box_average(tars: Path) -> None:
    full, half = take(3, stream(tars)), take(3, stream(tars).level(8))
    for a, b in zip(full, half, strict=True):
        for image, small in zip(a.images, b.images, strict=True):
            assert (next(level for level in box_averages(image.numpy()) if len(level) == 8) == small.numpy()).all()


def test_a_look_at_the_data_takes_the_first_photographs(tars: Path, photos: Path) -> None:
    dataset = StreamedDataset(f"stream:{tars}/*.tar", RES)
    assert dataset.shards == [f"{tars}/set-{number:03d}.tar" for number in range(3)]
    assert dataset.name == "tars"
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    expected = [read_square(path.read_bytes(), Preparation(RES)).image for path in files[0::3]]
    assert (dataset.read(range(4)) == np.stack([np.asarray(image) for image in expected[:4]])).all()
    with pytest.raises(UserError, match=r"gives 23 images of 16 px; expected 32 at least: name more shards"):
        dataset.read(dataset.previewed)
    assert StreamedDataset(f"stream:{tars}", RES).shards == dataset.shards, "a folder is its tars"
    with pytest.raises(UserError, match=r"left out, for instance: .*smaller than 64 px \(\d\dx\d\d\)"):
        StreamedDataset(f"stream:{tars}", 64).read([0])


@pytest.mark.parametrize("address", ["https://h/*.tar", "pipe:cat x.tar"])
def test_what_is_no_stream_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"streams are read from paths, with \* and \{000\.\.099\}"):
        StreamedDataset(f"stream:{address}", RES)


def test_a_look_at_data_that_cannot_be_read_says_why(tars: Path) -> None:
    (tars / "set-000.tar").write_bytes(b"")
    only = f"stream:{tars}/set-000.tar"
    with pytest.raises(UserError, match=r"set-000\.tar: cannot be read \(empty file\); --on-bad skip"):
        StreamedDataset(only, RES).read([0])
    with pytest.raises(UserError, match=r"gives 0 images .*left out, for instance: .*set-000\.tar: cannot be read"):
        StreamedDataset(only, RES, skip_bad=True).read([0])


def test_what_cannot_be_read_stops_or_is_left_out(tars: Path, squares: set[bytes]) -> None:
    write_tar(tars / "set-001.tar", {"x.png": b"\x89PNG and no more", "y.jpg": jpeg(40)})
    (tars / "set-002.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"set-00[12]\.tar: (x\.png: unreadable|cannot be read) .*--on-bad skip"):
        take(30, stream(tars))
    batches = take(30, stream(tars), skip_bad=True)
    told = {text for batch in batches for text in batch.bad}
    assert len(told) == 2
    assert any("x.png: unreadable" in text for text in told)
    assert any("set-002.tar: cannot be read" in text for text in told)
    assert len({image.numpy().tobytes() for batch in batches for image in batch.images} - squares) == 1


def jpeg(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (10, 200, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_streams_of_nothing_end(tars: Path) -> None:
    write_tar(tars / "set-000.tar", {"small.jpg": jpeg(8)})
    only = StreamedDataset(f"stream:{tars}/set-000.tar", RES)
    with pytest.raises(UserError, match=r"1,000 photographs in a row left out, the last: .*smaller than 16 px \(8x8\)"):
        take(1, only)
    (tars / "set-000.tar").write_bytes(b"x" * 1024)
    with pytest.raises(UserError, match=r"10 shards in a row gave no image, the last: .*set-000\.tar: cannot be read"):
        take(1, only, skip_bad=True)
    write_tar(tars / "set-000.tar", {"a.txt": b"a caption", "b.txt": b"another"})
    with pytest.raises(UserError, match=r"10 shards in a row gave no image, the last: .*set-000\.tar: holds no images"):
        take(1, only)
    with pytest.raises(UserError, match=r"no such file: .*none-001\.tar; expected tar files"):
        StreamedDataset(f"stream:{tars}/none-{{001..002}}.tar", RES)


def test_threads_end_with_the_iteration(tars: Path) -> None:
    take(2, stream(tars), workers=2)
    for thread in threading.enumerate():
        if thread.name == "streaming":
            thread.join(10)
            assert not thread.is_alive()


def test_a_server_that_cuts_and_refuses(tars: Path, squares: set[bytes]) -> None:
    faulty_server = pytest.importorskip("faulty_server")
    pytest.importorskip("aiohttp")
    with faulty_server.FaultyServer() as server:
        for path in tars.iterdir():
            server.files[path.name] = path.read_bytes()
        dataset = StreamedDataset(f"stream:{server.url}/set-{{000..002}}.tar?token=secret", RES)
        server.plan("set-000.tar", faulty_server.Fault(status=503), faulty_server.Fault(cut_after=700))
        batches = take(20, dataset)
        assert {image.numpy().tobytes() for batch in batches for image in batch.images} <= squares
        assert "secret" not in str(dataset.facts)
        server.always["set-001.tar"] = faulty_server.Fault(status=404)
        with pytest.raises(UserError, match=r"set-001\.tar\?\*\*\*: HTTP 404 Not Found.*--on-bad skip"):
            take(40, dataset)


SMALL = ["--res", "16", "--batch-size", "8", "--tracker", "none", "--augment", "none"]
SMALL += ["--network.channel-base", "128", "--network.channel-max", "8", "--network.z-dim", "16"]


@pytest.mark.slow
def test_training_on_a_stream_says_what_it_is(
    tars: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tar(tars / "set-003.tar", {f"{n}.jpg": jpeg(30 + n) for n in range(12)})
    command = ["train", *SMALL, "--data", f"stream:{tars}/*.tar", "--out", str(tmp_path / "run")]
    assert main([*command, "--kimg", "0.016", "--mirror"]) == 0
    assert "tars (a stream of 4 shards)" in capfd.readouterr().out
    assert main([*command, "--kimg", "0.032", "--mirror"]) == 0
    assert "drawn at random: a run that goes on shows other images" in capfd.readouterr().out
    assert (tmp_path / "run" / "grids" / "real.png").exists()
    assert main([*command, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("options", "message"), [(["--cond"], "--cond: stream:x.tar has no labels"), (["--data-window", "2"], "prepare it")]
)
def test_what_a_stream_cannot_do_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *SMALL, "--data", "stream:x.tar", *options]) == 2
    assert message in capsys.readouterr().err
