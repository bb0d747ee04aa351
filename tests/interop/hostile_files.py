"""Files that mean harm, or are broken: what each is, and what the message about it must say.

Written by hand, instruction by instruction: pickle itself would not write most of them.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HUGE = 10 * 2**30  # bytes that a file claims to have
P2, P4, STOP = b"\x80\x02", b"\x80\x04", b"."
MARK, TUPLE, REDUCE, BUILD, NEWOBJ, BINPERSID = b"(", b"t", b"R", b"b", b"\x81", b"Q"
NONE, LIST, DICT, SET, EMPTY = b"N", b"]", b"}", b"\x8f", b")"
APPEND, APPENDS, SETITEM, SETITEMS = b"a", b"e", b"s", b"u"
TUPLE1, TUPLE2 = b"\x85", b"\x86"
STACK_GLOBAL, POP, TRUE, FALSE = b"\x93", b"0", b"\x88", b"\x89"


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([16]) + encoded


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def items(*pairs: tuple[bytes, bytes]) -> bytes:
    return DICT + MARK + b"".join(key + value for key, value in pairs) + SETITEMS


def call(module: str, attribute: str, *args: bytes) -> bytes:
    return name(module, attribute) + MARK + b"".join(args) + TUPLE + REDUCE


def storage(count: int = 4, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """Refer to a storage of an archive."""
    fields = text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count)
    return MARK + fields + TUPLE + BINPERSID


def tensor(offset: int = 0, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), of: bytes = b"") -> bytes:
    shape, steps = (MARK + b"".join(number(n) for n in numbers) + TUPLE for numbers in (size, stride))
    hooks = name("collections", "OrderedDict") + EMPTY + REDUCE
    return call("torch._utils", "_rebuild_tensor_v2", of or storage(), number(offset), shape, steps, FALSE, hooks)


def archive(pickled: bytes, *, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    """Return an archive as torch.save writes it, with `data/0` of 16 bytes unless given; `__` in names stands for /."""
    file = io.BytesIO()
    files = {"data/0": bytes(16)} | {key.replace("__", "/"): value for key, value in entries.items()}
    with zipfile.ZipFile(file, "w", compression) as z:
        for key, value in {"data.pkl": pickled, **files}.items():
            z.writestr(f"archive/{key}", value)
    return file.getvalue()


def legacy(obj: bytes, *, keys: tuple[str, ...] = ("0",), tail: bytes = struct.pack("<q", 4) + bytes(16)) -> bytes:
    """Return a file of torch.save's older format with one storage of four float32."""
    magic = P2 + b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + STOP
    system = P2 + items((text("little_endian"), TRUE)) + STOP
    names = P2 + LIST + MARK + b"".join(text(key) for key in keys) + APPENDS + STOP
    return magic + P2 + b"M\xe9\x03" + STOP + system + P2 + obj + STOP + names + tail


def persistent(state: bytes, source: str = "import os; os.system('touch SENTINEL')") -> bytes:
    """Return an object as NVIDIA's files hold it, with source code that must never run."""
    meta = [("type", text("class")), ("class_name", text("Generator")), ("module_src", text(source)), ("state", state)]
    pairs = items(*((text(key), value) for key, value in meta))
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", pairs)


def module(children: bytes = DICT, parameters: bytes = DICT) -> bytes:
    pairs = ((text("_parameters"), parameters), (text("_buffers"), DICT), (text("_modules"), children))
    return persistent(items(*pairs))


def shared_weights(count: int) -> bytes:
    return tensor() + put(0) + POP + items(*((text(f"w{i}"), get(0)) for i in range(count)))


def doubled(first: bytes, combine: Callable[[bytes], bytes], times: int) -> bytes:
    """Return a value that holds the one before it twice, `times` over, by the memo."""
    steps = first + put(0)
    for i in range(times):
        steps += POP + combine(get(i)) + put(i + 1)
    return steps


def shell(command: str = "touch SENTINEL") -> bytes:
    return call("posix", "system", text(command))


def overlapping() -> bytes:
    """Return an archive whose directory has the same 4,000 bytes under two names."""
    content = bytearray(archive(P2 + DICT + STOP, data__0=bytes(4000), data__1=b""))
    first, second = (content.rindex(b"archive/data/" + digit) - 46 for digit in (b"0", b"1"))  # directory entries
    for field in (slice(16, 28), slice(42, 46)):  # checksum and both sizes; offset
        content[second + field.start : second + field.stop] = content[first + field.start : first + field.stop]
    return bytes(content)


def duplicate() -> bytes:
    return archive(P2 + DICT + STOP, data__1=bytes(16)).replace(b"archive/data/1", b"archive/data/0")


def encrypted() -> bytes:
    content = bytearray(archive(P2 + DICT + STOP))
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + place] |= 1
    return bytes(content)


@dataclass(frozen=True)
class Hostile:
    """A file, and what the message about it says (a regular expression)."""

    content: bytes
    message: str


def plain(code: bytes, message: str) -> Hostile:
    return Hostile(P4 + code + STOP, message)


def hostile_files() -> dict[str, Hostile]:
    """Return the files by what they try."""
    reference = text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu")
    views = MARK + reference + number(4) + MARK + text("v") + number(0) + number(2) + TUPLE + TUPLE + BINPERSID
    into = "torch.storage", "_load_from_bytes"
    os_object = P2 + shell() + STOP
    return {
        # --- calls
        "os.system": Hostile(P2 + shell() + STOP, "refers to posix.system"),
        "os.system by STACK_GLOBAL": plain(
            text("os") + text("system") + STACK_GLOBAL + text("touch SENTINEL") + TUPLE1 + REDUCE, "refers to os.system"
        ),
        "builtins.eval": plain(call("builtins", "eval", text("open('SENTINEL', 'w')")), "refers to builtins.eval"),
        "builtins.exec": plain(call("builtins", "exec", text("open('SENTINEL', 'w')")), "refers to builtins.exec"),
        "builtins.__import__": plain(call("builtins", "__import__", text("this")), "refers to builtins.__import__"),
        "builtins.open": plain(call("builtins", "open", text("SENTINEL"), text("w")), "refers to builtins.open"),
        "subprocess.Popen": plain(call("subprocess", "Popen", text("ls")), "refers to subprocess.Popen"),
        "a chain of getattr": plain(
            call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system")),
            "refers to builtins.getattr",
        ),
        "a dotted name": plain(
            text("collections") + text("OrderedDict.__init__.__globals__") + STACK_GLOBAL, "refers to collections.Ord"
        ),
        "operator.attrgetter": plain(call("operator", "attrgetter", text("system")), "refers to operator.attrgetter"),
        "torch.load": plain(call("torch", "load", text("x.pt")), "refers to torch.load"),
        "torch.hub.load": plain(call("torch.hub", "load", text("a/b"), text("c")), "refers to torch.hub.load"),
        "dnnlib.util.open_url": plain(call("dnnlib.util", "open_url", text("x")), "refers to dnnlib.util.open_url"),
        "a TensorFlow network": plain(
            name("dnnlib.tflib.network", "Network") + EMPTY + NEWOBJ, "refers to dnnlib.tflib.network.Network"
        ),
        "a name of control characters": plain(name("a\x1b[2J", "b"), r"refers to a\\x1b\[2J\.b"),
        "a very long name": plain(text("a" * 5000) + text("b") + STACK_GLOBAL, r"refers to a{200}\.\.\., which"),
        "calls an admitted result": plain(
            call("collections", "OrderedDict") + MARK + text("x") + TUPLE + REDUCE, "calls something that is not a name"
        ),
        "calls a storage type": plain(call("torch", "FloatStorage", number(2**40)), "calls torch.FloatStorage"),
        "calls a class of torch.nn with a huge size": plain(
            call("torch.nn.modules.linear", "Linear", number(10**9), number(10**9)), "holds a Record"
        ),
        "sets the state of a name": plain(name("torch", "FloatStorage") + DICT + BUILD, "sets the state of a Global"),
        "sets a state twice": plain(
            name("argparse", "Namespace") + EMPTY + NEWOBJ + (items((text("a"), NONE)) + BUILD) * 2, "sets the state"
        ),
        "os.system in a storage": plain(call(*into, data(legacy(shell()))), "refers to posix.system"),
        "os.system in the magic number": plain(call(*into, data(os_object)), "refers to posix.system"),
        "a storage in a storage": plain(
            call(*into, data(legacy(call(*into, data(legacy(storage())))))), "refers to torch.storage._load_from_bytes"
        ),
        "a storage that is a list": plain(
            call(*into, data(legacy(LIST, keys=(), tail=b""))), "a storage that is not one"
        ),
        "os.system in an archive": Hostile(archive(os_object), "refers to posix.system"),
        "os.system in the older format": Hostile(legacy(shell()), "refers to posix.system"),
        "a NumPy object": plain(
            call(
                "numpy._core.multiarray",
                "scalar",
                call("numpy", "dtype", text("O8"), FALSE, TRUE)
                + MARK + number(3) + text("|") + NONE + TUPLE + BUILD,
                data(os_object),
            ),
            "a NumPy number of type O8",
        ),
        "source code of a persistent object": plain(items((text("G_ema"), persistent(DICT))), "without _parameters"),
        "a persistent function": plain(
            call("torch_utils.persistence", "_reconstruct_persistent_obj", items((text("type"), text("function")))),
            "a persistent object without type",
        ),
        # --- instructions
        "INST": plain(MARK + text("x") + b"ios\nsystem\n", "instruction INST"),
        "OBJ": plain(MARK + name("collections", "OrderedDict") + b"o", "instruction OBJ"),
        "NEWOBJ_EX": plain(name("argparse", "Namespace") + EMPTY + DICT + b"\x92", "instruction NEWOBJ_EX"),
        "EXT1": plain(b"\x82\x01", "instruction EXT1"),
        "EXT2": plain(b"\x83\x01\x00", "instruction EXT2"),
        "EXT4": plain(b"\x84\x01\x00\x00\x00", "instruction EXT4"),
        "PERSID": plain(b"P0\n", "instruction PERSID"),
        "BINPERSID where nothing may be": plain(text("x") + BINPERSID, "outside of the file by a persistent id"),
        "a persistent id that is no storage": Hostile(archive(P2 + text("x") + BINPERSID + STOP), "that is no storage"),
        "POP_MARK": plain(MARK + NONE + b"1", "instruction POP_MARK"),
        "DUP": plain(NONE + b"2", "instruction DUP"),
        "GET in text": plain(NONE + b"p0\ng0\n", "instruction PUT"),
        "NEXT_BUFFER": plain(b"\x97", "instruction NEXT_BUFFER"),
        "BYTEARRAY8": plain(b"\x96" + struct.pack("<Q", HUGE), "instruction BYTEARRAY8"),
        "an unknown instruction": plain(b"\xff", "instruction 0xff"),
        "protocol 0": Hostile(b"cos\nsystem\n(S'touch SENTINEL'\ntR.", "neither a pickle nor an archive"),
        "protocol 9": Hostile(b"\x80\x09N.", "pickle protocol 9"),
        # --- bombs
        "keys of one hash": plain(
            DICT + MARK + b"".join(number(k * (2**61 - 1)) + NONE for k in range(1, 30_000)) + SETITEMS,
            "the number .* as a key",
        ),
        "one storage called ten thousand times": plain(
            name(*into) + put(0) + POP + data(legacy(text("é" * 400_000) + POP + storage())) + put(1)
            + (POP + get(0) + get(1) + TUPLE1 + REDUCE) * 10_000,
            "holds a Storage",
        ),
        "a hundred thousand entries": Hostile(
            archive(P2 + DICT + STOP, **{f"data__{i}": b"" for i in range(1, 100_000)}), "entries in the archive"
        ),
        "a stride that no machine has": Hostile(
            archive(
                P2
                + items((text("G_ema"), module(parameters=items((text("w"), tensor(size=(1, 4), stride=(2**100, 1)))))))
                + STOP
            ),
            "not a StyleGAN2 network",
        ),
        "lists doubled 60 times": plain(
            doubled(LIST, lambda v: LIST + MARK + v + v + APPENDS, 60), "holds a list; expected a dictionary"
        ),
        "modules doubled 18 times": plain(
            items((text("G_ema"), doubled(module(), lambda v: module(items((text("a"), v), (text("b"), v))), 18))),
            "G_ema has more than 100,000 weights and modules",
        ),
        "a thousand weights of the same numbers": Hostile(
            archive(P2 + items((text("G_ema"), module(parameters=shared_weights(1000)))) + STOP),
            "weights that are all the same numbers",
        ),
        "tuples doubled 60 times as a key": plain(
            DICT + doubled(EMPTY, lambda v: v + v + TUPLE2, 60) + NONE + SETITEM, "a tuple as a key"
        ),
        "tuples doubled 60 times in a set": plain(
            call("builtins", "set", LIST + doubled(EMPTY, lambda v: v + v + TUPLE2, 60) + APPEND), "a tuple as a key"
        ),
        "tuples doubled 60 times as storage names": Hostile(
            legacy(storage(), tail=b"").replace(
                P2 + LIST + MARK + text("0") + APPENDS,
                P2 + LIST + MARK + doubled(EMPTY, lambda v: v + v + TUPLE2, 60) + APPENDS,
            ),
            "storages announced are not those",
        ),
        "a long list made a set, often": plain(
            LIST + MARK + NONE * 50_000 + APPENDS + put(0)
            + (POP + call("builtins", "set", get(0))) * 100, "more than 2,000,000 pickle instructions"
        ),
        "three million instructions": plain((NONE + POP) * 1_500_000 + NONE, "more than 2,000,000 pickle instructions"),
        "900,000 lists within one another": plain(LIST * 900_000 + APPEND * 899_999, "more than 100 containers"),
        "a million tuples within one another": plain(NONE + TUPLE1 * 1_000_000, "more than 100 containers"),
        "a million marks": plain(MARK * 1_000_000 + TUPLE * 1_000_000, "more than 1000 containers"),
        "a deep dictionary of shared parts": plain(
            LIST + put(0) + (POP + LIST + get(0) + APPEND + put(0)) * 150, "more than 100 containers"
        ),
        "a list within itself": plain(LIST + put(0) + get(0) + APPEND, "a container within itself"),
        "a dictionary within itself": plain(DICT + put(0) + text("a") + get(0) + SETITEM, "a container within itself"),
        "a state within itself": plain(
            name("argparse", "Namespace") + EMPTY + NEWOBJ + put(0) + items((text("a"), get(0))) + BUILD,
            "a container within itself",
        ),
        # --- claims
        "10 GB of bytes": plain(b"\x8e" + struct.pack("<Q", HUGE), "10,737,418,240 bytes announced"),
        "10 GB of text": plain(b"\x8d" + struct.pack("<Q", HUGE), "10,737,418,240 bytes announced"),
        "2^64 bytes of text": plain(b"\x8d" + b"\xff" * 8, "bytes announced"),
        "4 GB of bytes": plain(b"B" + b"\xff" * 4, "4,294,967,295 bytes announced"),
        "a frame of 10 GB": plain(b"\x95" + struct.pack("<Q", HUGE) + DICT, "a dictionary of nothing"),
        "an integer of 2 GB": plain(b"\x8b" + struct.pack("<i", 2**31 - 1), "instruction LONG4"),
        "an integer of 255 bytes": plain(b"\x8a\xff" + bytes(255), "an integer of 255 bytes"),
        "memo number 4 billion": plain(DICT + put(2**32 - 1), "a dictionary of nothing"),
        "a storage of 10 GB in an archive": Hostile(
            archive(P2 + tensor(of=storage(HUGE // 4)) + STOP), "not in the archive, or not of 10,737,418,240 bytes"
        ),
        "a storage of 10 GB in the older format": Hostile(legacy(storage(HUGE // 4)), "not of the size announced"),
        "10 GB announced twice in the older format": Hostile(
            legacy(storage(HUGE // 4), tail=struct.pack("<q", HUGE // 4)), "cut short within storage 0"
        ),
        "a tensor of 10 GB by repeating": Hostile(
            archive(P2 + tensor(size=(HUGE,), stride=(0,)) + STOP), "beyond its storage of 4"
        ),
        # --- tensors
        "strides that read beyond the storage": Hostile(
            archive(P2 + tensor(size=(2, 2), stride=(3, 1)) + STOP), "beyond its storage of 4"
        ),
        "an offset beyond the storage": Hostile(archive(P2 + tensor(1) + STOP), "beyond its storage of 4"),
        "a negative offset": Hostile(archive(P2 + tensor(-1) + STOP), "negative size, stride or offset"),
        "a negative stride": Hostile(archive(P2 + tensor(3, stride=(-1,)) + STOP), "negative size, stride or offset"),
        "a negative size": Hostile(archive(P2 + tensor(size=(-4,)) + STOP), "negative size, stride or offset"),
        "a size of 2^100": Hostile(archive(P2 + tensor(size=(2**100,)) + STOP), "beyond its storage of 4"),
        "17 dimensions": Hostile(archive(P2 + tensor(size=(1,) * 17, stride=(1,) * 17) + STOP), "17 dimensions"),
        "fewer strides than dimensions": Hostile(
            archive(P2 + tensor(size=(2, 2)) + STOP), "2 dimensions with 1 strides"
        ),
        "a tensor of a list": Hostile(archive(P2 + tensor(of=LIST) + STOP), "a tensor without storage"),
        "a parameter of a string": plain(
            call("torch._utils", "_rebuild_parameter", text("x"), TRUE, NONE), "a parameter that is no tensor"
        ),
        "a storage of two types": Hostile(
            archive(P2 + LIST + storage() + APPEND + storage(2, kind="LongStorage") + APPEND + STOP), "has two types"
        ),
        "a storage of bfloat16": Hostile(
            archive(P2 + storage(kind="BFloat16Storage") + STOP), "refers to torch.BFloat16Storage"
        ),
        "a view of a storage": Hostile(legacy(views), "a view of one as very old versions of torch wrote"),
        # --- archives
        "a storage named by a path": Hostile(
            archive(P2 + storage(key="../../etc/passwd") + STOP), r"a storage named \.\./\.\./etc/passwd"
        ),
        "an entry named by a path": Hostile(
            archive(P2 + DICT + STOP, **{"../../SENTINEL": b"x"}), "a dictionary of nothing"
        ),
        "a zip bomb": Hostile(
            archive(P2 + DICT + STOP, compression=zipfile.ZIP_DEFLATED, data__0=bytes(10**7)), "compressed entries"
        ),
        "entries that overlap": Hostile(overlapping(), "entries that overlap"),
        "two entries of one name": Hostile(duplicate(), "two entries of one name"),
        "an encrypted entry": Hostile(encrypted(), "encrypted"),
        "no data.pkl": Hostile(archive(b"").replace(b"data.pkl", b"data.pkx"), "expected one data.pkl"),
        "two data.pkl": Hostile(
            archive(P2 + DICT + STOP, a__data__pkl=b"").replace(b"archive/a/data/pkl", b"archivexxa/data.pkl"[1:]),
            "expected one data.pkl",
        ),
        "a big-endian archive": Hostile(archive(P2 + DICT + STOP, byteorder=b"big"), "big-endian"),
        "a big-endian file": Hostile(
            legacy(storage()).replace(text("little_endian") + TRUE, text("little_endian") + FALSE), "big-endian"
        ),
        "an archive that ends early": Hostile(archive(P2 + DICT + STOP)[:-10], "damaged or cut short"),
        # --- broken
        "an empty file": Hostile(b"", "neither a pickle nor an archive"),
        "a picture": Hostile(b"\x89PNG\r\n\x1a\n", "neither a pickle nor an archive"),
        "nothing but a protocol": Hostile(P4, "cut short or damaged"),
        "an end without a value": plain(b"", "a value is missing"),
        "two values at the end": plain(NONE + NONE, "with values left over"),
        "a mark at the end": plain(NONE + MARK + NONE, "with values left over"),
        "no mark": plain(TUPLE, "no mark"),
        "a memo that is not there": plain(get(3), "value 3 is used before it is there"),
        "text that is no UTF-8": plain(b"X\x02\x00\x00\x00\xff\xfe", "is not UTF-8"),
        "a name without an end": plain(b"cos" + b"a" * 500, "the name at byte 3 does not end"),
        "a name of a number": plain(number(1) + number(2) + STACK_GLOBAL, "a name that is no string"),
        "an item for a string": plain(text("x") + NONE + APPEND, "a str where a list is filled"),
        "a key without a value": plain(DICT + MARK + text("a") + SETITEMS, "a key without a value"),
        "a key twice": plain(items((text("a"), NONE), (text("a"), TRUE)), "key a twice"),
        "a list as a key": plain(items((LIST, NONE)), "a list as a key"),
        "bytes behind the end": Hostile(P4 + DICT + STOP + b"more", "4 bytes behind the end"),
        "bytes behind the last storage": Hostile(legacy(storage()) + b"more", "4 bytes behind the last storage"),
        "a storage that nothing needs": Hostile(legacy(NONE), "storages announced are not those"),
        "another magic number": plain(
            call(*into, data(legacy(storage()).replace(b"\xfc\x9c", b"\xfc\x9d"))), "not the start"
        ),
    }  # fmt: skip


def small_files() -> dict[str, bytes]:
    """Return small valid files of every kind, to be damaged."""
    value = P2 + items((text("a"), tensor()), (text("b"), LIST + MARK + number(1) + NONE + APPENDS)) + STOP
    inner = data(legacy(storage()))
    return {
        "plain": P4 + items((text("a"), tensor(of=call("torch.storage", "_load_from_bytes", inner)))) + STOP,
        "archive": archive(value),
        "legacy": legacy(items((text("a"), tensor()))),
        "pickled": pickle.dumps({"a": [1, 2.5, "x", b"y", {"k": (None, True)}], "s": {1, 2}}, protocol=4),
    }


def write(folder: Path, content: bytes) -> Path:
    path = folder / "hostile.pkl"
    path.write_bytes(content)
    return path
