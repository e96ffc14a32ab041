"""Checkpoints in safetensors files, one or in shards."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from embpack.errors import FormatError
from embpack.sources.base import Checkpoint, Shard, SourceTensor
from embpack.sources.dtypes import ARRAY_DTYPES, PACKED_DTYPES
from embpack.sources.mapped import MappedFile, iter_mapped

INDEX_SUFFIX = ".safetensors.index.json"
_LENGTH_BYTES = 8


@contextmanager
def open_safetensors(path: Path) -> Iterator[Checkpoint]:
    """Map a safetensors file; its tensors are views of it.

    Raises:
        FormatError: it is not a safetensors file, or a damaged one.
    """
    yield Checkpoint(path, (_open_shard(path, path.name),))


@contextmanager
def open_sharded_safetensors(path: Path) -> Iterator[Checkpoint]:
    """Map the files that an index names.

    Args:
        path: of the index, "model.safetensors.index.json".

    Raises:
        FormatError: index and files do not agree, or one of them is damaged.
    """
    weight_map, left_out = _read_index(path)
    shards = [_open_shard(path.parent / name, name) for name in sorted(set(weight_map.values()))]
    _check_weight_map(path, weight_map, shards)
    yield Checkpoint(path, tuple(shards), path.name, left_out)


def _open_shard(path: Path, file_name: str) -> Shard:
    try:
        # The library is the judge of what is valid: offsets, shapes, types, overlaps.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise FormatError(f"{path}: {_diagnose(path, error)}") from error
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = _parse_json(path, file.read(header_bytes))
    metadata = header.pop("__metadata__", {})
    data_start = _LENGTH_BYTES + header_bytes
    mapped = MappedFile(path)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = [_make_tensor(path, mapped, data_start, name, entry) for name, entry in entries]
    return Shard(file_name, tuple(tensors), metadata)


def _make_tensor(
    path: Path, mapped: MappedFile, data_start: int, name: str, entry: dict[str, Any]
) -> SourceTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in ARRAY_DTYPES:
        raise FormatError(
            f"{path}: tensor {name!r} is {dtype}, a type that this version of embpack does not know"
        )
    start, stop = (data_start + offset for offset in entry["data_offsets"])
    if dtype in PACKED_DTYPES:
        return SourceTensor(name, shape, dtype, partial(_iter_packed, mapped, start, stop, shape))
    return SourceTensor(name, shape, dtype, partial(iter_mapped, mapped, start, shape, ARRAY_DTYPES[dtype]))


def _iter_packed(
    mapped: MappedFile, start: int, stop: int, shape: tuple[int, ...], n: int
) -> Iterator[NDArray[Any]]:
    """Yield the bytes of a type smaller than a byte, about n entries of axis 0 at a time."""
    num_bytes = stop - start
    step = max(1, n * num_bytes // max(1, shape[0] if shape else 1))
    return iter_mapped(mapped, start, (num_bytes,), np.dtype(np.uint8), step)


def _diagnose(path: Path, cause: SafetensorError) -> str:
    """Say what the library's error leaves out: sizes."""
    size = path.stat().st_size
    if size < _LENGTH_BYTES:
        return f"the file has {size} bytes, a safetensors file at least {_LENGTH_BYTES}; copy it again"
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        rest = size - _LENGTH_BYTES
        if header_bytes > rest:
            return f"header is {rest} bytes, the file promises {header_bytes}; it is truncated or not a safetensors file"
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
        return max((entry["data_offsets"][1] for name, entry in entries if name != "__metadata__"), default=0)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parse JSON that must be an object, without a name in it twice."""

    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = (
            next((name for name in names if names.count(name) > 1), None)
            if len(set(names)) < len(names)
            else None
        )
        if twice is not None:
            raise FormatError(f"{path}: {twice!r} is there twice; which one is meant cannot be told")
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=refuse_twice)
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise FormatError(f"{path}: holds a JSON {type(parsed).__name__}, not an object")
    return parsed


def _read_index(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return which file each tensor is in, and notes on what else the index says."""
    index = _parse_json(path, path.read_bytes())
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"{path}: has no weight_map that says which file each tensor is in; not a checkpoint's index"
        )
    for tensor_name, file_name in weight_map.items():
        _check_file_name(path, tensor_name, file_name)
    metadata = index.get("metadata")
    keys = metadata if isinstance(metadata, dict) else {}
    return weight_map, tuple(f"index metadata {key!r}" for key in keys if key != "total_size")


def _check_file_name(path: Path, tensor_name: str, file_name: Any) -> None:
    where = f"{path}: weight_map puts {tensor_name!r} into {file_name!r}"
    if not isinstance(file_name, str) or not file_name.endswith(".safetensors"):
        raise FormatError(f"{where}, which is not the name of a safetensors file")
    parts = PurePosixPath(file_name)
    if parts.is_absolute() or ".." in parts.parts:
        raise FormatError(f"{where}, which is outside the index's folder; such files are not read")
    if not (path.parent / file_name).is_file():
        raise FormatError(f"{where}, but there is no such file in {path.parent}; download it too")


def _check_weight_map(path: Path, weight_map: dict[str, str], shards: list[Shard]) -> None:
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in found:
                raise FormatError(
                    f"{path}: tensor {tensor.name!r} is both in {found[tensor.name]} and in {shard.file_name}"
                )
            found[tensor.name] = shard.file_name
    for name, file_name in weight_map.items():
        if found.get(name) != file_name:
            raise FormatError(
                f"{path}: weight_map puts {name!r} into {file_name}, but it is in {found.get(name, 'no file')}; "
                "index and files are of different checkpoints"
            )
