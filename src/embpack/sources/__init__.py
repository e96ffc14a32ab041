"""Reads the checkpoints of others, a few rows at a time, in bounded memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from embpack.errors import FormatError, MissingExtraError
from embpack.sources.base import Checkpoint, Shard, SourceTensor
from embpack.sources.numpy import open_npy, open_npz
from embpack.sources.safetensors import INDEX_SUFFIX, open_safetensors
from embpack.sources.sharded import find_index, open_sharded

__all__ = ["READERS", "Checkpoint", "Shard", "SourceTensor", "open_checkpoint"]

Reader = Callable[[Path], AbstractContextManager[Checkpoint]]


def _open_torch(path: Path) -> AbstractContextManager[Checkpoint]:
    try:
        from embpack.sources.torch import open_torch
    except ImportError as error:
        raise MissingExtraError(f"reading {path.suffix} files", "PyTorch", "torch") from error
    return open_torch(path)


def _open_parquet(path: Path) -> AbstractContextManager[Checkpoint]:
    try:
        from embpack.sources.parquet import open_parquet
    except ImportError as error:
        raise MissingExtraError("reading .parquet files", "PyArrow", "parquet") from error
    return open_parquet(path)


READERS: dict[str, Reader] = {
    INDEX_SUFFIX: open_sharded,
    ".safetensors": open_safetensors,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".bin": _open_torch,
    ".npy": open_npy,
    ".npz": open_npz,
    ".parquet": _open_parquet,
}
"""How a file is read, by the end of its name."""


@contextmanager
def open_checkpoint(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Open a checkpoint of any format that can be read.

    Args:
        path: of a file whose name ends with one of READERS, or of a folder with one index,
            "*.safetensors.index.json".

    Yields:
        The checkpoint; its tensors can be read until the block ends.

    Raises:
        FileNotFoundError: there is no such file, or no index in the folder.
        FormatError: the file is damaged or not what its name says.
        MissingExtraError: the format needs a package that is not installed.
        ValueError: no format has such a name, or the folder has more than one index.
    """
    path = Path(path)
    if path.is_dir():
        path = find_index(path)
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {_readable()}")
    reader = next((reader for suffix, reader in READERS.items() if path.name.lower().endswith(suffix)), None)
    if reader is None:
        raise ValueError(f"{path}: the end of its name says no format that is known; {_readable()}")
    if path.stat().st_size == 0:
        raise FormatError(f"{path}: the file is empty, 0 bytes; copy it again")
    with reader(path) as checkpoint:
        yield checkpoint


def _readable() -> str:
    suffixes = ", ".join(suffix for suffix in READERS if suffix != INDEX_SUFFIX)
    return f"what can be read: {suffixes}, *{INDEX_SUFFIX} and a folder with one of those"
