"""Tensors of a file of torch.save: views of its storages, read without making them."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.dtypes import ARRAY_DTYPES
from embpack.formats.pickled import Made, Named, Outside
from embpack.formats.source import SourceFile
from embpack.formats.stored import StoredArray, StridedArray
from embpack.formats.torch_file import SavedFile, Storage

NAMES = {
    "BOOL": "bool",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
"""PyTorch's name of the type that has each safetensors name."""

TAGS = {name: tag for tag, name in NAMES.items()}
"""Safetensors name of PyTorch's type."""

_PLAIN_CLASSES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
# A parameter with attributes is wrapped twice.
_MOST_WRAPPERS = 4
_REASONS = {
    "_rebuild_sparse_tensor": "sparse or nested tensor; save its .to_dense()",
    "_rebuild_nested_tensor": "sparse or nested tensor; save its .to_dense()",
    "_rebuild_qtensor": "quantized tensor; save its .dequantize()",
    "_rebuild_meta_tensor_no_storage": "tensor on the meta device, without values",
}


@dataclass(frozen=True)
class View:
    """A tensor.

    Attributes:
        tag: safetensors name of its type.
        shape: of the tensor.
        strides: from one entry to the next, for each dimension, in bytes.
        offset: of its first value in the file.
        storage: which its values are part of.
        conjugated, negated: what is to be done to each value.
    """

    tag: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: Storage
    conjugated: bool = False
    negated: bool = False


def is_tensor(value: object) -> bool:
    """Whether a value of a pickle would be a tensor."""
    match value:
        case Made(maker=Named(module="torch._utils" | "torch._tensor", name=name)):
            return name.startswith("_rebuild_")
    return False


def describe_tensor(tensor: object) -> str:
    """Say what a tensor is, with its shape if it is a plain one."""
    match _unwrap(tensor):
        case Made(
            Named("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3"),
            (_, _, tuple(shape), *_),
        ):
            return f"tensor of shape {list(shape)}"
    return "tensor"


def view_tensor(saved: SavedFile, name: object, tensor: object) -> View | str:
    """Return what a tensor is a view of, or in words why it cannot be read; name: what errors call it.

    Raises:
        FormatError: it is a view of values that the file does not have.
    """
    match _unwrap(tensor):
        case Made(Named("torch._utils", "_rebuild_tensor"), (storage, *place)):
            return _make_view(saved, name, storage, place, None, None)
        case Made(Named("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, _, _, *rest)):
            return _make_view(saved, name, storage, [offset, shape, strides], None, *rest[:1])
        case Made(
            Named("torch._utils", "_rebuild_tensor_v3"),
            (storage, offset, shape, strides, _, _, Named("torch", dtype), *rest),
        ):
            return _make_view(saved, name, storage, [offset, shape, strides], dtype, *rest[:1])
        case Made(Named(_, maker)) if maker in _REASONS:
            return _REASONS[maker]
        case Made(Named("torch._tensor", _), (_, tensor_class, *_)):
            return f"tensor of the class {tensor_class}"
    return "tensor of a class of its own, or of another device; save a plain one"


def _unwrap(tensor: object) -> object:
    """Take off what makes a tensor a parameter, or gives it attributes."""
    for _ in range(_MOST_WRAPPERS):
        match tensor:
            case Made(Named("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"), (inner, *_)):
                tensor = inner
            case Made(Named("torch._tensor", "_rebuild_from_type_v2"), (maker, tensor_class, arguments, *_)) if (
                str(tensor_class) in _PLAIN_CLASSES
            ):
                tensor = Made(maker, arguments)
    return tensor


def _make_view(
    saved: SavedFile, name: object, outside: object, place: list[object], dtype: str | None, metadata: object = None
) -> View | str:
    storage = saved.find_storage(outside) if isinstance(outside, Outside) else None
    match place:
        case [int(offset), tuple(shape), tuple(strides)] if storage and _are_sizes(offset, *shape, *strides):
            pass
        case _:
            return "tensor of values that are not known"
    tag = TAGS.get(dtype or storage.dtype)
    if tag is None or len(shape) != len(strides):
        return f"tensor of {dtype or storage.dtype}"
    item_bytes = ARRAY_DTYPES[tag].itemsize
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * item_bytes > storage.nbytes:
        raise FormatError(
            f"{saved.path}: tensor {name!r} of shape {list(shape)} and strides {list(strides)} ends at byte "
            f"{(last + 1) * item_bytes} of {storage.nbytes}; the file is damaged, copy it again"
        )
    marks = metadata if isinstance(metadata, dict) else {}
    byte_strides = tuple(stride * item_bytes for stride in strides)
    start = storage.offset + offset * item_bytes
    return View(tag, shape, byte_strides, start, storage, bool(marks.get("conj")), bool(marks.get("neg")))


def _are_sizes(*values: object) -> bool:
    return all(isinstance(value, int) and value >= 0 for value in values)


@dataclass
class ViewReader:
    """Reads the rows of a view.

    Attributes:
        view: of a storage.
        source: the file.
        dtype: of the values in the file, in its byte order.
    """

    view: View
    source: SourceFile
    dtype: np.dtype[Any]
    # How many rows were read one after the other from the first on, and their checksum. It is the same whoever has read
    # them, so that tables in pieces, which are read a few rows at a call, are checked, and threads may read at once.
    _checked: tuple[int, int] = (0, 0)

    @property
    def stored(self) -> StoredArray | None:
        """Where the values lie, if they lie there as in memory."""
        view = self.view
        expected = self.dtype.itemsize
        for length, stride in zip(view.shape[::-1], view.strides[::-1], strict=True):
            if length > 1 and stride != expected:
                return None
            expected *= length
        if view.conjugated or view.negated:
            return None
        return StoredArray(self.source, view.offset, view.shape, self.dtype)

    def iter_rows(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        """Yield rows [start, stop), n at a time, in memory of their own and the machine's byte order.

        Raises:
            FormatError: all rows were read, in order, in one call or several, of a tensor that is all of its storage,
                and its bytes have another checksum.
        """
        stored = self.stored
        if stored is None:
            yield from self._iter_strided(start, stop, n)
            return
        promised, end, length = self.view.storage.checksum, start, (self.view.shape or (1,))[0]
        size = math.prod(self.view.shape) * self.dtype.itemsize
        has_checksum = promised is not None and self.dtype.isnative and size == self.view.storage.nbytes
        for rows in stored.iter_rows(start, stop, n):
            at, end = end, end + (len(rows) if rows.ndim else 1)
            done, checksum = self._checked if at else (0, 0)
            if has_checksum and at == done:
                self._checked = end, zlib.crc32(rows.reshape(-1).view(np.uint8).data, checksum)
            yield rows
        done, checksum = self._checked
        if has_checksum and done == end == length and checksum != promised:
            raise FormatError(
                f"{self.source.path}: the {size} bytes from {self.view.offset} on do not agree with their checksum; "
                "the file is damaged, copy it again"
            )

    def _iter_strided(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        view = self.view
        strided = StridedArray(self.source, view.offset, view.shape, view.strides, self.dtype)
        for rows in strided.iter_rows(start, stop, n):
            if view.conjugated:
                np.conjugate(rows, out=rows)
            if view.negated:
                np.negative(rows, out=rows)
            yield rows
