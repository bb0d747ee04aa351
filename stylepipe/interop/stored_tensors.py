"""Tensors of checkpoints as views of the file's bytes, and what the names in a checkpoint's pickles mean.

A tensor is pickled as a storage (elements of one type in a row), an offset, a size and strides; all four are checked
before a byte is read. Nothing is imported or called: plain_data.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stylepipe.interop.plain_data import Global, Record, RefusedError, checked_keys, shown

# Little-endian, as every machine that trains writes them.
STORAGE_TYPES: Mapping[str, np.dtype[Any]] = {
    f"torch.{kind}Storage": np.dtype(code)
    for kind, code in {
        "Double": "<f8",
        "Float": "<f4",
        "Half": "<f2",
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "?",
    }.items()
}
_TORCH_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
INERT = frozenset([*STORAGE_TYPES, "numpy.ndarray", *(f"torch.{name}" for name in _TORCH_DTYPES)])
"""Names that checkpoints mention."""
RECORDS = ("torch.nn.modules.", "argparse.Namespace")
"""Classes of which checkpoints have objects."""
_SCALAR_CODES = {"f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"}
_MAX_DIMENSIONS = 16
_MAX_SHARING = 2  # elements of tensors per element stored; equal filters may share


@dataclass(eq=False)
class Storage:
    """Elements of one type in a row."""

    dtype: np.dtype[Any]
    count: int
    read: Callable[[], memoryview]
    """Gives the bytes, count times the element's size of them."""

    @property
    def nbytes(self) -> int:
        """How many bytes the elements take."""
        return self.count * self.dtype.itemsize


@dataclass(eq=False)
class StoredTensor:
    """A view of a storage that lies within it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Read the elements: an array of this size, read-only.

        Raises:
            RefusedError: it is empty, or the file is damaged there.
        """
        if 0 in self.size:
            raise RefusedError("an empty tensor among the weights")
        step = self.storage.dtype.itemsize
        strides = [stride * step for stride in self.stride]
        return np.ndarray(self.size, self.storage.dtype, self.storage.read(), self.offset * step, strides)


def read_arrays(tensors: Mapping[str, StoredTensor]) -> dict[str, np.ndarray]:
    """Read tensors, by name; they are views of the file's bytes.

    Raises:
        RefusedError: one is empty or damaged, or so many share one storage that copies of them would be far larger
            than the file.
    """
    stored = sum({id(tensor.storage): tensor.storage.count for tensor in tensors.values()}.values())
    if sum(math.prod(tensor.size) for tensor in tensors.values()) > _MAX_SHARING * stored:
        raise RefusedError("weights that are all the same numbers of the file")
    return {name: tensor.array() for name, tensor in tensors.items()}


def storage_type(name: Any) -> np.dtype[Any]:
    """Return the element type of a storage class.

    Raises:
        RefusedError: it is none.
    """
    if not isinstance(name, Global) or name.name not in STORAGE_TYPES:
        raise RefusedError("damaged: a storage without a type")
    return STORAGE_TYPES[name.name]


def _rebuild_tensor(args: tuple[Any, ...]) -> StoredTensor:
    match args:
        case (Storage() as storage, int() as offset, tuple() as size, tuple() as stride, _, _):
            pass
        case (Storage() as storage, int() as offset, tuple() as size, tuple() as stride, _, _, _):
            pass
        case _:
            raise RefusedError("damaged: a tensor without storage, offset, size or strides")
    if len(size) != len(stride) or len(size) > _MAX_DIMENSIONS:
        raise RefusedError(f"damaged: a tensor of {len(size)} dimensions with {len(stride)} strides")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, *size, *stride)):
        raise RefusedError("damaged: a tensor with a negative size, stride or offset")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > storage.count or (count > 0 and last >= storage.count):
        raise RefusedError(f"a tensor that reaches beyond its storage of {storage.count:,} elements")
    # Nothing reads the stride of a length of 1, so it may be anything, more than NumPy takes included.
    return StoredTensor(
        storage, offset, size, tuple(0 if n == 1 else step for n, step in zip(size, stride, strict=True))
    )


def _rebuild_parameter(args: tuple[Any, ...]) -> StoredTensor:
    match args:
        case (StoredTensor() as tensor, _, _):
            return tensor
    raise RefusedError("damaged: a parameter that is no tensor")


def _rebuild_persistent(args: tuple[Any, ...]) -> Record:
    """Take what NVIDIA's persistent classes reduce to as data; the source code that comes with it is left alone."""
    match args:
        case ({"type": "class", "class_name": str() as class_name, "state": dict() as state},):
            return Record(class_name, (), state)
    raise RefusedError("damaged: a persistent object without type, class_name or state")


def _empty_dict(args: tuple[Any, ...]) -> dict[str, Any]:
    if args:
        raise RefusedError("damaged: a dictionary made with arguments")
    return {}


def _set(args: tuple[Any, ...]) -> set[Any]:
    match args:
        case (list() as items,):
            return set(checked_keys(items))
    raise RefusedError("damaged: a set that is not made of a list")


def _size(args: tuple[Any, ...]) -> tuple[Any, ...]:
    match args:
        case (tuple() as size,):
            return size
    raise RefusedError("damaged: a torch.Size that is not made of a tuple")


def _device(args: tuple[Any, ...]) -> str:
    match args:
        case (str() as kind,) | (str() as kind, int()):
            return kind
    raise RefusedError("damaged: a torch.device without a name")


def _numpy_type(args: tuple[Any, ...]) -> Record:
    return Record("numpy.dtype", args)


def _numpy_array(args: tuple[Any, ...]) -> Record:
    return Record("numpy.ndarray")


def _numpy_scalar(args: tuple[Any, ...]) -> Any:
    match args:
        case (
            Record(class_name="numpy.dtype", args=(str() as code, *_), state=(int(), "<" | "|", *_)),
            memoryview() as data,
        ) if code in _SCALAR_CODES and len(data) == np.dtype(code).itemsize:
            return np.frombuffer(data, f"<{code}")[0].item()
        case (Record(class_name="numpy.dtype", args=(str() as code, *_)), _):
            raise RefusedError(f"a NumPy number of type {shown(code)}; expected a little-endian one")
    raise RefusedError("damaged: a NumPy number without a type")


CALLS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _empty_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "dnnlib.util.EasyDict": _empty_dict,
    "torch_utils.persistence._reconstruct_persistent_obj": _rebuild_persistent,
}
"""What checkpoints call, and what is done instead."""
