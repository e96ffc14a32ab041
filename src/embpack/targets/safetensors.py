"""Writes safetensors files as a stream."""

import json
from typing import BinaryIO

from embpack.targets.base import OutShard, as_bytes, iter_checked

_ALIGNMENT = 8
_LENGTH_BYTES = 8
_METADATA_KEY = "__metadata__"


def write_safetensors(file: BinaryIO, shard: OutShard) -> None:
    """Write a safetensors file whose metadata is known only at its end.

    A header is reserved first, the tensors follow in the order given and without holes, from a multiple of 8
    bytes on, then the header is filled in.

    Args:
        file: open for writing, seekable, at its start.
        shard: what to write.

    Raises:
        ValueError: a tensor's chunks are not what it promised, a tensor has the metadata's name, or the
            metadata takes more than metadata_room.
    """
    entries = _place_tensors(shard)
    reserved = _reserve(entries, shard.metadata_room)
    file.write(reserved.to_bytes(_LENGTH_BYTES, "little") + b" " * reserved)
    for tensor in shard.tensors:
        for chunk in iter_checked(tensor):
            file.write(as_bytes(chunk))
    file.seek(_LENGTH_BYTES)
    file.write(_make_header(entries, shard, reserved))


def _place_tensors(shard: OutShard) -> dict[str, object]:
    """Make the header's entry of each tensor."""
    entries: dict[str, object] = {}
    end = 0
    for tensor in shard.tensors:
        if tensor.name == _METADATA_KEY:
            raise ValueError(f"{shard.file_name}: a tensor cannot be named {_METADATA_KEY!r} in a safetensors file")
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    return entries


def _reserve(entries: dict[str, object], metadata_room: int) -> int:
    """Bytes of a header that has room for metadata and ends where data may start."""
    # An empty dict stands for the metadata; its key and comma are counted, its two bytes to the good.
    needed = len(_encode({_METADATA_KEY: {}, **entries})) + metadata_room
    return needed + -(_LENGTH_BYTES + needed) % _ALIGNMENT


def _make_header(entries: dict[str, object], shard: OutShard, reserved: int) -> bytes:
    metadata = shard.metadata()
    header = _encode({_METADATA_KEY: metadata, **entries} if metadata else entries)
    if len(header) > reserved:
        raise ValueError(
            f"{shard.file_name}: the metadata is {len(_encode(metadata))} bytes, but room was kept for "
            f"{shard.metadata_room}"
        )
    return header.ljust(reserved)


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
