"""DiskTable: packed rows that stay on the disk, and are read when they are looked up."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.errors import FormatError
from embpack.formats import SourceTensor
from embpack.layouts import RowFormat
from embpack.lookups import Table, find_outside
from embpack.table import PackedTable

MOST_BYTES = 1 << 24
"""Packed rows that a lookup has in memory at a time, but for a bag that has more of them."""


class DiskRows:
    """An array with an entry for each row of a table, in pieces of files that stay open as long as it lives.

    Args:
        tensors: its pieces in the order of their rows, of one type and, but for axis 0, one shape; as they lie in
            safetensors files.

    Raises:
        FormatError: a file was changed since it was opened.
        OSError: too many files are open.
    """

    def __init__(self, tensors: Sequence[SourceTensor]) -> None:
        pieces = [tensor.stored for tensor in tensors if tensor.stored is not None]
        assert len(pieces) == len(tensors)  # as in all safetensors files
        self._pieces = pieces
        self.dtype = pieces[0].dtype
        self.row_shape = pieces[0].shape[1:]
        self.row_bytes = math.prod(self.row_shape) * self.dtype.itemsize
        self.num_rows = sum(piece.shape[0] for piece in pieces)
        parts = [(piece.source.open_for_rows(), piece.offset, piece.shape[0]) for piece in pieces]
        self.native = _native.DiskRows(parts, self.row_bytes)

    def make_room(self, num_rows: int) -> NDArray[Any]:
        """Make an array for some rows."""
        return np.empty((num_rows, *self.row_shape), self.dtype)

    def explain_fault(self, piece: int, offset: int, code: int) -> Exception:
        """Make an error of what the core could not read."""
        path = self._pieces[piece].source.path
        if code:
            return OSError(
                code, f"{os.strerror(code)}, at byte {offset} and the {self.row_bytes} from there on", str(path)
            )
        return FormatError(
            f"{path}: ends before byte {offset + self.row_bytes}, where a row lies that is looked up; it was cut since "
            "it was loaded, copy it again"
        )


def read_arrays(reads: Sequence[tuple[DiskRows, NDArray[np.int64]]]) -> list[NDArray[Any]]:
    """Read rows of arrays, those of all at once.

    Args:
        reads: of each array the rows int64 [n], ascending.

    Returns:
        Of each array [n, ...].

    Raises:
        FormatError: a file was cut; names it and the offset.
        OSError: rows cannot be read; names file and offset.
    """
    found = [array.make_room(len(rows)) for array, rows in reads]
    fault = _native.read_rows(
        [
            (array.native, rows, out.view(np.uint8).reshape(len(rows), array.row_bytes))
            for (array, rows), out in zip(reads, found, strict=True)
        ]
    )
    if fault is not None:
        number, *place = fault
        raise reads[number][0].explain_fault(*place)
    return found


@dataclass(frozen=True, eq=False, repr=False)
class DiskTable(Table):
    """An embedding table whose rows stay on the disk; embpack.load(path, access="disk") makes them.

    A lookup reads the rows that it needs into memory, each once and many at a time, and gives what a PackedTable of
    the same file gives, bit by bit. It has at most 16 MiB of packed rows in memory at a time, but for a single bag
    with more distinct rows than that. The file may be replaced or deleted, as of a mapped table; where it was cut, or
    the disk fails, lookups raise FormatError or OSError with the file and the offset.

    copy.copy and copy.deepcopy return the table itself, which never changes. It has no linear, as all rows of an output
    layer are needed each time, and cannot be pickled or saved: load the file mapped for that.

    Attributes:
        packed: where the rows are: uint8 [num_embeddings, row_bytes].
        row_format, dtype, method, loss: as of a PackedTable.
        clusters: where the array with an entry for each row lies, in the layout that has one; None in others.
        codebooks: the array that all rows share, in memory; None in layouts that have none.
    """

    packed: DiskRows
    row_format: RowFormat
    dtype: str = "float32"
    method: str = ""
    loss: float | None = None
    clusters: DiskRows | None = None
    codebooks: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        # What its rows and what lies beside them must be, but for their number, is what they must be of one row.
        packed = self.packed.make_room(1)
        clusters = None if self.clusters is None else self.clusters.make_room(1)
        PackedTable(packed, self.row_format, self.dtype, clusters=clusters, codebooks=self.codebooks)

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.packed.num_rows

    @property
    def arrays(self) -> list[DiskRows]:
        """The arrays with an entry for each row, the packed rows first."""
        return [array for array in (self.packed, self.clusters) if array is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all packed rows, and of the clusters and codebooks beside them, wherever they are."""
        shared = 0 if self.codebooks is None else self.codebooks.nbytes
        return shared + self.num_embeddings * sum(array.row_bytes for array in self.arrays)

    def prefetch(self, indices: Any) -> None:  # noqa: D102  (as in Table)
        rows = self._sort_rows(indices)
        for array in self.arrays:
            _native.prefetch_rows(array.native, rows)

    def view_rows(self, packed: NDArray[np.uint8], clusters: NDArray[Any] | None = None) -> _native.TableView:
        """Some rows as a table of their own, as the core takes it."""
        return _native.TableView(packed, self._format_text, clusters, self._codebook_bytes)

    @cached_property
    def _format_text(self) -> str:
        return str(self.row_format)

    @cached_property
    def _codebook_bytes(self) -> NDArray[np.uint8] | None:
        return None if self.codebooks is None else np.ascontiguousarray(self.codebooks).view(np.uint8)

    @cached_property
    def native_view(self) -> "_Lookups":  # noqa: D102  (as in Table)
        return _Lookups(self)

    @cached_property
    def as_packed(self) -> "DiskTable":  # noqa: D102  (as in Table)
        return replace(self, row_format=replace(self.row_format, rotation=None))

    def update(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse what a PackedTable does.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            'rows that stay on the disk do not change: load the file with access="memory" to update the table, or '
            "update the file itself: embpack update"
        )

    def _cluster_of(self, row: int) -> int:
        assert self.clusters is not None
        [clusters] = read_arrays([(self.clusters, np.array([row]))])
        return int(clusters[0])

    def __copy__(self) -> "DiskTable":
        return self

    def __deepcopy__(self, memo: Any) -> "DiskTable":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            'rows that stay on the disk cannot be pickled; load the file there: embpack.load(path, access="disk")'
        )


def read_views(wanted: Sequence[tuple[DiskTable, NDArray[np.int64]]]) -> list[_native.TableView]:
    """Read rows of tables, those of all at once, and make of each table's a table of their own, as the core takes it.

    Args:
        wanted: of each table the rows int64 [n], ascending.

    Raises:
        FormatError, OSError: as read_arrays.
    """
    found = iter(read_arrays([(array, rows) for table, rows in wanted for array in table.arrays]))
    return [table.view_rows(*(next(found) for _ in table.arrays)) for table, _ in wanted]


class _Lookups:
    """Lookups as _native.TableView has them, of rows that are read for them."""

    def __init__(self, table: DiskTable) -> None:
        self._table = table
        self._rows_at_a_time = max(1, MOST_BYTES // table.row_bytes)

    def gather(self, indices: NDArray[Any] | None, out: NDArray[Any]) -> int:
        for first in range(0, len(out), self._rows_at_a_time):
            part = slice(first, first + self._rows_at_a_time)
            if indices is None:
                numbers, rows = None, np.arange(first, min(first + self._rows_at_a_time, len(out)))
            else:
                fault = find_outside(indices[part], self._table.num_embeddings)
                if fault != -1:
                    return first + fault
                rows, numbers = renumber(indices[part])
            [view] = read_views([(self._table, rows)])
            fault = view.gather(numbers, out[part])
            if fault != -1:
                return fault - first  # -2 - position
        return -1

    def pool(
        self,
        indices: NDArray[Any],
        offsets: NDArray[Any] | None,
        bag_size: int,
        per_sample_weights: NDArray[np.float32] | None,
        padding_index: int,
        mode: str,
        out: NDArray[Any],
    ) -> int:
        if offsets is None:
            offsets = np.arange(len(out) + 1) * bag_size
        elif len(offsets) == len(out):
            offsets = np.append(offsets, len(indices))
        if not are_offsets(offsets, len(indices)):
            return _native.bad_offsets
        fault = find_outside(indices, self._table.num_embeddings)
        if fault != -1:
            return fault
        for bags in cut(offsets, self._rows_at_a_time):
            first, end = offsets[bags.start], offsets[bags.stop]
            rows, numbers = renumber(indices[first:end])
            [view] = read_views([(self._table, rows)])
            fault = view.pool(
                numbers,
                offsets[bags.start : bags.stop + 1] - first,
                0,
                None if per_sample_weights is None else per_sample_weights[first:end],
                find_row(rows, padding_index),
                mode,
                out[bags],
            )
            if fault != -1:
                return fault - int(first)  # -2 - position
        return -1


class DiskGroup:
    """Lookups as _native.TableGroup has them, of tables some of which are on the disk.

    Args:
        tables: at least one of them a DiskTable.
        table_of: for each feature, the number of its table.
        modes: of each feature.
    """

    def __init__(self, tables: Sequence[Table], table_of: Sequence[int], modes: Sequence[str]) -> None:
        used = sorted(set(table_of))  # without tables that no feature reads
        self._tables, self._table_of, self._modes = [tables[at] for at in used], [*map(used.index, table_of)], [*modes]
        self._on_disk = {number: table for number, table in enumerate(self._tables) if isinstance(table, DiskTable)}
        self._features = {
            number: [feature for feature, table in enumerate(self._table_of) if table == number]
            for number in self._on_disk
        }
        self._row_bytes = np.array(
            [table.row_bytes if number in self._on_disk else 0 for number, table in enumerate(self._tables)]
        )

    def pool(
        self,
        indices: NDArray[Any],
        offsets: NDArray[Any],
        per_sample_weights: NDArray[np.float32] | None,
        out: NDArray[Any],
    ) -> tuple[int, int]:
        """Do what _native.TableGroup.pool does."""
        if not are_offsets(offsets, len(indices)):
            return 0, _native.bad_offsets
        batch, features = len(out), len(self._table_of)
        for number, of_table in self._features.items():
            for feature in of_table:
                first, end = offsets[feature * batch], offsets[(feature + 1) * batch]
                fault = find_outside(indices[first:end], self._tables[number].num_embeddings)
                if fault != -1:
                    return feature, int(first) + fault
        counts = np.diff(offsets).reshape(features, batch)
        num_bytes = np.zeros(batch + 1, np.int64)
        np.cumsum(self._row_bytes[self._table_of] @ counts, out=num_bytes[1:])
        for bags in cut(num_bytes, MOST_BYTES):
            segments = [
                slice(int(offsets[feature * batch + bags.start]), int(offsets[feature * batch + bags.stop]))
                for feature in range(features)
            ]
            part = [indices[segment] for segment in segments]
            views: list[Any] = [table.native_view for table in self._tables]
            numbers = self._read(part, views)
            starts = np.zeros(features * (bags.stop - bags.start) + 1, np.int64)
            np.cumsum(counts[:, bags].reshape(-1), out=starts[1:])
            weights = None if per_sample_weights is None else np.concatenate([per_sample_weights[s] for s in segments])
            group = _native.TableGroup(views, self._table_of, self._modes)
            feature, fault = group.pool(np.concatenate(numbers), starts, weights, out[bags])
            if fault != -1:
                moved = segments[feature].start - int(starts[feature * (bags.stop - bags.start)])
                return feature, fault + moved if fault >= 0 else fault - moved
        return 0, -1

    def _read(self, indices: Sequence[NDArray[Any]], views: list[Any]) -> list[NDArray[Any]]:
        """Read what features look up into views, and return the numbers of rows there."""
        numbers, wanted = list(indices), []
        for number, of_table in self._features.items():
            rows, renumbered = renumber(np.concatenate([indices[feature] for feature in of_table]))
            ends = np.cumsum([len(indices[feature]) for feature in of_table])
            for feature, values in zip(of_table, np.split(renumbered, ends[:-1]), strict=True):
                numbers[feature] = values
            wanted.append((self._on_disk[number], rows))
        for number, view in zip(self._features, read_views(wanted), strict=True):
            views[number] = view
        return numbers


def advise_packed(table: Any) -> str:
    """Say what to do with what is no PackedTable, where one is needed."""
    return "load it mapped" if isinstance(table, DiskTable) else "pack it first: embpack.quantize(weight)"


def renumber(indices: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that indices name, each once and ascending, and of each index where its row is among them."""
    rows, numbers = np.unique(indices, return_inverse=True)
    return rows.astype(np.int64, copy=False), numbers.astype(np.int64, copy=False).reshape(-1)


def find_row(rows: NDArray[np.int64], row: int) -> int:
    """Where a row is among ascending ones; -1 if it is not there."""
    at = int(np.searchsorted(rows, row))
    return at if at < len(rows) and rows[at] == row else -1


def are_offsets(offsets: NDArray[Any], num_indices: int) -> bool:
    """Whether each of so many indices is in one bag; offsets end with where the last bag ends."""
    return bool(offsets[0] == 0 and offsets[-1] == num_indices and (offsets[1:] >= offsets[:-1]).all())


def cut(ends: NDArray[Any], most: int) -> Iterator[slice]:
    """Cut what lies between ends into slices, each of which comes to `most` at most if it is not a single one."""
    first, count = 0, len(ends) - 1
    while first < count:
        stop = int(np.searchsorted(ends, int(ends[first]) + most, "right")) - 1
        stop = min(max(stop, first + 1), count)
        yield slice(first, stop)
        first = stop
