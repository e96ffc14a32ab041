"""Checkpoints in several safetensors files with an index."""

import json
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from embpack.errors import FormatError
from embpack.formats.atomic import new_folder
from embpack.formats.base import Checkpoint, OutShard, Shard
from embpack.formats.safetensors import parse_object, read_shard, write_safetensors
from embpack.formats.source import SourceFile

INDEX_SUFFIX = ".safetensors.index.json"
_BIN_INDEX_SUFFIX = ".bin.index.json"
_MOST_NAMED = 8


@contextmanager
def open_sharded(path: Path) -> Iterator[Checkpoint]:
    """Map the files that an index names.

    Args:
        path: of the index, "model.safetensors.index.json".

    Raises:
        FormatError: index and files do not agree, or one of them is damaged.
    """
    weight_map, left_out = _read_index(path)
    shards = [_read_shard(path.parent / name, name) for name in sorted(set(weight_map.values()))]
    _check_weight_map(path, weight_map, shards)
    yield Checkpoint(path, tuple(shards), path.name, left_out)


def _read_shard(path: Path, name: str) -> Shard:
    # It is opened again when its tensors are read: of many files, one is open at a time.
    source = SourceFile(path)
    with source:
        return read_shard(source, name)


def find_index(folder: Path, suffixes: Container[str]) -> Path:
    """Find the index in a folder.

    Args:
        folder: of a checkpoint.
        suffixes: of files that can be read, for the error.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there is more than one.
    """
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if not found:
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
        readable = [name for name in files if Path(name).suffix.lower() in suffixes]
        advice = next(filter(None, map(explain_other, map(folder.joinpath, files))), "")
        if not advice and readable:
            more = f" and {len(readable) - _MOST_NAMED} more" if len(readable) > _MOST_NAMED else ""
            advice = f"choose one of its files: {', '.join(readable[:_MOST_NAMED])}{more}"
        raise FileNotFoundError(f"{folder}: no *{INDEX_SUFFIX} in this folder; {advice or 'it has no file to read'}")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{folder}: {len(found)} indices in this folder; choose one: {names}")
    return found[0]


def explain_other(path: Path) -> str | None:
    """Say what to do with a file of a checkpoint of another kind; None if it is not known for one."""
    if path.name.endswith(_BIN_INDEX_SUFFIX):
        return (
            f"{path.name} is the index of PyTorch's .bin files; pack these one by one, or load the model and save it "
            "as safetensors: model.save_pretrained(folder, safe_serialization=True)"
        )
    if path.name == ".metadata" or path.suffix == ".distcp":
        return (
            "this is a checkpoint of torch.distributed.checkpoint; make one file of it: "
            f"torch.distributed.checkpoint.format_utils.dcp_to_torch_save({str(path.parent)!r}, 'model.pt')"
        )
    return None


def _read_index(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return which file each tensor is in, and notes on what else the index says."""
    index = parse_object(path, path.read_bytes())
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: has no weight_map from tensors to files; not the index of a checkpoint")
    for tensor_name, file_name in weight_map.items():
        _check_file_name(path, tensor_name, file_name)
    metadata = index.get("metadata")
    keys = metadata if isinstance(metadata, dict) else {}
    return weight_map, tuple(f"index metadata {key!r}" for key in keys if key != "total_size")


def _check_file_name(path: Path, tensor_name: str, file_name: object) -> None:
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
                f"{path}: weight_map puts {name!r} into {file_name}, but it is in {found.get(name, 'none')}; "
                "index and files are of different checkpoints"
            )


def write_sharded(path: Path, shards: Sequence[OutShard], index_name: str, check: Callable[[], None]) -> None:
    """Write a folder of safetensors files with their index.

    Args:
        path: of the folder, which must be new or empty.
        shards: the files.
        index_name: of the index, "model.safetensors.index.json".
        check: called when everything is written but has no name yet.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: as write_safetensors.
    """
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    with new_folder(path, index_name) as folder:
        for shard in shards:
            shard_path = folder / shard.file_name
            shard_path.parent.mkdir(parents=True, exist_ok=True)
            with shard_path.open("xb") as file:
                write_safetensors(file, path / shard.file_name, shard)
        (folder / index_name).write_text(json.dumps(index, indent=2) + "\n")
        check()
