"""Checkpoints as others have them: read a few rows at a time, written whole or not at all, in bounded memory."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from stat import S_ISDIR
from typing import Any, BinaryIO

from embpack.errors import FormatError, MissingExtraError
from embpack.formats.atomic import new_file
from embpack.formats.base import Checkpoint, OutFolder, OutShard, OutTensor, Shard, SourceTensor, find_repeated, is_utf8
from embpack.formats.model_folder import find_checkpoint, with_folder
from embpack.formats.new_folder import Keeper, ListOwn, nothing
from embpack.formats.paths import as_path, is_remote
from embpack.formats.rank_files import has_pieces, is_metadata
from embpack.formats.remote import explained, look
from embpack.formats.sharded import INDEX_SUFFIX, MakeFiles, explain_other, open_sharded, write_folder

__all__ = [
    "FORMATS",
    "INDEX_SUFFIX",
    "WRITTEN",
    "Checkpoint",
    "Format",
    "MakeFiles",
    "OutFolder",
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
        reader, writer: names of the functions, a Reader and a Writer; no writer where files are only read.
        package: what they need beside embpack's own dependencies, "PyTorch".
        extra: the extra of embpack that installs the package.
    """

    module: str
    reader: str
    writer: str | None
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
        assert self.writer is not None  # it is one of those that are written
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
    ".gguf": Format("gguf", "open_gguf", None, "gguf", "gguf"),
}
"""Formats by the suffix of a file's name, in lower case."""

WRITTEN = tuple(suffix for suffix, file_format in FORMATS.items() if file_format.writer is not None)
"""Suffixes of files that can be written, too."""

# What processes save together, which is known by the names of files.
_DCP = Format("dcp", "open_dcp", None)
_PIECES = Format("hf_distributed", "open_distributed", None)
_READABLE = (
    f"what can be read: {', '.join(FORMATS)}, *{INDEX_SUFFIX}, a model's folder and one of torch.distributed.checkpoint"
)


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Open a checkpoint of any format.

    Args:
        path: of a file whose suffix is one of FORMATS, of an index, "*.safetensors.index.json", or of a model's folder,
            with one of those; the small files in it are the checkpoint's companions. Or of a folder that PyTorch's
            processes have saved to, by torch.distributed.checkpoint or its HuggingFaceStorageWriter. Or a URI of one of
            these: "s3://bucket/model".

    Yields:
        The checkpoint; its tensors can be read until the block ends.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        FormatError: the file is damaged or not what its name says.
        MissingExtraError: the format needs a package that is not installed.
        ValueError: no format has such a name, or the folder has more than one checkpoint.
    """
    path = as_path(path)
    with ExitStack() as stack:
        with explained(path):
            checkpoint = _open(path, stack)
        yield checkpoint


def _open(path: Path, stack: ExitStack) -> Checkpoint:
    """Open a checkpoint until a stack is closed."""
    is_folder = S_ISDIR(look(path).st_mode) if is_remote(path) else path.is_dir()
    folder = path if is_folder else None
    if folder is not None:
        path = find_checkpoint(folder, FORMATS)
    elif not is_remote(path) and not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {_READABLE}")
    elif has_pieces(path):
        raise ValueError(f"{path}: one of several files with pieces of tensors; give their folder, {path.parent}")
    read = _choose_reader(path)
    if path.stat().st_size == 0:
        raise FormatError(f"{path}: the file is empty, 0 bytes; copy it again")
    checkpoint = stack.enter_context(read(path))
    return checkpoint if folder is None else with_folder(checkpoint, folder)


def _choose_reader(path: Path) -> Reader:
    if is_metadata(path):
        return _DCP.open
    if has_pieces(path):
        return _PIECES.open
    if path.name.lower().endswith(INDEX_SUFFIX):
        return open_sharded
    file_format = FORMATS.get(path.suffix.lower())
    if file_format is None:
        advice = explain_other(path) or f"the end of its name says no format that is known; {_READABLE}"
        raise ValueError(f"{path}: {advice}")
    return file_format.open


def write_checkpoint(
    path: str | os.PathLike[str],
    shards: Sequence[OutShard],
    folder: OutFolder | None = None,
    *,
    check: Callable[[], None] = lambda: None,
    list_own: ListOwn = nothing,
    force: bool = False,
    keeper: Keeper | None = None,
    make_files: MakeFiles | None = None,
) -> None:
    """Write a checkpoint of plain tensors: whole or not at all.

    Args:
        path: of the file, whose suffix (one of WRITTEN) chooses the format; with a folder of that.
        shards: the files of the folder; without a folder just one. Only PyTorch's (.pt and the like) need all of its
            tensors in memory. Only safetensors files have a place for metadata.
        folder: what a folder has beside them; None for a file.
        check: called when everything is written but has no name yet; what it raises leaves all as it was.
        list_own: lists what of an existing folder may be replaced, or the name of an existing file if that may be.
        force: replace a file whatever it is, and of a folder what has the name of a new file.
        keeper: of a folder's whole files, should writing it be interrupted.
        make_files: what makes a folder's files with tensors, if they are not written here.

    Raises:
        FileExistsError: there is something that may not be replaced.
        MissingExtraError: the format needs a package that is not installed.
        OSError: there is no space, or the place cannot be written; errno and message say which.
        ValueError: no format has such a name, it cannot hold one of the tensors, names are there twice, or
            chunks are not what their tensor promised.
    """
    path = as_path(path)
    for name in (tensor.name for shard in shards for tensor in shard.tensors):
        if not is_utf8(name):
            raise ValueError(
                f"{path}: tensor {name!r} has a name that is not Unicode, "
                "which no reader takes; rename it (an .npy file: the file)"
            )
    repeated = find_repeated(tensor.name for shard in shards for tensor in shard.tensors)
    if repeated is not None:
        raise ValueError(f"{path}: there is more than one tensor named {repeated!r}; rename all but one")
    if folder is not None:
        write_folder(
            path,
            shards,
            folder,
            check=check,
            list_own=list_own,
            force=force,
            keeper=keeper,
            make_files=make_files,
        )
        return
    file_format = FORMATS.get(path.suffix.lower())
    if file_format is None or file_format.writer is None:
        advice = "the end of its name says no format" if file_format is None else f"{path.suffix} files are only read"
        raise ValueError(f"{path}: {advice}; what can be written: {', '.join(WRITTEN)}")
    if len(shards) != 1:
        raise ValueError(f"{path}: one file is to be written, but there are {len(shards)} shards; give a folder")
    with new_file(path, lambda existing: force or existing.name in list_own(existing)) as file:
        file_format.write(file, path, shards[0])
        check()
