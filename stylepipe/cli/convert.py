"""`stylepipe convert FILE OUT`: other projects' weights to a network file, and back."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stylepipe.errors import UserError
from stylepipe.interop.checkpoints import import_checkpoint
from stylepipe.interop.network_file import license_notice, lineage, load_network, read_header, save_network
from stylepipe.interop.plain_data import shown
from stylepipe.interop.rosinality import export_rosinality
from stylepipe.networks.stylegan2 import Generator

SUFFIXES = {"stylepipe": ".safetensors", "rosinality": ".pt"}


@dataclass(frozen=True)
class ConvertOptions:
    """Convert StyleGAN2 weights of other projects to a network file, to sample and to train from with --init.

    Reads the network files of StyleGAN2-ADA and StyleGAN3's code (.pkl: its StyleGAN2 networks, not the alias-free
    ones) and rosinality's checkpoints (.pt). Nothing that stands in such a file is run: it is read as plain data, and
    whatever it refers to besides tensors, numbers, strings and containers is refused by name.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """Checkpoint to read; with --to rosinality, a network file of ours."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write, .safetensors; with --to rosinality, .pt."""
    to: Literal["stylepipe", "rosinality"] = "stylepipe"
    """Whose form to write."""
    license: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Licence under which you hold the weights, an SPDX identifier such as MIT or a text. It is kept in the file and
    shown wherever stylepipe's commands use it. Asked for on a terminal if left out."""
    overwrite: bool = False
    """Replace OUT if it is there."""


def main(argv: list[str]) -> None:
    """Parse the options, convert, say on stderr what the user should know, and print where the file is."""
    options = tyro.cli(ConvertOptions, args=argv, prog="stylepipe convert")
    convert(options)
    print(options.out)


def convert(options: ConvertOptions) -> None:
    """Read one form and write the other.

    Raises:
        UserError: an option does not make sense; the file cannot be read or holds something else; the licence is
            missing; see `import_checkpoint` and `export_rosinality`.
    """
    suffix = SUFFIXES[options.to]
    if options.out.suffix != suffix:
        raise UserError(f"{options.out}: expected a name that ends in {suffix} for --to {options.to}")
    if options.out.exists() and not options.overwrite:
        raise UserError(f"{options.out}: there already; name another file, or replace it with --overwrite")
    if not options.out.parent.is_dir():
        raise UserError(f"{options.out}: there is no folder {options.out.parent}; make it, or name another")
    if options.license is not None:
        _check_license("--license", options.license)
    if options.to == "rosinality":
        _export(options)
    else:
        _import(options)


def _import(options: ConvertOptions) -> None:
    if options.source.suffix == SUFFIXES["stylepipe"]:
        raise UserError(f"{options.source}: a network file already; to another form with --to rosinality OUT.pt")
    if options.license is None and options.source.suffix == ".pkl":  # these say nothing: no need to read it first
        _check_terminal(options.source)
    imported = import_checkpoint(options.source)
    _say(imported.notes)
    if options.license is None and imported.license is not None:
        _check_license(f"{options.source}: its licence", imported.license)
        _say([f"the licence is what {options.source.name} says: {imported.license}"])
    _say_replaced(options, imported.license)
    origin = {"license": options.license or imported.license or _ask(options.source)}
    origin["imported_from"] = imported.origin
    earlier = imported.derived_from
    origin["derived_from"] = lineage(options.source, None if earlier is None else shown(earlier))
    save_network(options.out, imported.G_ema, beside=imported.beside, metadata=origin | imported.metadata)


def _export(options: ConvertOptions) -> None:
    header = read_header(options.source)
    G_ema = load_network(options.source)
    if not isinstance(G_ema, Generator):
        raise UserError(f"{options.source}: holds a {header.class_name}; expected a generator")
    notice = license_notice(options.source, header)
    beside = {name: load_network(options.source, name=name) for name in header.beside}
    before = header.metadata.get("license")
    derived_from = lineage(options.source, header.metadata.get("derived_from"))
    notes = export_rosinality(options.out, G_ema, beside, license=options.license or before, derived_from=derived_from)
    _say([notice, *notes] if notice else notes)
    _say_replaced(options, before)


def _say_replaced(options: ConvertOptions, known: str | None) -> None:
    if options.license is not None and known is not None and known != options.license:
        _say([f"the licence becomes {options.license}; {options.source.name} says {shown(known)}"])


def _ask(source: Path) -> str:
    """Ask on the terminal under which licence the weights are.

    Raises:
        UserError: there is no terminal, or no answer.
    """
    _check_terminal(source)
    print("Licence under which you hold these weights, such as MIT: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip()
    _check_license("--license", answer)
    return answer


def _check_terminal(source: Path) -> None:
    if not sys.stdin.isatty():
        raise UserError(
            f"{source}: say under which licence you hold these weights, such as --license MIT; it is kept in the file "
            "and shown wherever stylepipe's commands use it"
        )


def _check_license(what: str, text: str) -> None:
    if not text.strip() or not text.isprintable():
        raise UserError(f"{what} {text!a}: expected one line of text, such as MIT")


def _say(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
