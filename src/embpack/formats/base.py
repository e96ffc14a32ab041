"""What is read and what is written, whatever the format: tensors in chunks, and the files they are in."""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.dtypes import ARRAY_DTYPES, PACKED_DTYPES, count_bytes
from embpack.formats.paths import path_in
from embpack.formats.source import SourceFile
from embpack.formats.stored import StoredArray

# What is read at a time of what is not read by rows.
PORTION_BYTES = 1 << 24


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of which any range of rows can be read; rows are entries of axis 0, a 0-d tensor is one row.

    What is read is C-contiguous, aligned and of the machine's byte order; it may be read-only. A chunk may be
    overwritten by the next one. BF16 is uint16, 8-bit floats are uint8. Types smaller than a byte come as 1-D uint8,
    the tensor's bytes, and their ranges must begin and end at whole bytes.

    Attributes:
        name: under which the checkpoint has it.
        shape: of the whole tensor.
        dtype: its safetensors name, such as "F32" or "BF16".
        iter_rows: what a format provides, and read and chunks are made of: called with start < stop and n, yields
            rows [start, stop), n at a time but the last; a 0-d tensor as one 0-d array. The source is open then.
        source: the file that it is read from, refused if it changes meanwhile; None if it is of no file.
        is_vectors: the format itself says that these are vectors: the array of an .npy file, a column of
            fixed-size lists in a Parquet file.
        stored: where its values lie in the source, if they do so as in memory.
        parts: tensors of the checkpoint that it is made of, such as pieces of a table and scales of its values; none
            if it is one of the checkpoint's own.
        weight_dtype: what its values are to be unpacked to, "bfloat16", if that is not what they are read as.
        stored_as: how its parts hold its values, "F8_E4M3 x BF16", if not as they are read.
        num_pieces: in how many pieces it lies.
        can_be_copied: whether it can be passed through as it is: not where no type of safetensors holds what is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    iter_rows: Callable[[int, int, int], Iterator[NDArray[Any]]]
    source: SourceFile | None
    is_vectors: bool = False
    stored: StoredArray | None = None
    parts: tuple["SourceTensor", ...] = ()
    weight_dtype: str | None = None
    stored_as: str | None = None
    num_pieces: int = 1
    can_be_copied: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return count_bytes(self.dtype, self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows [start, stop), or all from start on, as one array.

        Raises:
            FormatError: the file is damaged, or was changed.
            ValueError: there are no such rows.
        """
        start, stop = self._check_range(start, stop)
        if start == stop or not self.nbytes:
            shape = (0,) if self.dtype in PACKED_DTYPES else (stop - start, *self.shape[1:])
            return np.empty(shape, ARRAY_DTYPES[self.dtype])
        [rows] = self._iter_unchanged(partial(self.iter_rows, start, stop, stop - start))
        return rows

    def whole(self, *, mapped: bool) -> NDArray[Any]:
        """Return all of it, also of a file that was replaced or deleted since it was opened, if that is open still.

        Args:
            mapped: as a read-only view of the mapped file, which outlives the checkpoint; it is read where it cannot be
                mapped. Otherwise it is read into memory of its own.

        Raises:
            FormatError: the file is damaged, or was changed.
        """
        if not self.nbytes:
            return self.read()
        length = self.shape[0] if self.shape else 1
        with self.unchanged(by_name=False):
            view = self.stored.view() if mapped and self.stored is not None else None
            if view is None:
                [view] = self.iter_rows(0, length, length)
        return view

    def portions(self, num_bytes: int = PORTION_BYTES, *, by_name: bool = True) -> Iterator[NDArray[Any]]:
        """Yield all values in order, about num_bytes at a time: some rows, or values of one, 1-D, where that has more.

        Args:
            num_bytes: at least a value's.
            by_name: refuse a file that was replaced or deleted, too; its bytes are there as long as it is open.

        Raises:
            FormatError: when it comes to where the file is damaged, or was changed.
        """
        length = self.shape[0] if self.shape else 1
        if self.stored is not None and self.nbytes > num_bytes * length:
            flat = self.stored.flatten()
            read = partial(flat.iter_rows, 0, flat.shape[0], max(1, num_bytes // flat.dtype.itemsize))
        else:
            read = partial(self.iter_rows, 0, length, max(1, num_bytes * length // max(1, self.nbytes)))
        return self._iter_unchanged(read, by_name=by_name) if length else iter(())

    def chunks(self, n: int, start: int = 0, stop: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield rows [start, stop), or all from start on, in order: n at a time but the last, in bounded memory.

        Raises:
            FormatError: when it comes to where the file is damaged, or was changed.
            ValueError: there are no such rows, or n is not positive.
        """
        start, stop = self._check_range(start, stop)
        if n < 1:
            raise ValueError(f"tensor {self.name!r} is to be read {n} rows at a time; give a positive number")
        return self._iter_unchanged(partial(self.iter_rows, start, stop, n)) if start < stop else iter(())

    def _iter_unchanged(
        self, read: Callable[[], Iterator[NDArray[Any]]], *, by_name: bool = True
    ) -> Iterator[NDArray[Any]]:
        with self.unchanged(by_name=by_name):
            yield from read()

    def unchanged(self, *, by_name: bool) -> AbstractContextManager[None]:
        """Do what SourceFile.unchanged does, if there is one."""
        if self.source is None:
            return nullcontext()
        return self.source.unchanged(f"tensor {self.name!r}", by_name=by_name)

    def _check_range(self, start: int, stop: int | None) -> tuple[int, int]:
        length = self.shape[0] if self.shape else 1
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(
                f"tensor {self.name!r} has no rows [{start}, {stop}), its shape is {list(self.shape)}; give "
                f"0 <= start <= stop <= {length}"
            )
        if self.dtype in PACKED_DTYPES and start < stop:
            whole = length // math.gcd(length, self.nbytes)
            if start % whole or stop % whole:
                raise ValueError(
                    f"tensor {self.name!r} is {self.dtype} of shape {list(self.shape)}, and rows [{start}, {stop}) "
                    f"begin or end within a byte; give multiples of {whole}"
                )
        return start, stop


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint.

    Attributes:
        file_name: "model-00001-of-00002.safetensors"; relative to the checkpoint's folder.
        num_bytes: of the file.
        tensors: in the order in which they lie in the file.
        metadata: of a safetensors header; elsewhere empty.
    """

    file_name: str
    num_bytes: int
    tensors: tuple[SourceTensor, ...]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: of the file, of the index where it is in shards, or of the folder that several processes saved.
        shards: its files; just one where it is not in shards.
        index_name: "model.safetensors.index.json" where it is in shards.
        left_out: notes on what is there but is no tensor that can be read, "column 'word' (string)".
        folder: of the model that it is of, where that was opened; the checkpoint may lie in a folder of it.
        companions: the model's small files, such as its configuration and its tokenizer, by their paths in the folder.
        sources: files that its tensors are read from, where tensors are of several and do not say of which.
        index_metadata: what its index says beside where tensors are.
    """

    path: Path
    shards: tuple[Shard, ...]
    index_name: str | None = None
    left_out: tuple[str, ...] = ()
    folder: Path | None = None
    companions: tuple[str, ...] = ()
    sources: tuple[SourceFile, ...] = ()
    index_metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether what is made of it is a folder, too."""
        return self.folder is not None or self.index_name is not None

    @property
    def place(self) -> PurePosixPath:
        """Where its files lie in the folder."""
        return PurePosixPath() if self.folder is None else path_in(self.path.parent, self.folder)

    @property
    def tensors(self) -> list[SourceTensor]:
        """All tensors, in file order."""
        return [tensor for shard in self.shards for tensor in shard.tensors]


def find_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that was there before; None if all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def name_first(names: Sequence[str]) -> str:
    """Name the first of those that something is said of together, for a note."""
    return f"{names[0]!r} and {len(names) - 1} more" if len(names) > 1 else repr(names[0])


def is_utf8(text: str) -> bool:
    """Whether text can be written as UTF-8; not if it has lone surrogates, as a file's name in Latin-1 gets them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_repeated(path: Path, names: Iterable[str], what: str = "") -> None:
    """Raise FormatError if a file has a name more than once, which is of `what`, such as "tensor "."""
    repeated = find_repeated(names)
    if repeated is not None:
        raise FormatError(f"{path}: {what}{repeated!r} is there twice, and which one is meant cannot be told")


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


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write.

    Attributes:
        name: under which readers find it.
        dtype: its safetensors name, such as "F32" or "BF16".
        shape: of the whole tensor.
        chunks: called once; yields C-contiguous arrays that together, in order, are the tensor's values; of
            the types of SourceTensor. A chunk may be overwritten by the next one.
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
        alignment: of a safetensors file, what the place of the first tensor is a multiple of.
    """

    file_name: str
    tensors: tuple[OutTensor, ...]
    metadata: Callable[[], dict[str, str]] = dict
    metadata_room: int = 0
    alignment: int = 8


@dataclass(frozen=True)
class OutFolder:
    """What a folder has beside files with tensors.

    Attributes:
        index_name: path in it of their index, "model.safetensors.index.json"; None for one file, which needs none.
        beside: what writes each other file, by its path in it; called in order, after all tensors are written.
        describe_files: what the index says of the files beside their tensors; called with the folder when they are
            written.
    """

    index_name: str | None = None
    beside: Mapping[str, Callable[[BinaryIO], None]] = field(default_factory=dict)
    describe_files: Callable[[Path], dict[str, Any]] = lambda folder: {}


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
            more = ", or unpack tables with --dtype float32" if tensor.dtype == "BF16" else ""
            raise ValueError(
                f"{path}: tensor {tensor.name!r} is {tensor.dtype}, which it cannot hold; {ways_out}{more}"
            )
