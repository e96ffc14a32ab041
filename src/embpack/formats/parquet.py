"""Parquet files, whose columns are tensors."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embpack.errors import FormatError
from embpack.formats.base import (
    Checkpoint,
    OutShard,
    OutTensor,
    Shard,
    SourceTensor,
    find_repeated,
    iter_entries,
    rechunk,
    refuse_dtypes,
)
from embpack.formats.parquet_footer import ColumnChunk, read_columns, refuse_large_pages
from embpack.formats.source import SourceFile, make_source

DTYPES = {
    "BOOL": pa.bool_(),
    "I8": pa.int8(),
    "I16": pa.int16(),
    "I32": pa.int32(),
    "I64": pa.int64(),
    "U8": pa.uint8(),
    "U16": pa.uint16(),
    "U32": pa.uint32(),
    "U64": pa.uint64(),
    "F16": pa.float16(),
    "F32": pa.float32(),
    "F64": pa.float64(),
}
"""Arrow's type of each safetensors name that a column can hold."""

VECTOR_DTYPES = ("F16", "F32", "F64")
"""What the values of vectors can be."""

MOST_LIST_VALUES = 1 << 22
"""Values of a list at most: Arrow reads no part of one."""

MOST_PAGE_BYTES = 1 << 28
"""Bytes of a page at most, which Arrow has in memory whole, compressed and not; may be set. Writers' pages have 1 MB,
DuckDB's up to 100."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Without a small buffer, or with pre_buffer, Arrow reads columns of row groups whole.
_BUFFER_BYTES = 1 << 20
_BATCH_VALUES = 1 << 16
_GROUP_BYTES = 1 << 24


@dataclass(frozen=True)
class _Kind:
    """What a column is: numbers, or lists of them that all have one shape, () for numbers."""

    tag: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Columns:
    """What a Parquet file has.

    Attributes:
        source: the file.
        schema: names and types of the columns.
        group_rows: rows of each row group.
        chunks: of each column its part in each row group, by name.
    """

    source: SourceFile
    schema: pa.Schema
    group_rows: tuple[int, ...]
    chunks: dict[str, list[ColumnChunk]]

    @property
    def num_rows(self) -> int:
        """Rows of the file."""
        return sum(self.group_rows)

    def iter_batches(
        self, names: Sequence[str], start: int, stop: int, batch_rows: int
    ) -> Iterator[tuple[int, list[pa.Array]]]:
        """Yield rows [start, stop) of some columns, so many at a time at most, and the number of the first of them.

        Texts come with a dictionary: a page of some bytes may say that many rows have one that is long.

        Row groups without any of them are not read. The file is opened for that, unless it is open.

        Raises:
            FormatError: the file is damaged, or was changed.
        """
        texts = [name for name in names if self.schema.field(name).type in (pa.string(), pa.large_string())]
        with self.source.unchanged(f"column {names[0]!r}"), _open_file(self.source, texts) as file:
            at, groups = self._find_groups(start, stop)
            for name, group in product(names, groups):
                refuse_large_pages(self.source, self.chunks[name][group], MOST_PAGE_BYTES)
            for batch in file.iter_batches(batch_rows, groups, columns=[*names], use_threads=False):
                first, last = max(start - at, 0), min(stop - at, len(batch))
                if first < last:
                    # A name with a dot in it may select other columns, too.
                    found = (batch.column(batch.schema.get_field_index(name)) for name in names)
                    yield at + first, [column.slice(first, last - first) for column in found]
                at += len(batch)
                if at >= stop:
                    return
        if at < stop:
            raise FormatError(f"{self.source.path}: column {names[0]!r} ends {stop - at} rows early; it is damaged")

    def _find_groups(self, start: int, stop: int) -> tuple[int, list[int]]:
        """Return the row groups that hold rows [start, stop), and the row that the first of them begins with."""
        ends = list(accumulate(self.group_rows))
        groups = [group for group, end in enumerate(ends) if start < end and end - self.group_rows[group] < stop]
        return ends[groups[0]] - self.group_rows[groups[0]] if groups else 0, groups


@contextmanager
def open_columns(path: Path) -> Iterator[Columns]:
    """Open a Parquet file whose columns are read as Arrow has them.

    Raises:
        FormatError: it is not one, or damaged.
    """
    source = make_source(path)
    with source:
        with _open_file(source) as file:
            schema, num_rows, chunks = file.schema_arrow, file.metadata.num_rows, read_columns(source)
            repeated = find_repeated(schema.names)
            if repeated is not None:
                raise FormatError(f"{path}: column {repeated!r} is there twice; rename one")
            lengths = _find_lengths(file.metadata)
            if sum(lengths) != num_rows or any(length < 0 for length in lengths):
                raise FormatError(f"{path}: it has {num_rows} rows, its row groups {sum(lengths)}; it is damaged")
            if any(len(chunks.get(name, ())) < file.metadata.num_row_groups for name in schema.names):
                raise FormatError(f"{path}: its row groups do not all have the columns of its schema; it is damaged")
        # There are none of any column where there are no row groups.
        yield Columns(source, schema, tuple(lengths), {name: chunks.get(name, []) for name in schema.names})


@contextmanager
def open_parquet(path: Path) -> Iterator[Checkpoint]:
    """Open a Parquet file: lists of floats that have one length are 2-D tensors, columns of numbers 1-D ones.

    Whether lists of any length have the same is known only when all are read: a row of another length is an error then.

    Raises:
        FormatError: it is not one, or damaged.
    """
    tensors, left_out = [], []
    with open_columns(path) as columns:
        source = columns.source
        for field in columns.schema:
            kind = _find_kind(columns, field)
            if isinstance(kind, _Kind):
                column = _Column(columns, field.name, kind.shape)
                shape, is_vectors = (columns.num_rows, *kind.shape), len(kind.shape) == 1
                tensors.append(
                    SourceTensor(field.name, shape, kind.tag, column.iter_rows, source, is_vectors=is_vectors)
                )
            else:
                left_out.append(f"column {field.name!r} ({kind})")
        yield Checkpoint(path, (Shard(path.name, source.size, tuple(tensors)),), left_out=tuple(left_out))


@contextmanager
def _open_file(source: SourceFile, texts: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    try:
        buffer = max(_BUFFER_BYTES, source.reader_bytes)
        with pq.ParquetFile(source.reader(), buffer_size=buffer, pre_buffer=False, read_dictionary=[*texts]) as file:
            yield file
    except MemoryError:  # Arrow's is one of its own exceptions, too
        raise
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        cause = " ".join(str(error).split())  # Thrift's are of several lines
        raise FormatError(f"{source.path}: not a Parquet file, or damaged: {cause}") from error


def _find_kind(columns: Columns, field: pa.Field) -> _Kind | str:
    """Return what a column is, or why it cannot be carried over."""
    dtype = field.type
    if dtype in _NAMES:
        return f"{dtype}, with nulls" if _has_nulls(columns, field.name) else _Kind(_NAMES[dtype])
    shape: tuple[int, ...] | None
    if isinstance(dtype, pa.FixedShapeTensorType) and list(dtype.permutation or ()) == sorted(dtype.permutation or ()):
        shape = tuple(dtype.shape)
    elif pa.types.is_fixed_size_list(dtype):
        shape = (dtype.list_size,)
    elif pa.types.is_list(dtype) or pa.types.is_large_list(dtype):
        shape = _find_length(columns.chunks[field.name])
    else:
        return str(dtype)
    tag = _NAMES.get(dtype.value_type)
    if tag not in VECTOR_DTYPES:
        return str(dtype)
    if shape is None:
        return f"{dtype}, of several lengths, or some are null; only vectors of one length are read"
    if math.prod(shape) > MOST_LIST_VALUES:
        return (
            f"{dtype}, {math.prod(shape)} values a row; at most {MOST_LIST_VALUES} are read, a row is in memory whole"
        )
    return _Kind(tag, shape)


def _find_length(chunks: list[ColumnChunk]) -> tuple[int] | None:
    """Return the length that all lists of a column must have, if they have one, going by the number of values."""
    lengths = {divmod(chunk.num_values, chunk.num_rows) for chunk in chunks if chunk.num_rows > 0}
    if len(lengths) != 1:
        return None if lengths else (0,)
    [(length, rest)] = lengths
    # A list that is null or empty counts as one value, and as a null: so lists of one may be no lists of one.
    is_one = length == 1 and any(chunk.null_count != 0 for chunk in chunks)
    return None if rest or is_one else (length,)


def _has_nulls(columns: Columns, name: str) -> bool:
    """Ask the statistics of a column, or read it where a row group has none."""
    chunks = columns.chunks[name]
    if all(chunk.null_count is not None for chunk in chunks):
        return any(chunk.null_count for chunk in chunks)
    return any(column.null_count for column in _Column(columns, name).iter_arrow(0, columns.num_rows))


@dataclass(frozen=True)
class _Column:
    """A column of a file; shape: of an entry."""

    columns: Columns
    name: str
    shape: tuple[int, ...] = ()

    def iter_rows(self, start: int, stop: int, n: int) -> Iterator[NDArray[Any]]:
        """Yield rows [start, stop), n at a time; row groups without any of them are not read."""
        columns = self.iter_arrow(start, stop)
        if not self.shape:
            return rechunk((column.to_numpy(zero_copy_only=False) for column in columns), n)
        return rechunk(self._iter_vectors(columns, start), n)

    def iter_arrow(self, start: int, stop: int) -> Iterator[pa.Array]:
        """Yield rows [start, stop) as Arrow arrays, some values at a time: Arrow takes several times their memory."""
        batch_rows = max(1, _BATCH_VALUES // max(1, math.prod(self.shape)))
        return (column for _, [column] in self.columns.iter_batches([self.name], start, stop, batch_rows))

    def _iter_vectors(self, columns: Iterable[pa.Array], row: int) -> Iterator[NDArray[Any]]:
        """Yield vectors, row being the first one's."""
        where, dim = f"{self.columns.source.path}: column {self.name!r}", math.prod(self.shape)
        for each in columns:
            column = each.storage if isinstance(each, pa.ExtensionArray) else each
            if column.null_count:
                at = row + column.is_null().index(True).as_py()
                raise ValueError(f"{where} is null in row {at}; drop such rows or fill them")
            self._check_lengths(column, row, where, dim)
            values = column.flatten()
            if values.null_count:
                at, element = divmod(values.is_null().index(True).as_py(), dim)
                raise ValueError(f"{where} is null at [{row + at}, {element}]; drop such rows or fill them")
            yield values.to_numpy().reshape(len(column), *self.shape)
            row += len(column)

    def _check_lengths(self, column: pa.Array, row: int, where: str, dim: int) -> None:
        if pa.types.is_fixed_size_list(column.type):
            return
        lengths = np.diff(column.offsets.to_numpy())
        others = np.flatnonzero(lengths != dim)
        if len(others):
            raise ValueError(
                f"{where} has {lengths[others[0]]} values in row {row + others[0]}, and on average {dim}; only vectors "
                "of one length are read, so drop or pad such rows, or drop the column"
            )


def _find_lengths(metadata: pq.FileMetaData) -> list[int]:
    """Return the number of rows of each row group."""
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def write_parquet(file: BinaryIO, path: Path, shard: OutShard) -> None:
    """Write columns, a row group at a time: 2-D tensors as fixed-size lists, 1-D tensors as numbers.

    Raises:
        ValueError: a tensor has another shape or a type that a column cannot have, or numbers of rows differ.
    """
    refuse_dtypes(path, shard, DTYPES, "write .safetensors or .pt")
    schema = pa.schema([(tensor.name, _column_type(path, tensor)) for tensor in shard.tensors])
    num_rows = _count_rows(path, shard.tensors)
    row_bytes = sum(tensor.nbytes for tensor in shard.tensors) // max(1, num_rows)
    group_rows = max(1, _GROUP_BYTES // max(1, row_bytes))
    columns = [_iter_columns(tensor, group_rows) for tensor in shard.tensors]
    # Dictionaries pay for values that repeat; weights do not.
    with pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for group in zip(*columns, strict=True):
            writer.write_table(pa.Table.from_arrays(list(group), schema=schema), row_group_size=group_rows)


def _column_type(path: Path, tensor: OutTensor) -> pa.DataType:
    dtype = DTYPES[tensor.dtype]
    if len(tensor.shape) == 1:
        return dtype
    if len(tensor.shape) == 2 and tensor.dtype in VECTOR_DTYPES and tensor.shape[1] > 0:
        return pa.list_(dtype, tensor.shape[1])
    raise ValueError(
        f"{path}: tensor {tensor.name!r} is {tensor.dtype} of shape {list(tensor.shape)}; a column holds "
        f"numbers [N] or vectors [N, d] of {', '.join(VECTOR_DTYPES)}; write .safetensors or .pt"
    )


def _count_rows(path: Path, tensors: tuple[OutTensor, ...]) -> int:
    if not tensors:
        raise ValueError(f"{path}: there are no tensors, but a Parquet file has at least one column")
    first = tensors[0]
    for tensor in tensors[1:]:
        if tensor.shape[0] != first.shape[0]:
            raise ValueError(
                f"{path}: tensor {first.name!r} has {first.shape[0]} rows and {tensor.name!r} has "
                f"{tensor.shape[0]}, but columns are of one length; write .safetensors or .pt"
            )
    return first.shape[0]


def _iter_columns(tensor: OutTensor, group_rows: int) -> Iterator[pa.Array]:
    """Yield a tensor's Arrow arrays, one a row group."""
    for rows in rechunk(iter_entries(tensor), group_rows):
        values = pa.array(rows.reshape(-1))
        yield values if rows.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
