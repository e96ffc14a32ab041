"""Safetensors files: mapped where they are read, written as a stream."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from embpack.errors import FormatError
from embpack.formats.base import Checkpoint, OutShard, Shard, SourceTensor, as_bytes, iter_checked, refuse_repeated
from embpack.formats.dtypes import ARRAY_DTYPES, PACKED_DTYPES, count_bytes
from embpack.formats.mapped import FileMap, MappedArray

_LENGTH_BYTES = 8
_ALIGNMENT = 8
# The library opens no file with a longer one.
_MAX_HEADER_BYTES = 100_000_000
_METADATA_KEY = "__metadata__"


@contextmanager
def open_safetensors(path: Path) -> Iterator[Checkpoint]:
    """Map a safetensors file; its tensors are views of it.

    Raises:
        FormatError: it is not a safetensors file, or a damaged one.
    """
    yield Checkpoint(path, (map_shard(path, path.name),))


def map_shard(path: Path, file_name: str) -> Shard:
    """Check a safetensors file and map it, as the part file_name of a checkpoint.

    Raises:
        FormatError: it is not a safetensors file, or a damaged one.
    """
    try:
        # The library is the judge of what is valid: offsets, shapes, types, overlaps.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise FormatError(f"{path}: {_diagnose(path, error)}") from error
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = parse_object(path, file.read(header_bytes))
    metadata = header.pop(_METADATA_KEY, None) or {}
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    mapped, data_start = FileMap(path), _LENGTH_BYTES + header_bytes
    tensors = [_make_tensor(path, mapped, data_start, name, entry) for name, entry in entries]
    return Shard(file_name, tuple(tensors), metadata)


def _make_tensor(path: Path, mapped: FileMap, data_start: int, name: str, entry: dict[str, Any]) -> SourceTensor:
    dtype, shape, start = entry["dtype"], tuple(entry["shape"]), data_start + entry["data_offsets"][0]
    if dtype not in ARRAY_DTYPES:
        raise FormatError(f"{path}: tensor {name!r} is {dtype}, which this embpack does not know; update it")
    if dtype in PACKED_DTYPES:
        data = MappedArray(mapped, start, (count_bytes(dtype, shape),), ARRAY_DTYPES[dtype])
        return SourceTensor(name, shape, dtype, partial(_iter_packed, data, shape[0] if shape else 1))
    return SourceTensor(name, shape, dtype, MappedArray(mapped, start, shape, ARRAY_DTYPES[dtype]).iter_rows)


def _iter_packed(data: MappedArray, num_rows: int, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
    """Yield the bytes of rows [start, stop) of a type smaller than a byte, about n rows at a time."""
    [num_bytes] = data.shape
    step = max(1, n * num_bytes // num_rows)
    return data.iter_rows(start * num_bytes // num_rows, stop * num_bytes // num_rows, step)


def _diagnose(path: Path, cause: SafetensorError) -> str:
    """Say what the library's error leaves out: sizes."""
    size = path.stat().st_size
    if size < _LENGTH_BYTES:
        return f"the file has {size} bytes, a safetensors file at least {_LENGTH_BYTES}; copy it again"
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        rest = size - _LENGTH_BYTES
        if header_bytes > rest:
            return (
                f"{rest} bytes are left for a header of {header_bytes}; the file is truncated or not a safetensors file"
            )
        header = file.read(header_bytes)
    payload, promised = rest - header_bytes, _promised_bytes(header)
    if promised is None or payload == promised:
        return str(cause)
    verdict = "truncated" if payload < promised else "damaged"
    return f"payload is {payload} bytes, header promises {promised}; the file is {verdict}, copy it again"


def _promised_bytes(header: bytes) -> int | None:
    """Return where the last tensor ends; None where the header does not say."""
    try:
        entries = json.loads(header).items()
        return int(max((entry["data_offsets"][1] for name, entry in entries if name != _METADATA_KEY), default=0))
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None


def parse_object(path: Path, text: bytes) -> dict[str, Any]:
    """Parse JSON that must be an object in which no name is there twice.

    Raises:
        FormatError: it is not.
    """

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_repeated(path, [name for name, _ in pairs])
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=make_object)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise FormatError(f"{path}: holds a JSON {type(parsed).__name__}, not an object")
    return parsed


def write_safetensors(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Write a safetensors file whose metadata is known only at its end.

    A header is reserved first, the tensors follow in the order given and without holes, from a multiple of 8
    bytes on, then the header is filled in.

    Args:
        file: open for writing, seekable, at its start.
        path: what errors call it.
        shard: what to write.

    Raises:
        ValueError: a tensor's chunks are not what it promised, a tensor has the metadata's name, or the
            metadata takes more than metadata_room.
    """
    entries = _place_tensors(path, shard)
    reserved = _reserve(entries, shard.metadata_room)
    if reserved > _MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: {len(entries)} tensors take a header of {reserved} bytes, but a safetensors file has at most "
            f"{_MAX_HEADER_BYTES}; write several files"
        )
    file.write(reserved.to_bytes(_LENGTH_BYTES, "little") + b" " * reserved)
    for tensor in shard.tensors:
        for chunk in iter_checked(tensor):
            file.write(as_bytes(chunk))
    file.seek(_LENGTH_BYTES)
    file.write(_make_header(path, entries, shard, reserved))


def _place_tensors(path: Path, shard: OutShard) -> dict[str, object]:
    """Make the header's entry of each tensor."""
    entries: dict[str, object] = {}
    end = 0
    for tensor in shard.tensors:
        if tensor.name == _METADATA_KEY:
            raise ValueError(f"{path}: a tensor cannot be named {_METADATA_KEY!r} in a safetensors file")
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    return entries


def _reserve(entries: dict[str, object], metadata_room: int) -> int:
    """Bytes of a header that has room for metadata and ends where data may start."""
    # An empty dict stands for the metadata: its key and comma are counted, and its own two bytes are room to spare.
    needed = len(_encode({_METADATA_KEY: {}, **entries})) + metadata_room
    return needed + -(_LENGTH_BYTES + needed) % _ALIGNMENT


def _make_header(path: Path, entries: dict[str, object], shard: OutShard, reserved: int) -> bytes:
    metadata = shard.metadata()
    header = _encode({_METADATA_KEY: metadata, **entries} if metadata else entries)
    if len(header) > reserved:
        raise ValueError(
            f"{path}: the metadata is {len(_encode(metadata))} bytes, but room was kept for {shard.metadata_room}"
        )
    return header.ljust(reserved)


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
