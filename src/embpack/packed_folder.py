"""Folders of ours: what their files are called, and which of them embpack wrote."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from embpack.files import format_checksum, is_packed
from embpack.formats import INDEX_SUFFIX, Checkpoint
from embpack.formats.new_folder import iter_files
from embpack.formats.paths import is_remote
from embpack.static_encoders import MODULES_NAME, point_to_float, point_to_packed

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
    return {
        name: partial(_copy, opened, lambda digest: None)
        for name, opened in _find_companions(checkpoint, point_to_float)
    }


def copy_and_list(checkpoint: Checkpoint, written: list[str]) -> dict[str, Callable[[BinaryIO], None]]:
    """Return what copy_companions does, and at last what lists them and the files that are written beside them.

    Args:
        checkpoint: which is packed.
        written: names of files with tensors and of their index.
    """
    listed: dict[str, str | None] = dict.fromkeys(written)

    def keep(name: str, digest: "hashlib._Hash") -> None:
        listed[name] = format_checksum(digest)

    companions = {
        name: partial(_copy, opened, partial(keep, name))
        for name, opened in _find_companions(checkpoint, point_to_packed)
    }
    return {**companions, MANIFEST_NAME: lambda file: _write_list(file, listed)}


def list_files(folder: Path) -> None:
    """Write the list of a folder's files, all of which embpack has written, into it."""
    listed: dict[str, str | None] = {}
    for name in sorted(iter_files(folder)):
        with (folder / name).open("rb") as file:
            listed[name] = None if is_packed(folder / name) else format_checksum(hashlib.file_digest(file, "sha256"))
    with (folder / MANIFEST_NAME).open("xb") as file:
        _write_list(file, listed)


def _write_list(file: BinaryIO, listed: Mapping[str, str | None]) -> None:
    file.write(json.dumps({"version": MANIFEST_VERSION, "files": listed}, indent=2).encode() + b"\n")


def _find_companions(
    checkpoint: Checkpoint, point: Callable[[bytes, str], bytes]
) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Find what goes along, and what opens it: of modules.json what point makes of it and of the checkpoint's place."""
    for name in checkpoint.companions:
        if checkpoint.folder is None or name == MANIFEST_NAME:
            continue
        yield name, partial(_open, checkpoint.folder / name, point, checkpoint.place.as_posix())


def _open(path: Path, point: Callable[[bytes, str], bytes], place: str) -> BinaryIO:
    return BytesIO(point(path.read_bytes(), place)) if path.name == MODULES_NAME else path.open("rb")


def _copy(opened: Callable[[], BinaryIO], finish: Callable[["hashlib._Hash"], None], file: BinaryIO) -> None:
    """Copy a file; finish is given the digest of its bytes."""
    digest = hashlib.sha256()
    with opened() as source:
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
    # What is behind a URI was listed as an object.
    if not is_remote(path) and (path.is_symlink() or not path.is_file()):
        return False
    if checksum is None:
        return is_packed(path)
    with path.open("rb") as file:
        return format_checksum(hashlib.file_digest(file, "sha256")) == checksum
