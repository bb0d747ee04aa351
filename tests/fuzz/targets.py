"""What stylepipe reads of others: for each kind of file a small valid one, and how the commands read it."""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
import yaml
from damage import Files, damaged, damaged_bytes, damaged_files, damaged_json, damaged_value, json_bytes
from foreign_checkpoints import dump, persistent_network, rosinality_checkpoint
from PIL import Image, ImageCms

from stylepipe.cli import ema, sample
from stylepipe.cli.data import described
from stylepipe.cli.evaluate import EvaluateOptions, look_up
from stylepipe.cli.initial import settings_of
from stylepipe.cli.options import read_config
from stylepipe.datasets.align import read_landmarks
from stylepipe.datasets.decoding import check_header, decode_into
from stylepipe.datasets.labels import find_labels
from stylepipe.datasets.photos import SkippedPhotoError, read_square
from stylepipe.datasets.preparation import Preparation
from stylepipe.datasets.prepare import prepare
from stylepipe.datasets.shards import open_dataset
from stylepipe.datasets.sources.opening import open_source
from stylepipe.datasets.streaming import StreamedDataset
from stylepipe.datasets.verifying import find_faults, repair
from stylepipe.errors import UserError
from stylepipe.interop.checkpoints import import_checkpoint
from stylepipe.interop.network_file import load_network, read_header, save_network
from stylepipe.metrics.stored_rows import StoredRows, store_rows
from stylepipe.networks import dcgan, progan, stylegan2
from stylepipe.presets import resolve
from stylepipe.report.page import make_report, render
from stylepipe.run_files import EMA_FOLDER, GRIDS_FOLDER, kimg_name
from stylepipe.training.checkpoint import check_fits, digest_of, load_state, newest_healthy_state, save_state
from stylepipe.training.measuring import best_line, measured_lines
from stylepipe.training.power_ema import averages_file
from stylepipe.training.progress import RunLog

RES = 16
PICTURE = "a picture:"  # how messages of pictures begin, whose files have no names here
LAYOUT = {"G": {"weight": [2, 3], "bias": [3]}}
PHOTO_FORMATS = {
    "png": {},
    "jpg": {"quality": 60},
    "webp": {"lossless": True},
    "gif": {},
    "bmp": {},
    "tif": {},
    "ppm": {},
    "tga": {},
    "ico": {"sizes": [(RES, RES)]},
    "jp2": {},
    "pcx": {},
    "sgi": {},
    "dds": {},
    "im": {},
    "avif": {},
}


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        make: writes valid files into an empty folder.
        read: reads them as the commands do, writing only into the second folder; raises UserError to refuse them.
        damage: returns other files.
    """

    make: Callable[[Path], None]
    read: Callable[[Path, Path], object]
    damage: Callable[[Files, np.random.Generator], Files] = damaged_files


def photo(seed: int = 0, suffix: str = "png", size: int = 20, **options: Any) -> bytes:
    """Return the file of a small smooth picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).save(content, Image.registered_extensions()[f".{suffix}"], **options)
    return content.getvalue()


def make_state(folder: Path) -> None:
    tensors = {"G.params": torch.arange(9.0), "step": torch.tensor(3)}
    info = {"healthy": True, "config": {"res": 16, "loss": {"r1_gamma": 1.0}}, "data": {"name": "x"}, "origin": {}}
    save_state(folder, 1000, tensors, LAYOUT, info)


def read_state(folder: Path, out: Path) -> None:
    state = load_state(folder / "state-000001.000")
    check_fits(state, LAYOUT)
    newest_healthy_state(folder)


def damaged_state(files: Files, random: np.random.Generator) -> Files:
    """Damage a state; half of the time such that its digest still is that of its tensors."""
    changed = damaged_files(files, random)
    if random.integers(2):
        tensors, description = "state-000001.000/state.safetensors", "state-000001.000/state.json"
        changed = {**files, tensors: damaged_tensors(files[tensors], random)}
        values = {**json.loads(files[description]), "sha256": hashlib.sha256(changed[tensors]).hexdigest()}
        if random.integers(2):
            values = damaged_value(values, random)
        if isinstance(values, dict):
            values["digest"] = digest_of(values)
        changed[description] = json_bytes(values)
    return changed


def damaged_tensors(content: bytes, random: np.random.Generator) -> bytes:
    """Damage a safetensors file; mostly what its header says, of which the length stays right."""
    if random.integers(4) == 0:
        return damaged_bytes(content, random)
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    if random.integers(3) == 0:
        header = damaged_bytes(header, random)
    elif random.integers(2):
        header = damaged_json(header, random)
    else:  # the JSON within its strings
        values = json.loads(header)
        within = [key for key, text in values.get("__metadata__", {}).items() if text.startswith("{")]
        if within:
            key = within[int(random.integers(len(within)))]
            changed = json_bytes(damaged_value(json.loads(values["__metadata__"][key]), random))
            values["__metadata__"][key] = changed.decode()
        header = json_bytes(values)
    return len(header).to_bytes(8, "little") + header + body


def damaged_network(files: Files, random: np.random.Generator) -> Files:
    """Damage one of several safetensors files, and leave the others away."""
    name = sorted(files)[int(random.integers(len(files)))]
    return {name: damaged_tensors(files[name], random)}


def damaged_averages(files: Files, random: np.random.Generator) -> Files:
    """Damage one of several safetensors files."""
    return files | damaged_network(files, random)


def make_networks(folder: Path) -> None:
    small = {"z_dim": 4, "channel_base": 32, "channel_max": 4}
    G = stylegan2.Generator(8, w_dim=4, mapping_layers=1, c_dim=2, **small)
    D = stylegan2.Discriminator(8, c_dim=2, channel_base=32, channel_max=4)
    about = {"images_seen": "1000", "classes": '["cats", "dogs"]', "license": "MIT"}
    save_network(folder / "network-000001.000.safetensors", G, beside={"G": G, "D": D}, metadata=about)
    save_network(folder / "progan.safetensors", progan.Generator(8, **small))
    save_network(folder / "dcgan.safetensors", dcgan.Generator(8, norm="virtual", reference_size=2, **small))


def read_networks(folder: Path, out: Path) -> None:
    for path in sorted(folder.iterdir()):
        header = read_header(path)
        load_network(path)
        if "D" in header.beside:
            load_network(path, name="D")
            settings_of(str(path))
        label = "0" if header.config.get("c_dim") else None
        sample.sample(sample.SampleOptions(path, seeds="0", class_name=label, out=out / "a.png", device="cpu"))
        options = EvaluateOptions((path,), data=str(small_dataset()), out=out / "metrics.jsonl")
        look_up(options)


@cache
def scratch() -> Path:
    """Return a folder that is there as long as this process."""
    folder = tempfile.TemporaryDirectory(prefix="stylepipe-fuzz-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def small_dataset() -> Path:
    """Return a prepared folder of 8 px with classes, for networks to be measured on."""
    folder = scratch() / "networks"
    for number, name in enumerate(("cats", "dogs", "cats", "dogs")):
        (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name / f"{number}.png").write_bytes(photo(number))
    prepare(folder / "photos", folder / "data", Preparation(8, labels=True), workers=1, progress=False)
    return folder / "data"


def make_averages(folder: Path) -> None:
    (folder / EMA_FOLDER).mkdir()
    for images_seen in (1000, 2000):
        G = progan.Generator(8, z_dim=4, channel_base=32, channel_max=4)
        about = {
            "images_seen": str(images_seen),
            "sigma_rel": "0.050",
            "ema_start": "0",
            "resolution": "8",
            "alpha": "1",
        }
        save_network(averages_file(folder, images_seen), G, beside={"0.100": G}, metadata=about)


def read_averages(folder: Path, out: Path) -> None:
    ema.main([str(folder), "--length", "0.1,0.2", "--out", str(out)])


def make_statistics(folder: Path) -> None:
    store_rows(folder / "rows", {"features": torch.randn(6, 4), "more": torch.randn(6, 2)}, {"images": 6})


def read_statistics(folder: Path, out: Path) -> None:
    rows = StoredRows(folder / "rows", torch.device("cpu"))
    for name in rows:
        rows[name].sum()


def make_dataset(folder: Path) -> None:
    source = folder.parent / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    labels = []
    for number in range(5):
        (source / f"{number}.png").write_bytes(photo(number))
        labels.append([f"{number}.png", [number / 2, 1.0]])
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))
    how = Preparation(8, labels=True, levels=True, shard_mb=4096 / 2**20)
    folder.rmdir()
    prepare(source, folder, how, workers=1, progress=False)


def read_dataset(folder: Path, out: Path) -> None:
    read_prepared(folder)
    for fault in find_faults(folder, workers=1, progress=False):
        assert fault.file
    with redirect_stdout(io.StringIO()):
        repair(folder, out / "repaired", workers=1, progress=False)
    open_dataset(out / "repaired").read([0])


def read_prepared(folder: Path) -> None:
    """Read a prepared folder as training does, and `data inspect`."""
    dataset = open_dataset(folder)
    dataset.check_headers()
    described(dataset)
    for data in (dataset, dataset.level(4)):
        for sample_number in range(min(len(data), 8)):
            data.read([sample_number])
        data.labels(range(min(len(data), 8)))


def damaged_dataset(files: Files, random: np.random.Generator) -> Files:
    """Damage a prepared folder; mostly such that sizes, or also hashes, in its manifest are those of its files."""
    changed = damaged_files(files, random)
    if random.integers(3) == 0:
        return changed
    manifest = json.loads(files["manifest.json"])
    for record in (*manifest["shards"], manifest["index"], manifest["labels"]):
        record["bytes"] = len(changed[record["file"]])
        if random.integers(2):
            record["sha256"] = hashlib.sha256(changed[record["file"]]).hexdigest()
    if random.integers(4) == 0:
        manifest = damaged_value(manifest, random)
    return {**changed, "manifest.json": json_bytes(manifest)}


def make_tar(folder: Path) -> None:
    (folder / "shards").mkdir()
    for form, name in ((tarfile.USTAR_FORMAT, "a"), (tarfile.GNU_FORMAT, "b"), (tarfile.PAX_FORMAT, "c")):
        with tarfile.open(folder / f"shards/{name}.tar", "w", format=form) as tar:
            for number in range(2):
                stem = f"{name}{number}" if form == tarfile.USTAR_FORMAT else f"{name * 120}é{number}"
                for suffix, content in ((".png", photo(number)), (".cls", b"%d" % number)):
                    info = tarfile.TarInfo(stem + suffix)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def make_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for number, how in enumerate((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)):
            archive.writestr(f"cats/{number}é.png", photo(number), how)
        archive.writestr("dogs/", b"")
        archive.writestr("dogs/x.png", photo(9), zipfile.ZIP_DEFLATED)


def make_lmdb(folder: Path) -> None:
    with lmdb.open(str(folder / "db"), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        for number in range(12):
            transaction.put(b"%d-%05d" % (16 + number % 2, number), photo(number) + bytes(number * 300))
        transaction.put(b"length", b"12")
    (folder / "db/lock.mdb").unlink()


def read_source(folder: Path, out: Path) -> None:
    (path,) = folder.iterdir()
    source = open_source(path)
    try:
        find_labels(source)
    except UserError:
        labels = False
    else:
        labels = True
    prepare(source, out / "prepared", Preparation(8, labels=labels, min_size=1), workers=1, progress=False)


def read_stream(folder: Path, out: Path) -> None:
    data = StreamedDataset(f"stream:{folder}/shards", 8)
    list(data.squares(iter(data.shards), skip_bad=False))
    list(data.squares(iter(data.shards), skip_bad=True))


def make_labels(folder: Path) -> None:
    (folder / "photos/sub").mkdir(parents=True)
    names = [f"sub/{number}.png" for number in range(3)]
    for number, name in enumerate(names):
        (folder / "photos" / name).write_bytes(photo(number))
    (folder / "photos/dataset.json").write_text(json.dumps({"labels": [[name, i] for i, name in enumerate(names)]}))
    points = [[6.0, 7.0], [12.0, 7.0], [9.0, 10.0], [7.0, 13.0], [11.0, 13.0]]
    (folder / "points.json").write_text(json.dumps({names[0]: points, names[1]: [points, points], names[2]: []}))
    rows = [f"{name},{','.join(str(x) for point in points for x in point)}" for name in names]
    (folder / "points.csv").write_text("name,x1,y1\n" + "\n".join(rows) + "\n")


def read_labels(folder: Path, out: Path) -> None:
    find_labels(open_source(folder / "photos"))
    for name in ("points.json", "points.csv"):
        read_landmarks(folder / name)
        how = Preparation(8, crop="align", landmarks=str(folder / name), min_size=1, labels=True)
        prepare(folder / "photos", out / name, how, workers=1, progress=False)


def make_pictures(folder: Path) -> None:
    for number, (suffix, options) in enumerate(PHOTO_FORMATS.items()):
        (folder / f"a.{suffix}").write_bytes(photo(number, suffix, RES, **options))
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    (folder / "rich.jpg").write_bytes(photo(3, "jpg", RES, exif=exif, icc_profile=profile))
    first, *others = [Image.open(io.BytesIO(photo(seed, "png", RES))) for seed in range(3)]
    first.convert("P").save(folder / "several.gif", save_all=True, append_images=others, transparency=1)
    for suffix, options in {"png": {}, "webp": {}, "tif": {"compression": "tiff_lzw"}}.items():
        first.convert("RGBA").save(folder / f"several.{suffix}", save_all=True, append_images=others, **options)


def read_pictures(folder: Path, out: Path) -> None:
    for path in sorted(folder.iterdir()):
        read_picture(path.read_bytes())


def read_picture(content: bytes) -> None:
    """Decode as preparing does, and as training does; whoever calls decoders takes any exception for damage."""
    try:
        read_square(content, Preparation(8, min_size=1))
    except SkippedPhotoError as error:
        refused = UserError(f"{PICTURE} {error.reason} {error.detail}")
    else:
        refused = None
    pixels = np.empty((RES, RES, 3), dtype=np.uint8)
    for decode in (lambda: check_header(content, RES), lambda: decode_into(content, pixels)):
        try:
            decode()
        except Exception:
            continue
    if refused is not None:
        raise refused


def damaged_pictures(files: Files, random: np.random.Generator) -> Files:
    """Damage one picture, and leave the others away."""
    name = sorted(files)[int(random.integers(len(files)))]
    return {name: damaged(name, files[name], random)}


def make_config(folder: Path) -> None:
    values = {"res": 64, "kimg": 100.5, "data": None, "preset": "auto", "mirror": True, "batch_gpu": "auto"}
    values |= {"network": {"z_dim": 8, "conv_clamp": 256}, "loss": {"kind": "hinge"}, "aug": {"p": 0.5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def read_settings(folder: Path, out: Path) -> None:
    config = read_config(folder / "config.yaml", None)
    with suppress(UserError):  # which names options, as those of the command line
        resolve(config, world_size=1)


def make_run(folder: Path) -> None:
    (folder / GRIDS_FOLDER).mkdir()
    (folder / "clips").mkdir()
    settings = {
        "res": 8,
        "preset": "auto",
        "kimg": 4,
        "batch_size": 8,
        "seed": 0,
        "data": None,
        "loss": {"r1_gamma": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for images_seen in (0, 1000, 2000):
        (folder / GRIDS_FOLDER / f"{kimg_name(images_seen)}.png").write_bytes(photo(images_seen))
    (folder / GRIDS_FOLDER / "real.png").write_bytes(photo(5))
    (folder / "clips/000001.000.gif").write_bytes(photo(5, "gif"))
    lines: list[dict[str, Any]] = [
        {"images_seen": seen, "Loss/G/adversarial": 0.5, "Timing/sec_per_kimg": 10.0, "world_size": 2}
        for seen in (500, 1000, 2000)
    ]
    lines[1]["Alarm/mode_collapse"] = "it looks alike"
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(score(seen)) + "\n" for seen in (1000, 2000)))
    (folder / "log.txt").write_text("     0.000 | auto at 8 px\n     2.000 | kimg 2.000\n")
    make_state(folder)
    save_network(
        folder / "network-best.safetensors",
        progan.Generator(8, z_dim=2, channel_base=8, channel_max=1),
        metadata={"images_seen": "1000"},
    )


def score(images_seen: int) -> dict[str, Any]:
    """Return what metrics.jsonl says of a moment."""
    return {
        "metric": "swd",
        "images_seen": images_seen,
        "network": f"network-{kimg_name(images_seen)}.safetensors",
        "results": {"swd": 2.5, "swd_64": 1.0},
        "best": "lowest",
        "settings": {"images": 945, "seed": 0, "data": {"name": "faces", "images": 945, "digest": "a" * 64}},
        "code": "0.1.0",
        "seconds": 3.1,
    }


def read_run(folder: Path, out: Path) -> None:
    report = make_report([folder, small_run()], 500_000)
    page = render(report)
    assert page.count("<script") == page.count("</script>") == 2
    render(report, live=True)


@cache
def small_run() -> Path:
    """Return the folder of a run that is whole."""
    folder = scratch() / "run"
    folder.mkdir()
    make_run(folder)
    return folder


def read_logs(folder: Path, out: Path) -> None:
    copy = out / "run"
    shutil.copytree(folder, copy)
    RunLog(copy, 1000).close()
    best_line(list(measured_lines(copy)), "swd")


def make_foreign(folder: Path) -> None:
    G = stylegan2.Generator(8, z_dim=2, w_dim=2, channel_base=16, channel_max=2, mapping_layers=1)
    arrays = {key: tensor.numpy() for key, tensor in G.state_dict().items()}
    kwargs = {"channel_base": 16, "channel_max": 2, "img_resolution": 8}
    dump(folder / "official.pkl", {"G_ema": persistent_network("Generator", arrays, kwargs)})
    theirs = {
        key: value for key, value in rosinality_checkpoint(4, 2).items() if key in ("g_ema", "latent_avg", "args")
    }
    torch.save(theirs, folder / "new.pt")
    torch.save(theirs, folder / "old.pt", _use_new_zipfile_serialization=False)


def read_foreign(folder: Path, out: Path) -> None:
    for path in folder.iterdir():
        import_checkpoint(path)


TARGETS: dict[str, Target] = {
    "state": Target(make_state, read_state, damaged_state),
    "network": Target(make_networks, read_networks, damaged_network),
    "averages": Target(make_averages, read_averages, damaged_averages),
    "statistics": Target(make_statistics, read_statistics),
    "dataset": Target(make_dataset, read_dataset, damaged_dataset),
    "tar": Target(make_tar, read_source),
    "stream": Target(make_tar, read_stream),
    "zip": Target(make_zip, read_source),
    "lmdb": Target(make_lmdb, read_source),
    "labels": Target(make_labels, read_labels),
    "pictures": Target(make_pictures, read_pictures, damaged_pictures),
    "config": Target(make_config, read_settings),
    "report": Target(make_run, read_run),
    "logs": Target(make_run, read_logs),
    "foreign": Target(make_foreign, read_foreign, damaged_pictures),
}
