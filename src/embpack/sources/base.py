"""What a checkpoint is, whatever its format, and how its tensors are read a few rows at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.sources.dtypes import count_bytes


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that is read in chunks.

    Attributes:
        name: under which the checkpoint has it.
        shape: of the whole tensor.
        dtype: its safetensors name, such as "F32" or "BF16".
        read: called with n, yields C-contiguous, aligned arrays of the machine's byte order, in order along
            axis 0, of n entries each but the last; starts anew on each call. BF16 is uint16, 8-bit floats are
            uint8; types smaller than a byte come as 1-D uint8, the tensor's bytes; a 0-d tensor is one 0-d
            array. A chunk may be read-only. Raises FormatError where the file is damaged.
        is_vectors: the format itself says that these are vectors: the array of an .npy file, a column of
            fixed-size lists in a Parquet file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int], Iterator[NDArray[Any]]]
    is_vectors: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return count_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint.

    Attributes:
        file_name: "model-00001-of-00002.safetensors"; relative to the checkpoint's folder.
        tensors: in the order in which they lie in the file.
        metadata: of a safetensors header; elsewhere empty.
    """

    file_name: str
    tensors: tuple[SourceTensor, ...]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: of the file, or of the index where it is in shards.
        shards: its files; just one where it is not in shards.
        index_name: "model.safetensors.index.json" where it is in shards.
        left_out: notes on what is there but is no tensor that can be read, "column 'word' (string)".
    """

    path: Path
    shards: tuple[Shard, ...]
    index_name: str | None = None
    left_out: tuple[str, ...] = ()


def iter_slices(length: int, n: int) -> Iterator[slice]:
    """Cut [0, length) into slices of n, but the last."""
    for start in range(0, length, n):
        yield slice(start, min(start + n, length))


def rechunk(chunks: Iterable[NDArray[Any]], n: int) -> Iterator[NDArray[Any]]:
    """Cut and join chunks along axis 0 so that they have n entries each, but the last.

    A chunk that comes in may be overwritten by the next one: what is held back is copied.
    """
    held: list[NDArray[Any]] = []
    count = 0
    for chunk in chunks:
        rest = chunk
        while count + len(rest) >= n:
            head, rest = rest[: n - count], rest[n - count :]
            yield np.concatenate([*held, head]) if held else head
            held, count = [], 0
        if len(rest):
            held.append(rest.copy())
            count += len(rest)
    if held:
        yield np.concatenate(held)
