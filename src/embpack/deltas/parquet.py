"""Deltas of Parquet files: a column of ids beside one of rows, which are lists; TorchEasyRec's are such files."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embpack.deltas.arrays import refuse_names
from embpack.deltas.base import INT8_PARAM_BYTES, ColumnNames, Delta, Keys, Positions, Rows, explain_width
from embpack.errors import FormatError
from embpack.formats.parquet import Columns
from embpack.rules import suggest

TABLE, STEP = "table_fqn", "global_step"
"""What TorchEasyRec calls the columns that a delta may lack."""

_KEY_ROWS, _BATCH_VALUES = 1 << 18, 1 << 22
_VALUES = {pa.float32(), pa.float16(), pa.uint8()}


@dataclass(frozen=True)
class _Lists(Rows):
    """Lists one after the other; place: where they lie, for messages."""

    start: int
    stop: int
    place: str
    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def take(self, positions: Positions, embedding_dim: int) -> NDArray[Any]:
        is_int8 = self.values.dtype == np.uint8
        width = embedding_dim + is_int8 * INT8_PARAM_BYTES
        chosen = positions - self.start
        lengths = self.offsets[chosen + 1] - self.offsets[chosen]
        wrong = np.flatnonzero(lengths != width)
        if len(wrong):
            place = f"{self.place} in row {positions[wrong[0]]}"
            raise explain_width(place, int(lengths[wrong[0]]), embedding_dim, is_int8=is_int8)
        if self.offsets[-1] == width * (self.stop - self.start) and (np.diff(self.offsets) == width).all():
            return self.values.reshape(-1, width)[chosen]
        found: NDArray[Any] = self.values[self.offsets[chosen][:, None] + np.arange(width)]
        return found


@dataclass(frozen=True)
class ParquetDelta(Delta):
    """A Parquet file.

    Attributes:
        columns: of the file.
        names: of those that are read; None is no such column.
        table: whose rows they are, where no column says it.
    """

    columns: Columns
    names: ColumnNames
    table: str | None
    num_rows: int
    has_steps: bool

    @classmethod
    def make(cls, columns: Columns, names: ColumnNames, table: str | None) -> "ParquetDelta":
        """Make one of a file that is open.

        Raises:
            FormatError: it lacks a column, or one is of another type.
            ValueError: it names tables though one is given.
        """
        there, path = columns.schema.names, columns.source.path
        found = ColumnNames(
            names.table or (TABLE if TABLE in there else None),
            names.ids,
            names.rows,
            names.step or (STEP if STEP in there else None),
        )
        wanted = {found.table: _is_text, found.ids: pa.types.is_integer, found.rows: _is_rows, found.step: _is_step}
        for name, fits in wanted.items():
            if name is not None and name not in there:
                raise FormatError(
                    f"{path}: has no column {name!r}; {suggest(name, there)}; say what its columns are called with "
                    "--table-column, --id-column, --row-column and --step-column"
                )
            # Of a column without rows pandas does not know the type.
            if name is not None and columns.num_rows and not fits(columns.schema.field(name).type):
                raise FormatError(
                    f"{path}: column {name!r} is {columns.schema.field(name).type}; tables are strings, ids and steps "
                    "integers, rows lists of float32 or float16, or of uint8 as FBGEMM quantizes them; convert its "
                    "values before they are written, such as by numpy.float32(row)"
                )
        if table is not None:
            refuse_names(path, table, [f"column {found.table}"] if found.table else [])
        return cls(columns, found, table, columns.num_rows, found.step is not None)

    def iter_keys(self) -> Iterator[Keys]:  # noqa: D102  (as in Delta)
        if not self.num_rows:
            return
        names = [name for name in (self.names.ids, self.names.step, self.names.table) if name is not None]
        for start, columns in self.columns.iter_batches(names, 0, self.num_rows, _KEY_ROWS):
            found = dict(zip(names, columns, strict=True))
            for name, column in found.items():
                self._refuse_nulls(name, column, start)
            ids = found[self.names.ids].to_numpy()
            positions = np.arange(start, start + len(ids))
            steps = np.zeros(len(ids), np.int64)
            if self.names.step is not None:
                steps = found[self.names.step].to_numpy().astype(np.int64)
            if self.names.table is None:
                yield Keys(self.table, positions, ids, steps)
                continue
            for table, chosen in _group(found[self.names.table]):
                yield Keys(table, positions[chosen], ids[chosen], steps[chosen])

    def iter_rows(self, positions: Positions, most_values: int) -> Iterator[Rows]:  # noqa: D102  (as in Delta)
        name = self.names.rows
        ends = np.cumsum(self.columns.group_rows)
        groups = np.searchsorted(ends, positions, side="right")
        # Where row groups have none of them, a new run begins.
        bounds = [0, *(np.flatnonzero(np.diff(groups) > 1) + 1), len(positions)]
        for first, last in pairwise(bounds):
            chunks = self.columns.chunks[name][groups[first] : groups[last - 1] + 1]
            for chunk in chunks:
                if chunk.num_values > max(_BATCH_VALUES, chunk.num_rows * most_values):
                    raise FormatError(
                        f"{self.locate()} has {chunk.num_values} values in {chunk.num_rows} rows, but rows of its "
                        f"tables have at most {most_values}"
                    )
            width = sum(chunk.num_values for chunk in chunks) // max(1, sum(chunk.num_rows for chunk in chunks))
            batch_rows = max(1, _BATCH_VALUES // max(1, width))
            start, stop = int(positions[first]), int(positions[last - 1]) + 1
            for at, [column] in self.columns.iter_batches([name], start, stop, batch_rows):
                yield self._make_rows(at, column)

    def _make_rows(self, start: int, column: pa.Array) -> Rows:
        self._refuse_nulls(self.names.rows, column, start)
        if pa.types.is_fixed_size_list(column.type):
            offsets = np.arange(len(column) + 1) * column.type.list_size
        else:
            offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.flatten()
        if values.null_count:
            at = np.searchsorted(offsets - offsets[0], values.is_null().index(True).as_py(), side="right") - 1
            raise ValueError(f"{self.locate(start + int(at))} has a value that is null; drop such rows or fill them")
        return _Lists(start, start + len(column), self.locate(), values.to_numpy(), offsets - offsets[0])

    def _refuse_nulls(self, name: str, column: pa.Array, start: int) -> None:
        if column.null_count:
            row = start + column.is_null().index(True).as_py()
            raise ValueError(
                f"{self.columns.source.path}: column {name!r} is null in row {row}; drop such rows or fill them"
            )

    def locate(self, position: int | None = None, *, of_id: bool = False) -> str:  # noqa: D102  (as in Delta)
        name = self.names.ids if of_id else self.names.rows
        place = f"{self.columns.source.path}: column {name!r}"
        return place if position is None else f"{place} in row {position}"


def _is_text(dtype: pa.DataType) -> bool:
    value = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value))


def _is_rows(dtype: pa.DataType) -> bool:
    is_list = pa.types.is_list(dtype) or pa.types.is_large_list(dtype) or pa.types.is_fixed_size_list(dtype)
    return is_list and dtype.value_type in _VALUES


def _is_step(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_integer(dtype)) and dtype != pa.uint64()


def _group(column: pa.Array) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield the texts of a column, and where each of them is."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    bounds = [0, *(np.flatnonzero(np.diff(codes[order])) + 1), len(order)]
    for first, last in pairwise(bounds):
        # Of a damaged file the bytes may be no text.
        text = encoded.dictionary[int(codes[order[first]])].as_buffer().to_pybytes().decode(errors="backslashreplace")
        yield text, order[first:last]
