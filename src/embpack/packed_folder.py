"""Folders of ours: what their files are called, and which of them embpack wrote."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

from embpack.files import format_checksum, is_packed
from embpack.formats import INDEX_SUFFIX, Checkpoint
from embpack.formats.new_folder import iter_files

MANIFEST_NAME = "embpack.json"
"""Lists a packed folder's files, so that a later run knows which it may replace."""

MANIFEST_VERSION = 1
# No library opens a file of this name and takes packed rows for values.
_MARK = ".embpack"
_COPY_BYTES = 1 << 20
_MOST_MANIFEST_BYTES = 1 << 24


def name_packed(name: str) -> str:
    """Name the packed file, or index, of one in a model's folder: "model.embpack.safetensors"."""
    if name.endswith(INDEX_SUFFIX):
        return f"{name.removesuffix(INDEX_SUFFIX)}{_MARK}{INDEX_SUFFIX}"
    stem = Path(name).stem
    # What PyTorch's file is called in safetensors.
    return f"{'model' if stem == 'pytorch_model' else stem}{_MARK}.safetensors"


def name_plain(name: str) -> str:
    """Undo name_packed."""
    return name.replace(f"{_MARK}.safetensors", ".safetensors")


def copy_companions(checkpoint: Checkpoint) -> dict[str, Callable[[BinaryIO], None]]:
    """Return what copies each of the small files that go along with a checkpoint, by their names in its folder."""
    return {name: partial(_copy, path, lambda digest: None) for name, path in _find_companions(checkpoint)}


def copy_and_list(checkpoint: Checkpoint, written: list[str]) -> dict[str, Callable[[BinaryIO], None]]:
    """Return what copy_companions does, and at last what lists them and the files that are written beside them.

    Args:
        checkpoint: which is packed.
        written: names of files with tensors and of their index.
    """
    listed: dict[str, str | None] = dict.fromkeys(written)

    def keep(name: str, digest: "hashlib._Hash") -> None:
        listed[name] = format_checksum(digest)

    def write_list(file: BinaryIO) -> None:
        file.write(json.dumps({"version": MANIFEST_VERSION, "files": listed}, indent=2).encode() + b"\n")

    companions = {name: partial(_copy, path, partial(keep, name)) for name, path in _find_companions(checkpoint)}
    return {**companions, MANIFEST_NAME: write_list}


def _find_companions(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    for name in checkpoint.companions:
        if checkpoint.folder is not None and name != MANIFEST_NAME:
            yield name, checkpoint.folder / name


def _copy(path: Path, finish: Callable[["hashlib._Hash"], None], file: BinaryIO) -> None:
    """Copy a file; finish is given the digest of its bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while piece := source.read(_COPY_BYTES):
            digest.update(piece)
            file.write(piece)
    finish(digest)


def list_own(path: Path) -> set[str]:
    """List the files of a packed folder that nobody has changed, by their paths in it; of a packed file its name."""
    if not path.is_dir():
        return {path.name} if is_packed(path) else set()
    listed = _read_list(path)
    # A list may name anything; what is looked at are files that really are in the folder.
    there = listed.keys() & iter_files(path) if listed else set()
    own = {name for name in there if _is_as_written(path / name, listed[name])}
    return {*own, MANIFEST_NAME} if listed else own


def _read_list(folder: Path) -> Mapping[str, str | None]:
    try:
        with (folder / MANIFEST_NAME).open("rb") as file:
            value = json.loads(file.read(_MOST_MANIFEST_BYTES))
        files = value["files"] if value["version"] == MANIFEST_VERSION else {}
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def _is_as_written(path: Path, checksum: object) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if checksum is None:
        return is_packed(path)
    with path.open("rb") as file:
        return format_checksum(hashlib.file_digest(file, "sha256")) == checksum
