"""Writes plain checkpoints, in bounded memory and whole or not at all."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from embpack.atomic import new_file, new_folder
from embpack.errors import MissingExtraError
from embpack.targets.base import OutShard, OutTensor
from embpack.targets.numpy import write_npy, write_npz
from embpack.targets.safetensors import write_safetensors

__all__ = ["WRITERS", "OutShard", "OutTensor", "write_checkpoint", "write_safetensors"]

Writer = Callable[[BinaryIO, Path, OutShard], None]


def _write_safetensors(file: BinaryIO, path: Path, shard: OutShard) -> None:
    write_safetensors(file, shard)


def _write_torch(file: BinaryIO, path: Path, shard: OutShard) -> None:
    try:
        from embpack.targets.torch import write_torch
    except ImportError as error:
        raise MissingExtraError(f"writing {path.suffix} files", "PyTorch", "torch") from error
    write_torch(file, path, shard)


def _write_parquet(file: BinaryIO, path: Path, shard: OutShard) -> None:
    try:
        from embpack.targets.parquet import write_parquet
    except ImportError as error:
        raise MissingExtraError("writing .parquet files", "PyArrow", "parquet") from error
    write_parquet(file, path, shard)


WRITERS: dict[str, Writer] = {
    ".safetensors": _write_safetensors,
    ".pt": _write_torch,
    ".pth": _write_torch,
    ".bin": _write_torch,
    ".npy": write_npy,
    ".npz": write_npz,
    ".parquet": _write_parquet,
}
"""How a file is written, by the suffix of its name."""


def write_checkpoint(path: str | os.PathLike[str], shards: Sequence[OutShard], index_name: str | None = None) -> None:
    """Write a checkpoint of plain tensors: whole or not at all.

    Args:
        path: of the file, replaced if it exists, whose suffix (one of WRITERS) chooses the format; with
            index_name of the folder, which must be new or empty.
        shards: the files of the folder; without index_name just one. Only .pt, .pth and .bin need all of its
            tensors in memory. Only safetensors files have a place for metadata.
        index_name: of the index of a checkpoint in shards, "model.safetensors.index.json".

    Raises:
        FileExistsError: the folder is not empty.
        MissingExtraError: the format needs a package that is not installed.
        OSError: there is no space, or the place cannot be written; errno and message say which.
        ValueError: no format has such a name, it cannot hold one of the tensors, names are there twice, or
            chunks are not what their tensor promised.
    """
    path = Path(path)
    _refuse_twice(path, [tensor.name for shard in shards for tensor in shard.tensors])
    if index_name is not None:
        _write_shards(path, shards, index_name)
        return
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"{path}: the end of its name says no format; what can be written: {', '.join(WRITERS)}")
    if len(shards) != 1:
        raise ValueError(f"{path}: one file is to be written, but there are {len(shards)} shards; give an index_name")
    with new_file(path) as file:
        writer(file, path, shards[0])


def _refuse_twice(path: Path, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: there is more than one tensor named {twice[0]!r}; rename all but one")


def _write_shards(path: Path, shards: Sequence[OutShard], index_name: str) -> None:
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    with new_folder(path) as folder:
        for shard in shards:
            shard_path = folder / shard.file_name
            shard_path.parent.mkdir(parents=True, exist_ok=True)
            with shard_path.open("xb") as file:
                write_safetensors(file, shard)
        (folder / index_name).write_text(json.dumps(index, indent=2) + "\n")
