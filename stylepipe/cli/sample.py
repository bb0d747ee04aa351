"""`stylepipe sample`: images from a network file."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from stylepipe.cli.sample_labels import ALL, labels_to_draw
from stylepipe.errors import UserError
from stylepipe.images import check_suffix, make_grid, parse_grid, save_image, to_uint8
from stylepipe.interop.network_file import license_notice, load_network, read_header

DEFAULT_COUNT = 16  # images, when neither --seeds nor --grid says how many
MAX_SEED = 2**63 - 1
MAX_COUNT = 1_000_000
MAX_PLACES = 10_000
MAX_SEEDS_IN_NAME = MAX_LABEL_IN_NAME = 60  # characters; file systems allow 255 in all


class AnyGenerator(Protocol):
    """What sampling needs of a generator, whichever paper it is from."""

    config: dict[str, Any]
    """With c_dim, the label dimensions, and class_w_avg if it keeps mean styles of classes."""
    z_dim: int
    """Dimensions of z."""
    mapping: Any
    """Of one with styles: (z [N, z_dim], c, truncation_psi, truncation_cutoff, class_centers) -> ws."""
    synthesis: Callable[..., Tensor]
    """Of one with styles: (ws, noise_mode) -> img [N, 3, R, R] in [-1, 1]."""

    def __call__(self, z: Tensor, c: Tensor | None) -> Tensor:
        """Make img [N, 3, R, R] in [-1, 1] of z and labels c [N, c_dim]."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the weights."""
        ...


@dataclass(frozen=True)
class SampleOptions:
    """Make images with a trained network. The same seed gives the same face on every device and in any company."""

    network: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NETWORK")]
    """Network file that training wrote, network-<kimg>.safetensors."""
    seeds: Annotated[str | None, tyro.conf.arg(metavar="A-B,C")] = None
    """One image each, such as 0-15,42. Default: as many as --grid has places, from 0 on, else 0-15."""
    trunc: float = 1.0
    """Truncation psi: 1 shows all that the network learnt, 0.7 fewer oddities, 0 the average face."""
    trunc_cutoff: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Truncate only this many layers from the coarsest on. Default: all."""
    trunc_center: Literal["class", "all"] | None = None
    """Truncate towards the mean of the image's class, or of all images. Default: of the class if the network has it."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="K|NAME|all")] = None
    """Class to draw, by its name or its number from 0 on, for networks trained with classes; all, with --grid, makes
    one row per class, with the same seeds in each."""
    label: Annotated[str | None, tyro.conf.arg(metavar="X,Y,...")] = None
    """Label to draw, for networks trained with vectors as labels; of classes, a mixture."""
    grid: Annotated[str | None, tyro.conf.arg(metavar="CxR")] = None
    """One picture of C columns and R rows, such as 4x4; places without a seed stay black."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A picture (.png or .webp), or a folder that gets one file per seed, seed0042.png. Default: below samples/,
    named after the network: a picture with --grid, else a folder."""
    format: Literal["png", "webp"] = "png"
    """Kind of file wherever --out does not say it; both are without loss."""
    noise: Literal["const", "random", "none"] = "const"
    """Per-pixel noise: fixed with the network, drawn anew from each seed, or left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    batch: int = 8
    """Images at a time; fewer need less memory. Random noise takes 1."""


def main(argv: list[str]) -> None:
    """Parse the options, make the images, write them, and print where they are."""
    options = tyro.cli(SampleOptions, args=argv, prog="stylepipe sample")
    print(sample(options))


@torch.inference_mode()
def sample(options: SampleOptions) -> Path:
    """Make and write the images; return the picture or the folder.

    Raises:
        UserError: an option does not make sense, or not for this network; see `load_network` and `save_image`.
    """
    shape = parse_grid(options.grid) if options.grid else None
    seeds = _seeds(options, shape)
    if options.trunc_cutoff is not None and options.trunc_cutoff < 0:
        raise UserError(f"--trunc-cutoff {options.trunc_cutoff}: expected a number of layers, 0 or more")
    if not math.isfinite(options.trunc):
        raise UserError(f"--trunc {options.trunc}: expected a finite number, such as 0.7")
    if options.batch < 1:
        raise UserError(f"--batch {options.batch}: expected at least 1")
    device = _device(options.device)
    G = _generator(options.network, device)
    metadata = read_header(options.network).metadata
    c = labels_to_draw(options.network, G.config["c_dim"], metadata, options.class_name, options.label)
    if not hasattr(G, "mapping"):
        _check_plain(options)
    if options.trunc_center == "class" and not G.config.get("class_w_avg"):
        raise UserError("--trunc-center class: this network keeps no means of classes; leave it out")
    if c is not None and options.class_name == ALL:
        return _rows_of_classes(G, c, seeds, shape, options)
    out, single = _place(options, len(seeds), c)
    bar = _progress(_images(G, c, seeds, options), len(seeds))
    if not single:
        for seed, image in zip(seeds, bar, strict=True):
            save_image(out / f"seed{seed:04d}.{options.format}", image)
        return out
    columns, rows = shape or _square(len(seeds))
    save_image(out, make_grid(_padded(np.stack(list(bar)), columns * rows), columns))
    return out


def parse_seeds(text: str) -> list[int]:
    """Read "0-15,42" as 0, 1, ... 15, 42.

    Raises:
        UserError: it is something else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last - first >= MAX_COUNT:
            raise UserError(f"--seeds {text}: expected at most {MAX_COUNT} images at a time")
        if first > last or last > MAX_SEED:
            raise UserError(f"--seeds {text}: '{part}' found, expected numbers and rising ranges such as 0-15,42")
        seeds.extend(range(first, last + 1))
    return seeds


def latents(seeds: list[int], z_dim: int) -> NDArray[np.float32]:
    """Draw each seed's own z, [N, z_dim] standard normal; drawn on the host, so it is the same for every device."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).standard_normal(z_dim, dtype=np.float32) for seed in seeds]
    return np.stack(rows)


def _rows_of_classes(
    G: AnyGenerator, c: Tensor, seeds: list[int], shape: tuple[int, int] | None, options: SampleOptions
) -> Path:
    """Make a grid of one row per class, each of the same seeds, and write it."""
    columns, rows = shape or (len(seeds), 0)
    if rows != len(c):
        found = f"--grid {options.grid}" if options.grid else "--grid missing"
        raise UserError(f"{found}: --class all makes a row for each of the {len(c)} classes; try {columns}x{len(c)}")
    out, _ = _place(options, len(seeds), c)
    images = list(
        _progress(_images(G, c.repeat_interleave(len(seeds), dim=0), seeds * rows, options), len(seeds) * rows)
    )
    cells = [
        _padded(np.stack(images[first : first + len(seeds)]), columns) for first in range(0, len(images), len(seeds))
    ]
    save_image(out, make_grid(np.concatenate(cells), columns))
    return out


def _progress(images: Iterator[NDArray[np.uint8]], count: int) -> Iterable[NDArray[np.uint8]]:
    return tqdm(images, total=count, unit="img", disable=None, leave=False)


def _padded(images: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Add black images up to a number."""
    return np.concatenate([images, np.zeros((count - len(images), *images.shape[1:]), dtype=np.uint8)])


def _seeds(options: SampleOptions, shape: tuple[int, int] | None) -> list[int]:
    if shape and math.prod(shape) > MAX_PLACES:
        raise UserError(f"--grid {options.grid}: {math.prod(shape)} places, expected at most {MAX_PLACES}")
    one_row = options.class_name == ALL  # of each class
    places = None if shape is None else shape[0] if one_row else math.prod(shape)
    if options.seeds is None:
        return list(range(places or DEFAULT_COUNT))
    seeds = parse_seeds(options.seeds)
    if places is not None and len(seeds) > places:
        raise UserError(
            f"--grid {options.grid}: {places} places{' in a row' if one_row else ''} for {len(seeds)} seeds; "
            f"give a larger grid or fewer seeds"
        )
    return seeds


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _generator(path: Path, device: torch.device) -> AnyGenerator:
    network = load_network(path, device)
    if "z_dim" not in getattr(network, "config", {}):
        raise UserError(f"{path}: holds a {type(network).__name__}; expected a generator")
    if notice := license_notice(path, read_header(path)):
        print(notice, file=sys.stderr)
    return cast(AnyGenerator, network)


def _images(G: AnyGenerator, c: Tensor | None, seeds: list[int], options: SampleOptions) -> Iterator[NDArray[np.uint8]]:
    """Give each seed's image, [R, R, 3] uint8; c [1 or N, c_dim] has one label for all, or each image's own."""
    device = next(G.parameters()).device
    batch = 1 if options.noise == "random" else options.batch
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        z = torch.from_numpy(latents(part, G.z_dim)).to(device)
        labels = None if c is None else c.expand(len(seeds), -1)[start : start + batch].to(device)
        if options.noise == "random":
            torch.manual_seed(part[0])
        yield from to_uint8(_image(G, z, labels, options)).cpu().numpy()


def _image(G: AnyGenerator, z: Tensor, labels: Tensor | None, options: SampleOptions) -> Tensor:
    if not hasattr(G, "mapping"):
        return G(z, labels)
    ws = G.mapping(
        z,
        labels,
        truncation_psi=options.trunc,
        truncation_cutoff=options.trunc_cutoff,
        class_centers=options.trunc_center != "all",
    )
    return G.synthesis(ws, noise_mode=options.noise)


def _check_plain(options: SampleOptions) -> None:
    """Refuse options that a generator without styles would leave unused."""
    for name in ("trunc", "trunc_cutoff", "trunc_center", "noise"):
        value = getattr(options, name)
        if value != getattr(SampleOptions(options.network), name):
            raise UserError(
                f"--{name.replace('_', '-')} {value}: {options.network} holds a generator without styles, which has "
                f"neither truncation nor noise; leave it out"
            )


def _place(options: SampleOptions, count: int, c: Tensor | None) -> tuple[Path, bool]:
    """Decide where to write, and whether it is a single picture; see that the folder can be made."""
    stem = options.network.stem + _label_in_name(options, c)
    out = options.out
    single = options.grid is not None or (out is not None and out.suffix != "" and not out.is_dir())
    if single:
        seeds = (options.seeds or f"0-{count - 1}").replace(" ", "")
        name = f"{stem}-seeds{seeds if len(seeds) <= MAX_SEEDS_IN_NAME else f'-{count}'}.{options.format}"
        out = Path("samples") / name if out is None else out / name if out.is_dir() else out
        check_suffix(out)
    elif out is None:
        out = Path("samples") / stem
    folder = out.parent if single else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out: cannot make the folder {folder}: {error.strerror or error}; choose another one"
        ) from error
    return out, single


def _label_in_name(options: SampleOptions, c: Tensor | None) -> str:
    """Return what tells the pictures of one label from those of another, such as -class2."""
    if c is None:
        return ""
    if options.label is None:
        return "-classes" if options.class_name == ALL else f"-class{int(c.argmax())}"
    text = options.label.replace(" ", "")
    if len(text) > MAX_LABEL_IN_NAME:
        text = "-" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    return f"-label{text}"


def _square(count: int) -> tuple[int, int]:
    """Return the columns and rows of a grid that is about square."""
    columns = math.ceil(math.sqrt(count))
    return columns, math.ceil(count / columns)
