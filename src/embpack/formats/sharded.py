"""Checkpoints in several safetensors files with an index."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from embpack.errors import FormatError
from embpack.formats.atomic import create, sync
from embpack.formats.base import Checkpoint, OutFolder, OutShard, Shard
from embpack.formats.new_folder import Keeper, ListOwn, new_folder
from embpack.formats.rank_files import list_metadata
from embpack.formats.safetensors import parse_object, read_shard, write_safetensors
from embpack.formats.source import make_source

MakeFiles = Callable[[Mapping[int, Path]], Iterator[int]]
"""Makes files with tensors, by their numbers and where they are to lie; yields numbers as files are whole."""

INDEX_SUFFIX = ".safetensors.index.json"
_BIN_INDEX_SUFFIX = ".bin.index.json"


@contextmanager
def open_sharded(path: Path) -> Iterator[Checkpoint]:
    """Map the files that an index names.

    Args:
        path: of the index, "model.safetensors.index.json".

    Raises:
        FormatError: index and files do not agree, one of them is damaged, or the folder was replaced while they were
            opened.
    """
    with make_source(path) as index:
        weight_map, said = _read_index(path, index.read(0, index.size))
        # In a folder that is replaced meanwhile, some files would be old and some new.
        with index.unchanged("index"):
            shards = [_read_shard(path.parent / name, name) for name in sorted(set(weight_map.values()))]
    _check_weight_map(path, weight_map, shards)
    left_out = tuple(f"index metadata {key!r}" for key in said if key != "total_size")
    yield Checkpoint(path, tuple(shards), path.name, left_out, index_metadata=said)


def _read_shard(path: Path, name: str) -> Shard:
    # It is opened again when its tensors are read: of many files, one is open at a time.
    source = make_source(path)
    with source:
        return read_shard(source, name)


def explain_other(path: Path) -> str | None:
    """Say what to do with a file of a checkpoint of another kind; None if it is not known for one."""
    if path.name.endswith(_BIN_INDEX_SUFFIX):
        return (
            f"{path.name} is the index of PyTorch's .bin files; pack these one by one, or load the model and save it "
            "as safetensors: model.save_pretrained(folder, safe_serialization=True)"
        )
    if path.suffix == ".distcp":
        if list_metadata(path.parent):
            return f"one of the files of a checkpoint of torch.distributed.checkpoint; give their folder, {path.parent}"
        return (
            f"{path.name} is of a checkpoint of torch.distributed.checkpoint, but .metadata is missing, which says "
            "what is in such files; copy it too, or save again"
        )
    return None


def _read_index(path: Path, text: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """Return which file each tensor is in, and what else the index says."""
    index = parse_object(path, text)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: has no weight_map from tensors to files; not the index of a checkpoint")
    # Of a checkpoint far away it takes a while to see that a file is there: once for each will do.
    for file_name, tensor_name in {file_name: name for name, file_name in reversed(weight_map.items())}.items():
        _check_file_name(path, tensor_name, file_name)
    metadata = index.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _check_file_name(path: Path, tensor_name: str, file_name: object) -> None:
    where = f"{path}: weight_map puts {tensor_name!r} into {file_name!r}"
    if not isinstance(file_name, str) or not file_name.endswith(".safetensors"):
        raise FormatError(f"{where}, which is not the name of a safetensors file")
    parts = PurePosixPath(file_name)
    if parts.is_absolute() or ".." in parts.parts or "://" in file_name:
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
                f"{path}: weight_map puts {name!r} into {file_name}, but it is in {found.get(name, 'none')}; "
                "index and files are of different checkpoints"
            )


def write_folder(
    path: Path,
    shards: Sequence[OutShard],
    folder: OutFolder,
    *,
    check: Callable[[], None],
    list_own: ListOwn,
    force: bool,
    keeper: Keeper | None = None,
    make_files: MakeFiles | None = None,
) -> None:
    """Write a folder of safetensors files, with their index if it has one, and what lies beside them.

    Args:
        path: of the folder.
        shards: the files.
        folder: what else it has.
        check: called when everything is written but has no name yet.
        list_own: as new_folder takes it.
        force: as new_folder takes it.
        keeper: as new_folder takes it; files are numbered as in shards.
        make_files: what makes the files with tensors; None to write one after the other here.

    Raises:
        FileExistsError: the folder has other files.
        ValueError: as write_safetensors.
    """
    last = shards[0].file_name if folder.index_name is None else folder.index_name
    with new_folder(path, last, list_own, force=force, keeper=keeper) as new:
        made = {number: new / shard.file_name for number, shard in enumerate(shards)}
        missing = [number for number, file in made.items() if keeper is None or not keeper.reuse(number, file)]
        make = make_files or partial(_make_files, path, shards)
        for number in make({number: made[number] for number in missing}):
            if keeper is not None:
                sync(made[number])
                sync(made[number].parent)
                keeper.keep(number, made[number])
        if folder.index_name is not None:
            said = folder.describe_files(new)
            with create(new / folder.index_name) as file:
                file.write(_make_index(shards, folder.index_name, said).encode())
        for name, write in folder.beside.items():
            with create(new / name) as file:
                write(file)
        check()


def _make_files(path: Path, shards: Sequence[OutShard], made: Mapping[int, Path]) -> Iterator[int]:
    for number, file_path in made.items():
        with create(file_path) as file:
            write_safetensors(file, path / shards[number].file_name, shards[number])
        yield number


def _make_index(shards: Sequence[OutShard], index_name: str, said: dict[str, Any]) -> str:
    """Say which tensor is in which file, by the files' paths from the index on."""
    place = PurePosixPath(index_name).parent
    names = {shard.file_name: PurePosixPath(shard.file_name).relative_to(place).as_posix() for shard in shards}
    weight_map = {tensor.name: names[shard.file_name] for shard in shards for tensor in shard.tensors}
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    return json.dumps({"metadata": {"total_size": total_size, **said}, "weight_map": weight_map}, indent=2) + "\n"
