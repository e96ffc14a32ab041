"""State dicts of torch.save and torch.load; only plain weights, no pickle is ever run."""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.base import (
    Checkpoint,
    OutShard,
    OutTensor,
    Shard,
    SourceTensor,
    as_bytes,
    iter_checked,
    refuse_dtypes,
)
from embpack.formats.dtypes import ARRAY_DTYPES
from embpack.formats.mapped import find_mappings, release_addresses
from embpack.formats.source import SourceFile
from embpack.formats.stored import iter_slices

DTYPES = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""PyTorch's type of each safetensors name that it can hold."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RAW = {torch.bfloat16: torch.uint16} | {dtype: torch.uint8 for name, dtype in DTYPES.items() if name.startswith("F8")}
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_ZIP_MAGIC = b"PK\x03\x04"
_ADVICE = "save the weights alone with torch.save(model.state_dict(), path)"


@contextmanager
def open_torch(path: Path) -> Iterator[Checkpoint]:
    """Load a state dict, mapped from the file unless that is of the format before PyTorch 1.6.

    Raises:
        FormatError: it is not a plain dict of tensors, or damaged.
    """
    with SourceFile(path) as source:
        state, left_out = _choose_state(path, _load(path))
        mappings = find_mappings(path)
        tensors = []
        for name, value in state.items():
            reason = _why_left_out(value)
            if reason:
                left_out.append(f"entry {name!r} ({reason})")
                continue
            if not isinstance(name, str):
                raise FormatError(f"{path}: the name of a tensor is {name!r}, not a string; rename it and save again")
            tensors.append(_make_tensor(name, value.detach(), mappings, source))
        yield Checkpoint(path, (Shard(path.name, source.size, tuple(tensors)),), left_out=tuple(left_out))


def _load(path: Path) -> object:
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, MemoryError, Warning):  # PyTorch's warnings are errors to those who want it so
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found[1]}" if found else "it holds more than tensors, or is damaged"
        raise FormatError(
            f"{path}: not a plain state dict: {what}, and arbitrary pickles are never run; {_ADVICE}"
        ) from error
    except Exception as error:  # whatever reading garbage may raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path}: not a file of torch.save, or damaged: {first_line}") from error


def _choose_state(path: Path, loaded: object) -> tuple[dict[Any, Any], list[str]]:
    """Find the dict of tensors, and note what is beside it."""
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: holds a {_describe(loaded)}, not a dict of tensors by name; {_ADVICE}")
    if _has_tensors(loaded):
        return loaded, []
    wrappers = [key for key in _WRAPPERS if _has_tensors(loaded.get(key))]
    if len(wrappers) != 1:
        keys = ", ".join(repr(key) for key in list(loaded)[:8]) or "nothing"
        found = f"dicts of tensors under {wrappers}" if wrappers else f"no tensors, but {keys}"
        raise FormatError(f"{path}: holds a dict with {found}; {_ADVICE}")
    beside = [f"entry {key!r} ({_describe(value)})" for key, value in loaded.items() if key != wrappers[0]]
    return loaded[wrappers[0]], beside


def _has_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, torch.Tensor) for item in value.values())


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor of shape {list(value.shape)}"
    return type(value).__name__


def _why_left_out(value: object) -> str | None:
    """Say why a value of a state dict cannot be carried over; None if it can."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_quantized:
        return "quantized tensor; save its .dequantize()"
    if value.layout != torch.strided or value.is_nested:
        return "sparse or nested tensor; save its .to_dense()"
    if value.device.type != "cpu":
        return f"tensor on the {value.device.type} device, without values"
    if value.dtype not in _NAMES:
        return f"tensor of {str(value.dtype).removeprefix('torch.')}"
    return None


def _make_tensor(name: str, tensor: torch.Tensor, mappings: list[range], source: SourceFile) -> SourceTensor:
    storage = tensor.untyped_storage()
    start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    is_mapped = any(mapping.start <= start and stop <= mapping.stop for mapping in mappings)
    read = partial(_iter_tensor, tensor, is_mapped=is_mapped)
    return SourceTensor(name, tuple(tensor.shape), _NAMES[tensor.dtype], read, source)


def _iter_tensor(tensor: torch.Tensor, start: int, stop: int, n: int, *, is_mapped: bool) -> Iterator[NDArray[Any]]:
    if tensor.ndim == 0:
        yield _as_array(tensor)
        return
    for rows in iter_slices(start, stop, n):
        chunk = tensor[rows]
        yield _as_array(chunk)
        if is_mapped:
            _release(chunk)


def _as_array(tensor: torch.Tensor) -> NDArray[Any]:
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    raw = _RAW.get(tensor.dtype)
    return plain.numpy() if raw is None else plain.view(raw).numpy()


def _release(chunk: torch.Tensor) -> None:
    if chunk.is_contiguous():
        start, size = chunk.data_ptr(), chunk.nbytes
    else:  # strided: its values are spread over all of the storage
        storage = chunk.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
    if size:
        release_addresses(start, start + size)


def write_torch(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Save a plain dict of tensors; all of them are in memory at once, torch.save wants it so.

    Raises:
        ValueError: PyTorch has no such type.
    """
    refuse_dtypes(path, shard, DTYPES, "write .safetensors")
    state = {tensor.name: _collect(tensor) for tensor in shard.tensors}
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # PyTorch's own error when writing to the file fails hides the reason.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _collect(tensor: OutTensor) -> torch.Tensor:
    array = np.empty(tensor.shape, ARRAY_DTYPES[tensor.dtype])
    values, filled = as_bytes(array), 0
    for chunk in iter_checked(tensor):
        values[filled : filled + chunk.nbytes] = as_bytes(chunk)
        filled += chunk.nbytes
    return torch.from_numpy(array).view(DTYPES[tensor.dtype])
