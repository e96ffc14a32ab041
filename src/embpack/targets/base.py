"""What is written: tensors that come in chunks, and the files they go to."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.sources.dtypes import ARRAY_DTYPES, count_bytes


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write.

    Attributes:
        name: under which readers find it.
        dtype: its safetensors name, such as "F32" or "BF16".
        shape: of the whole tensor.
        chunks: called once; yields C-contiguous arrays that together, in order, are the tensor's values; of
            the types of SourceTensor.read. A chunk may be overwritten by the next one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return count_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class OutShard:
    """A file to write.

    Attributes:
        file_name: used where a checkpoint has several files; relative to its folder.
        tensors: in the order in which they are to lie in the file.
        metadata: called after all chunks have been written; goes into a safetensors header, other formats
            have no place for it.
        metadata_room: bytes of json.dumps(metadata()) at most.
    """

    file_name: str
    tensors: tuple[OutTensor, ...]
    metadata: Callable[[], dict[str, str]] = dict
    metadata_room: int = 0


def iter_checked(tensor: OutTensor) -> Iterator[NDArray[Any]]:
    """Yield a tensor's chunks, and see to it that they are what was promised.

    Raises:
        ValueError: a chunk is of another type, or all of them are more or fewer bytes than the shape takes.
    """
    expected = ARRAY_DTYPES[tensor.dtype]
    written = 0
    for chunk in tensor.chunks():
        if chunk.dtype != expected:
            raise ValueError(
                f"tensor {tensor.name!r}: a chunk is {chunk.dtype}, but {tensor.dtype} comes as {expected}"
            )
        written += chunk.nbytes
        if written > tensor.nbytes:
            break
        yield np.ascontiguousarray(chunk)
    if written != tensor.nbytes:
        so_far = "at least " if written > tensor.nbytes else ""
        raise ValueError(
            f"tensor {tensor.name!r}: its chunks are {so_far}{written} bytes, but {tensor.dtype} of shape "
            f"{list(tensor.shape)} takes {tensor.nbytes}"
        )


def iter_entries(tensor: OutTensor) -> Iterator[NDArray[Any]]:
    """Yield checked chunks that are cut along axis 0: [n, *shape[1:]].

    Raises:
        ValueError: a chunk ends within an entry, and what iter_checked raises.
    """
    for chunk in iter_checked(tensor):
        if chunk.ndim != len(tensor.shape) or chunk.shape[1:] != tensor.shape[1:]:
            raise ValueError(
                f"tensor {tensor.name!r}: a chunk has shape {list(chunk.shape)}, which is no part of "
                f"{list(tensor.shape)} along axis 0"
            )
        yield chunk


def as_bytes(chunk: NDArray[Any]) -> memoryview:
    """View a C-contiguous array as its bytes, without a copy."""
    return chunk.reshape(-1).view(np.uint8).data


def refuse_dtypes(path: Path, shard: OutShard, allowed: Container[str], ways_out: str) -> None:
    """Raise ValueError where a tensor's type has no place in a format; allowed: what has one."""
    for tensor in shard.tensors:
        if tensor.dtype not in allowed:
            raise ValueError(f"{path}: tensor {tensor.name!r} is {tensor.dtype}, which it cannot hold; {ways_out}")
