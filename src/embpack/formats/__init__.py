"""Checkpoints as others have them: read a few rows at a time, written whole or not at all, in bounded memory."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from embpack.errors import FormatError, MissingExtraError
from embpack.formats.atomic import new_file
from embpack.formats.base import Checkpoint, OutShard, OutTensor, Shard, SourceTensor, find_repeated, is_utf8
from embpack.formats.sharded import INDEX_SUFFIX, explain_other, find_index, open_sharded, write_sharded

__all__ = [
    "FORMATS",
    "INDEX_SUFFIX",
    "Checkpoint",
    "Format",
    "OutShard",
    "OutTensor",
    "Shard",
    "SourceTensor",
    "open_checkpoint",
    "write_checkpoint",
]

Reader = Callable[[Path], AbstractContextManager[Checkpoint]]
# The path is what errors call the file.
Writer = Callable[[BinaryIO, Path, OutShard], None]


@dataclass(frozen=True)
class Format:
    """A file format: where its functions are, which are imported only when they are used.

    Attributes:
        module: of this package.
        reader, writer: names of the functions, a Reader and a Writer.
        package: what they need beside embpack's own dependencies, "PyTorch".
        extra: the extra of embpack that installs the package.
    """

    module: str
    reader: str
    writer: str
    package: str = ""
    extra: str = ""

    def open(self, path: Path) -> AbstractContextManager[Checkpoint]:
        """Open a file of this format.

        Raises:
            MissingExtraError: the package is not installed.
        """
        read: Reader = self._import(self.reader, f"reading {path.suffix} files")
        return read(path)

    def write(self, file: BinaryIO, path: Path, shard: OutShard) -> None:
        """Write a file of this format.

        Raises:
            MissingExtraError: the package is not installed.
        """
        write: Writer = self._import(self.writer, f"writing {path.suffix} files")
        write(file, path, shard)

    def _import(self, function: str, purpose: str) -> Any:
        try:
            module = import_module(f"{__name__}.{self.module}")
        except ImportError as error:
            if not self.extra:
                raise
            raise MissingExtraError(purpose, self.package, self.extra) from error
        return getattr(module, function)


_TORCH = Format("torch", "open_torch", "write_torch", "PyTorch", "torch")

FORMATS = {
    ".safetensors": Format("safetensors", "open_safetensors", "write_safetensors"),
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".bin": _TORCH,
    ".ckpt": _TORCH,
    ".npy": Format("npy", "open_npy", "write_npy"),
    ".npz": Format("npy", "open_npz", "write_npz"),
    ".parquet": Format("parquet", "open_parquet", "write_parquet", "PyArrow", "parquet"),
}
"""Formats by the suffix of a file's name, in lower case."""


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Open a checkpoint of any format.

    Args:
        path: of a file whose suffix is one of FORMATS, of an index, "*.safetensors.index.json", or of a folder
            with one index.

    Yields:
        The checkpoint; its tensors can be read until the block ends.

    Raises:
        FileNotFoundError: there is no such file, or no index in the folder.
        FormatError: the file is damaged or not what its name says.
        MissingExtraError: the format needs a package that is not installed.
        ValueError: no format has such a name, or the folder has more than one index.
    """
    path = Path(path)
    readable = f"what can be read: {', '.join(FORMATS)}, *{INDEX_SUFFIX} and a folder with one of those"
    if path.is_dir():
        path = find_index(path, FORMATS)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {readable}")
    file_format = FORMATS.get(path.suffix.lower())
    is_index = path.name.lower().endswith(INDEX_SUFFIX)
    if file_format is None and not is_index:
        advice = explain_other(path) or f"the end of its name says no format that is known; {readable}"
        raise ValueError(f"{path}: {advice}")
    if path.stat().st_size == 0:
        raise FormatError(f"{path}: the file is empty, 0 bytes; copy it again")
    with open_sharded(path) if file_format is None else file_format.open(path) as checkpoint:
        yield checkpoint


def write_checkpoint(
    path: str | os.PathLike[str],
    shards: Sequence[OutShard],
    index_name: str | None = None,
    *,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write a checkpoint of plain tensors: whole or not at all.

    Args:
        path: of the file, replaced if it exists, whose suffix (one of FORMATS) chooses the format; with
            index_name of the folder, which must be new or empty.
        shards: the files of the folder; without index_name just one. Only PyTorch's (.pt and the like) need all of its
            tensors in memory. Only safetensors files have a place for metadata.
        index_name: of the index of a checkpoint in shards, "model.safetensors.index.json".
        check: called when everything is written but has no name yet; what it raises leaves all as it was.

    Raises:
        FileExistsError: the folder is not empty.
        MissingExtraError: the format needs a package that is not installed.
        OSError: there is no space, or the place cannot be written; errno and message say which.
        ValueError: no format has such a name, it cannot hold one of the tensors, names are there twice, or
            chunks are not what their tensor promised.
    """
    path = Path(path)
    for name in (tensor.name for shard in shards for tensor in shard.tensors):
        if not is_utf8(name):
            raise ValueError(
                f"{path}: tensor {name!r} has a name that is not Unicode, "
                "which no reader takes; rename it (an .npy file: the file)"
            )
    repeated = find_repeated(tensor.name for shard in shards for tensor in shard.tensors)
    if repeated is not None:
        raise ValueError(f"{path}: there is more than one tensor named {repeated!r}; rename all but one")
    if index_name is not None:
        write_sharded(path, shards, index_name, check)
        return
    file_format = FORMATS.get(path.suffix.lower())
    if file_format is None:
        raise ValueError(f"{path}: the end of its name says no format; what can be written: {', '.join(FORMATS)}")
    if len(shards) != 1:
        raise ValueError(f"{path}: one file is to be written, but there are {len(shards)} shards; give an index_name")
    with new_file(path) as file:
        file_format.write(file, path, shards[0])
        check()
