"""Safetensors files: checked and read through one descriptor, written as a stream."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.base import (
    Checkpoint,
    OutShard,
    Shard,
    SourceTensor,
    as_bytes,
    is_utf8,
    iter_checked,
    refuse_repeated,
)
from embpack.formats.dtypes import ARRAY_DTYPES, PACKED_DTYPES, count_bytes, is_whole
from embpack.formats.source import SourceFile, make_source
from embpack.formats.stored import StoredArray

_LENGTH_BYTES = 8
# The library opens no file with a longer one.
_MAX_HEADER_BYTES = 100_000_000
# NumPy has no more.
_MOST_DIMENSIONS = 64
_METADATA_KEY = "__metadata__"


@contextmanager
def open_safetensors(path: Path) -> Iterator[Checkpoint]:
    """Open a safetensors file.

    Raises:
        FormatError: it is not a safetensors file, or a damaged one.
    """
    source = make_source(path)
    with source:
        yield Checkpoint(path, (read_shard(source, path.name),))


def read_shard(source: SourceFile, file_name: str) -> Shard:
    """Check a safetensors file that is open, and make it the part file_name of a checkpoint.

    Raises:
        FormatError: it is not a safetensors file, or a damaged one.
    """
    path, header_bytes = source.path, _read_length(source)
    header = parse_object(path, source.read(_LENGTH_BYTES, header_bytes))
    metadata = header.pop(_METADATA_KEY, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise FormatError(f"{path}: {_METADATA_KEY} in its header is no object of strings; the file is damaged")
    start, end = _LENGTH_BYTES + header_bytes, 0
    tensors = []
    for name, entry in _sort_entries(path, header):
        tensors.append(_make_tensor(source, start, end, name, entry))
        end += tensors[-1].nbytes
    payload = source.size - start
    if payload != end:
        verdict = "truncated" if payload < end else "damaged"
        raise FormatError(
            f"{path}: payload is {payload} bytes, header promises {end}; the file is {verdict}, copy it again"
        )
    return Shard(file_name, source.size, tuple(tensors), metadata)


def _read_length(source: SourceFile) -> int:
    """Read how many bytes the header has, which are there."""
    path, rest = source.path, source.size - _LENGTH_BYTES
    if rest < 0:
        raise FormatError(
            f"{path}: the file has {source.size} bytes, a safetensors file at least {_LENGTH_BYTES}; copy it again"
        )
    header_bytes = int.from_bytes(source.read(0, _LENGTH_BYTES), "little")
    if header_bytes > rest:
        raise FormatError(
            f"{path}: {rest} bytes are left for a header of {header_bytes}; the file is truncated or not a safetensors "
            "file"
        )
    if header_bytes > _MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: its header has {header_bytes} bytes, and safetensors allows {_MAX_HEADER_BYTES}; it is not a "
            "safetensors file, or damaged"
        )
    return header_bytes


def _sort_entries(path: Path, header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the tensors' entries in the order in which they lie in the file."""
    for name, entry in header.items():
        if not is_utf8(name):
            raise FormatError(f"{path}: tensor {name!r} has a name that is not Unicode; rename it and save again")
        known = isinstance(entry, dict) and _is_text(entry.get("dtype"))
        sizes = known and all(_are_sizes(entry.get(key)) for key in ("shape", "data_offsets"))
        if not sizes or len(entry["data_offsets"]) != 2:
            raise FormatError(f"{path}: the header's entry of tensor {name!r} is damaged: {entry!r:.200}")
    return sorted(header.items(), key=lambda item: item[1]["data_offsets"])


def _is_text(value: object) -> bool:
    """Whether JSON's value is a string of Unicode; its escapes can name halves of characters."""
    return isinstance(value, str) and is_utf8(value)


def _are_sizes(value: object) -> bool:
    """Whether JSON's value is a list of sizes, of no more dimensions than NumPy has."""
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return False
    return all(type(each) is int and 0 <= each < 1 << 64 for each in value)


def _make_tensor(source: SourceFile, data_start: int, begin: int, name: str, entry: dict[str, Any]) -> SourceTensor:
    """Make the tensor whose bytes must follow those before it, which end at begin."""
    path, dtype, shape, (start, stop) = source.path, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in ARRAY_DTYPES:
        raise FormatError(f"{path}: tensor {name!r} is {dtype!r:.50}, which this embpack does not know; update it")
    if start != begin:
        raise FormatError(
            f"{path}: tensor {name!r} begins at byte {start} of the payload, but what is before it ends at {begin}; "
            "the file is damaged"
        )
    size = count_bytes(dtype, shape)
    if stop - start != size or not is_whole(dtype, shape):
        raise FormatError(
            f"{path}: tensor {name!r} has {stop - start} bytes, but {dtype} of shape {list(shape)} takes {size}; the "
            "file is damaged"
        )
    if dtype in PACKED_DTYPES:
        stored = StoredArray(source, data_start + start, (size,), ARRAY_DTYPES[dtype])
        read = partial(_iter_packed, stored, shape[0] if shape else 1)
        return SourceTensor(name, shape, dtype, read, source, stored=stored)
    stored = StoredArray(source, data_start + start, shape, ARRAY_DTYPES[dtype])
    return SourceTensor(name, shape, dtype, stored.iter_rows, source, stored=stored)


def _iter_packed(stored: StoredArray, num_rows: int, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
    """Yield the bytes of rows [start, stop) of a type smaller than a byte, about n rows at a time."""
    [num_bytes] = stored.shape
    step = max(1, n * num_bytes // num_rows)
    return stored.iter_rows(start * num_bytes // num_rows, stop * num_bytes // num_rows, step)


def parse_object(path: Path, text: bytes) -> dict[str, Any]:
    """Parse JSON, UTF-8, that must be an object in which no name is there twice.

    Raises:
        FormatError: it is not.
    """

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_repeated(path, [name for name, _ in pairs])
        return dict(pairs)

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=make_object, parse_constant=refuse_constant)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise FormatError(f"{path}: holds a JSON {type(parsed).__name__}, not an object")
    return parsed


def count_file_bytes(path: Path, shard: OutShard) -> int:
    """Bytes of the file that write_safetensors writes: its header has the room that was kept, needed or not.

    Raises:
        ValueError: a tensor has the metadata's name, or the header is longer than a file may have.
    """
    return _LENGTH_BYTES + _reserve(path, shard) + sum(tensor.nbytes for tensor in shard.tensors)


def write_safetensors(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Write a safetensors file whose metadata is known only at its end.

    A header is reserved first, the tensors follow in the order given and without holes, from a multiple of
    shard.alignment bytes on, then the header is filled in.

    Args:
        file: open for writing, seekable, at its start.
        path: what errors call it.
        shard: what to write.

    Raises:
        ValueError: a tensor's chunks are not what it promised, a tensor has the metadata's name, or the
            metadata takes more than metadata_room.
    """
    reserved = _reserve(path, shard)
    file.write(reserved.to_bytes(_LENGTH_BYTES, "little") + b" " * reserved)
    for tensor in shard.tensors:
        for chunk in iter_checked(tensor):
            file.write(as_bytes(chunk))
    file.seek(_LENGTH_BYTES)
    file.write(_make_header(path, shard, reserved))


def replace_metadata(descriptor: int, path: Path, metadata: dict[str, str]) -> None:
    """Give a safetensors file, which was read before, other metadata in the place of its own.

    Args:
        descriptor: of the file, open to read and to write.
        path: what errors call it.
        metadata: all of the new one.

    Raises:
        ValueError: it takes more room than there is.
    """
    reserved = int.from_bytes(os.pread(descriptor, _LENGTH_BYTES, 0), "little")
    header = parse_object(path, os.pread(descriptor, reserved, _LENGTH_BYTES))
    text = _encode({**header, _METADATA_KEY: metadata})
    if len(text) > reserved:
        raise ValueError(
            f"{path}: its header has {reserved} bytes, but {len(text)} are needed; write the file anew: "
            "embpack.save(path, embpack.load(path))"
        )
    os.pwrite(descriptor, text.ljust(reserved), _LENGTH_BYTES)


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


def _reserve(path: Path, shard: OutShard) -> int:
    """Bytes of a header that has room for metadata and ends where data may start."""
    entries = _place_tensors(path, shard)
    # An empty dict stands for the metadata: its key and comma are counted, and its own two bytes are room to spare.
    needed = len(_encode({_METADATA_KEY: {}, **entries})) + shard.metadata_room
    reserved = needed + -(_LENGTH_BYTES + needed) % shard.alignment
    if reserved > _MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: {len(entries)} tensors take a header of {reserved} bytes, but a safetensors file has at most "
            f"{_MAX_HEADER_BYTES}; write several files"
        )
    return reserved


def bound_bytes(shard: OutShard, most: int) -> int:
    """Count the bytes that write_safetensors writes, or some more: as many for each tensor, whatever the others are.

    Args:
        shard: what is written.
        most: the payload is not larger; tensors may lie anywhere in it.
    """
    entries: dict[str, object] = {
        tensor.name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [most, most]}
        for tensor in shard.tensors
    }
    header = len(_encode({_METADATA_KEY: {}, **entries})) + shard.metadata_room
    return _LENGTH_BYTES + header + shard.alignment + sum(tensor.nbytes for tensor in shard.tensors)


def _make_header(path: Path, shard: OutShard, reserved: int) -> bytes:
    entries, metadata = _place_tensors(path, shard), shard.metadata()
    header = _encode({_METADATA_KEY: metadata, **entries} if metadata else entries)
    if len(header) > reserved:
        raise ValueError(
            f"{path}: the metadata is {len(_encode(metadata))} bytes, but room was kept for {shard.metadata_room}"
        )
    return header.ljust(reserved)


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
