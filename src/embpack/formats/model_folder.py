"""A model's folder: its checkpoint, the small files that belong to it, and what does not go along."""

import json
import os
import re
from collections.abc import Container, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from embpack.formats.base import Checkpoint
from embpack.formats.paths import is_remote, path_in
from embpack.formats.rank_files import METADATA_NAME, has_pieces, is_metadata, list_metadata
from embpack.formats.remote import list_objects
from embpack.formats.sharded import INDEX_SUFFIX, explain_other

# What is larger is no configuration and no tokenizer.
MOST_FILE_BYTES = 1 << 26
_BIN = "pytorch_model.bin"
# Of several files the one that libraries open.
_FIRST = ("model.safetensors", "model.embpack.safetensors", _BIN)
_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".onnx"),
    *(".onnx_data", ".tflite", ".mlmodel", ".pb"),
}
_WEIGHTS_INDICES = (INDEX_SUFFIX, ".bin.index.json", ".h5.index.json", ".msgpack.index.json")
_NUMBERED = re.compile(r".*-[0-9]{5}-of-([0-9]{5})\.safetensors")
_MOST_NAMED = 8


def find_checkpoint(folder: Path, suffixes: Container[str]) -> Path:
    """Find the checkpoint in a model's folder, or in a folder of that.

    That is an index of safetensors files, a safetensors file or those of several processes, pytorch_model.bin, or the
    metadata of torch.distributed.checkpoint: the first of these that is there.

    Args:
        folder: of a model.
        suffixes: of files that can be read, for the error.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, of which none is called as usual.
    """
    found = _find_here(folder)
    if found is not None:
        return found
    modules = _read_modules(folder)
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    candidates = {path.name: candidate for path in inner if (candidate := _find_here(path)) is not None}
    # Of a pipeline's modules the first that has weights is the model.
    first = next((name for name in modules if name in candidates), None)
    if first is not None:
        return candidates[first]
    # What TorchEasyRec saves has an "optimizer" beside it.
    if "model" in candidates and all(map(is_metadata, candidates.values())):
        return candidates["model"]
    if len(candidates) > 1:
        names = ", ".join(str(path_in(path, folder)) for path in candidates.values())
        raise ValueError(f"{folder}: {len(candidates)} checkpoints in folders of this folder; choose one: {names}")
    if candidates:
        [only] = candidates.values()
        return only
    raise FileNotFoundError(
        f"{folder}: no *{INDEX_SUFFIX}, no *.safetensors and no {METADATA_NAME} in this folder; "
        f"{_advise(folder, suffixes)}"
    )


def _find_here(folder: Path) -> Path | None:
    """Find the checkpoint whose files lie in a folder itself."""
    here = list(folder.iterdir())
    for pattern, kind in ((f"*{INDEX_SUFFIX}", "indices"), ("*.safetensors", "safetensors files"), (_BIN, "")):
        found = sorted(path for path in here if fnmatchcase(path.name, pattern) and path.is_file())
        usual = _find_usual(folder)
        if usual in found:
            return usual
        if len(found) == 1:
            _refuse_part(found[0])
            return found[0]
        if found and all(map(has_pieces, found)):
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder}: {len(found)} {kind} in this folder; choose one: {names}")
    return next(iter(list_metadata(folder)), None)


def _refuse_part(path: Path) -> None:
    """Refuse one of several files whose index is missing: it is downloaded, or written, last."""
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered is not None and int(numbered[1]) > 1:
        raise FileNotFoundError(
            f"{path.parent}: {path.name} is one of {int(numbered[1])} files, and the others and their index are not "
            "there; copy the whole folder, or give the file itself"
        )


def _find_usual(folder: Path) -> Path | None:
    """Find the file of weights that libraries open in a folder."""
    return next((folder / name for name in _FIRST if (folder / name).is_file()), None)


def _advise(folder: Path, suffixes: Container[str]) -> str:
    """Say what to do with a folder without a checkpoint that is known."""
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    readable = [name for name in files if Path(name).suffix.lower() in suffixes]
    advice = next(filter(None, map(explain_other, map(folder.joinpath, files))), "")
    if not advice and readable:
        more = f" and {len(readable) - _MOST_NAMED} more" if len(readable) > _MOST_NAMED else ""
        advice = f"choose one of its files: {', '.join(readable[:_MOST_NAMED])}{more}"
    return advice or "it has no file to read"


def with_folder(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Add to a checkpoint what else is in its model's folder; what processes have saved together is no such folder."""
    if checkpoint.path.is_dir():
        beside = () if checkpoint.path == folder else sorted(folder.iterdir())
        notes = (f"folder {path.name!r}" for path in beside if path.is_dir() and path != checkpoint.path)
        return replace(checkpoint, left_out=(*checkpoint.left_out, *notes))
    place = path_in(checkpoint.path.parent, folder)
    own = {(place / shard.file_name).as_posix() for shard in checkpoint.shards}
    own.add((place / checkpoint.path.name).as_posix())
    companions, left_out = [], list(checkpoint.left_out)
    modules = _read_modules(folder)
    names = [name for name in _iter_visible(folder) if name not in own]
    # A folder with weights that are no module's is another model, or the same one in another format.
    others = {_top(name) for name in names if "/" in name and _is_weights(name)} - set(
        map(_top, [*modules, place.as_posix()])
    )
    left_out += [f"folder {name!r} (other weights)" for name in sorted(others)]
    for name in names:
        if "/" in name and _top(name) in others:
            continue
        reason = _why_left_out(folder, name, modules, place.as_posix())
        if reason is None:
            companions.append(name)
        else:
            left_out.append(f"file {name!r} ({reason})")
    return replace(checkpoint, folder=folder, companions=tuple(companions), left_out=tuple(left_out))


def _why_left_out(folder: Path, name: str, modules: list[str], place: str) -> str | None:
    path = folder / name
    if not path.exists():
        return "a link to nothing"
    if path.is_dir():
        return "a link to a folder"
    if not path.is_file():
        return "neither a file nor a folder"
    if _is_weights(name):
        inside = PurePosixPath(name).parent.as_posix()
        is_module = inside in modules and inside != place and path == _find_usual(path.parent)
        return None if is_module else "other weights"
    if path.stat().st_size > MOST_FILE_BYTES:
        return f"more than {MOST_FILE_BYTES >> 20} MiB"
    return None


def _iter_visible(folder: Path) -> Iterator[str]:
    """Name the files of a folder that are not hidden, in order, by paths in it, and links to folders."""
    if is_remote(folder):
        names = sorted(list_objects(folder), key=_order)
        yield from (name for name in names if not any(part.startswith(".") for part in name.split("/")))
        return
    for inside, folders, files in os.walk(folder):
        here = Path(inside)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if (here / name).is_symlink()]
        names = sorted(name for name in (*files, *links) if not name.startswith("."))
        yield from ((here / name).relative_to(folder).as_posix() for name in names)


def _order(name: str) -> list[tuple[bool, str]]:
    """Order names as os.walk does, whose order a list of what is written has: of a folder its files come first."""
    *folders, own = name.split("/")
    return [*((True, each) for each in folders), (False, own)]


def _is_weights(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _WEIGHTS or name.lower().endswith(_WEIGHTS_INDICES)


def _top(name: str) -> str:
    return name.partition("/")[0]


def _read_modules(folder: Path) -> list[str]:
    """Name the folders of a sentence-transformers pipeline's modules, in order; none if it is no such pipeline."""
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        return [str(module["path"]) for module in modules if module["path"] not in ("", ".")]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return []
