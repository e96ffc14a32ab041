"""Rows packed as those of a table that is packed already, for tables that change."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.arithmetic import F32
from embpack.bags import as_array, as_integers
from embpack.chunks import iter_chunks
from embpack.errors import naming
from embpack.formats.mapped import is_of_file
from embpack.layouts import RowFormat
from embpack.layouts.trellis import MOST_BITS, TrellisLayout, TrellisParameters
from embpack.lookups import find_outside
from embpack.methods import METHODS, KMeansCls, Method, Packer, TableRange, Trellis, measure_loss, parse_method
from embpack.methods.base import Sums, find_warning
from embpack.methods.kmeans_cls import ClusterPacker
from embpack.methods.trellis import TrellisPacker, refuse_large
from embpack.rotation import rotate_chunks
from embpack.rows import as_rows, widen
from embpack.table import PackedTable

Numbers = NDArray[np.int64]

# By layout, of rows that share values, so that few of a table's own are beyond. Of tables of 2,000 rows of 8 to 256
# values (normal; of sizes about a factor of e apart; Student's t, 3 degrees; around a mean) at most .004 are in the
# trellis layout at 2, 4 and 6 bits, where the median row has .05 to 1 times that error, and at most .012 in the
# clustered layout at 4 bits. Of rows of four times the size of a normal table's own .76 to 1 are beyond in the trellis
# layout at 4 bits, of those of a 16th .8 to 1.
MISFIT_FACTORS = {"trellis": 4.0, "clustered": 25.0, "uniform": 25.0}
"""A row no longer fits what rows share if its squared error is more than so many times that of a grid of its own."""


@dataclass(frozen=True)
class UpdateReport:
    """What an update of a table has changed.

    Attributes:
        num_rows: how many rows, each counted once.
        loss: normalized l2 loss of these rows; 0 for none.
        num_misfits: how many of them what the table's rows share does not fit (see find_misfits).
    """

    num_rows: int
    loss: float
    num_misfits: int


@dataclass(frozen=True)
class Update:
    """Rows, packed as those of a table are.

    Attributes:
        packed: uint8 [n, row_bytes].
        clusters: uint8 or uint16 [n], which of the table's codebooks each row has; None in layouts without clusters.
        sums: of spans of the rows, as measure_loss takes them.
        num_misfits: rows that do not fit what the table's rows share (see find_misfits); 0 where they share nothing.
    """

    packed: NDArray[np.uint8]
    clusters: NDArray[Any] | None
    sums: list[Sums]
    num_misfits: int


def pack_like(
    row_format: RowFormat,
    method: str,
    codebooks: NDArray[Any] | None,
    rows: NDArray[Any],
    place: str = "rows",
    numbers: Numbers | None = None,
) -> Update:
    """Pack rows with the method, layout, shared values and rotation of a table.

    By a method that shares nothing, each row becomes the bytes that it has in a table that is packed anew. In the
    trellis layout it becomes those that the table's own levels, scales and mean make of it; in the clustered layout it
    gets the codebook with the least squared error, of equal ones the first.

    Args:
        row_format: of the table.
        method: of the table, name and parameters; may be "" where but one method makes such rows.
        codebooks: the array that the table's rows share; None if the layout has none.
        rows: float32, float16 or (bfloat16 as) uint16 [n, embedding_dim], not rotated; n may be 0.
        place: what the table is called in messages.
        numbers: int64 [n], of the rows in the table, for messages; None: 0, 1, 2, ...

    Raises:
        ValueError: rows have another width, or one is NaN, infinite or too large; the method is unknown, or makes
            other rows than the table's.
    """
    if rows.ndim != 2 or rows.shape[1] != row_format.embedding_dim:
        raise ValueError(f"{place}: rows have shape {list(rows.shape)}; they must be [n, {row_format.embedding_dim}]")
    found = find_method(row_format, method, place)
    packed = np.empty((len(rows), row_format.row_bytes), np.uint8)
    packer = _make_packer(found, row_format, codebooks, place)
    clusters = packer.make_by_row(len(rows))
    numbers = np.arange(len(rows)) if numbers is None else numbers
    sums, num_misfits, start = list[Sums](), 0, 0
    for chunk in iter_chunks(rows, None):
        own = slice(start, start + len(chunk))
        [values] = rotate_chunks([chunk], row_format.rotation, place, numbers=numbers[own])
        of_rows = None if clusters is None else clusters[own]
        if isinstance(packer, TrellisPacker):
            _refuse_large(widen(values), packer.shared.mean, place, numbers[own])
        sums += packer.pack(values, packed[own], by_row=of_rows, numbers=numbers[own])
        if of_rows is not None or isinstance(found, Trellis | TableRange):
            decoded = PackedTable(packed[own], row_format, clusters=of_rows, codebooks=codebooks).as_packed.dequantize()
            num_misfits += int(find_misfits(widen(values), decoded, row_format).sum())
        start = own.stop
    return Update(packed, clusters, sums, num_misfits)


def update_table(table: PackedTable, indices: Any, rows: Any, method: str | None, warn_share: float) -> UpdateReport:
    """Do what PackedTable.update does; warnings are of its caller's line."""
    _refuse_fixed(table)
    numbers, values = _read_rows(table, indices, rows)
    codebooks = table.codebooks
    if table.clusters is not None and codebooks is not None:
        codebooks = codebooks[: np.iinfo(table.clusters.dtype).max + 1]  # those that it has numbers for
    update = pack_like(table.row_format, _choose_method(table, method), codebooks, values, "table", numbers)
    if len(numbers):
        table._set_loss(None)
    arrays = [(table.packed, update.packed)]
    if table.clusters is not None and update.clusters is not None:
        arrays.append((_as_bytes(table.clusters), _as_bytes(update.clusters.astype(table.clusters.dtype))))
    _native.write_rows(numbers, arrays)
    report = UpdateReport(len(numbers), measure_loss(update.sums), update.num_misfits)
    if report.num_rows == table.num_embeddings and report.num_rows:
        table._set_loss(report.loss)
    for warning in (find_warning(update.sums), warn_of_misfits(update.num_misfits, len(numbers), warn_share)):
        if warning is not None:
            warnings.warn(f"table: {warning}", stacklevel=3)
    return report


def warn_of_misfits(num_misfits: int, num_rows: int, warn_share: float) -> str | None:
    """Say that too many rows do not fit, and the way out; None if it is at most a share of those that changed."""
    if num_misfits <= warn_share * num_rows:
        return None
    return (
        f"{num_misfits:,} of the {num_rows:,} rows that changed do not fit what the table's rows share, "
        "and lose many times what they would by a grid of their own; pack the table anew"
    )


def _refuse_fixed(table: PackedTable) -> None:
    """Raise ValueError if a table's bytes are not its own to change."""
    arrays = [array for array in (table.packed, table.clusters) if array is not None]
    if any(is_of_file(array) for array in arrays):
        raise ValueError(
            "the table's rows are mapped from a file, which other processes may read, too: load the file with "
            'access="memory", or update table.copy(); to change the file itself: embpack update'
        )
    if not all(array.flags.writeable for array in arrays):
        raise ValueError("the table's memory is read-only; update table.copy()")


def _choose_method(table: PackedTable, method: str | None) -> str:
    if method is None or not table.method:
        return method or table.method
    if parse_method(method).spec != parse_method(table.method).spec:
        raise ValueError(f"method is {method!r}, but {table.method!r} packed the table; leave method out")
    return table.method


def _read_rows(table: PackedTable, indices: Any, rows: Any) -> tuple[Numbers, NDArray[Any]]:
    """Check what is to change: int64 [n], ascending, each once, and of each its last row, as the kernels take rows."""
    numbers = as_integers(indices, "indices")
    if numbers.ndim != 1:
        raise ValueError(f"indices have {numbers.ndim} dimensions; they must be 1-D, one for each row")
    fault = find_outside(numbers, table.num_embeddings)
    if fault != -1:
        raise table.explain_fault(fault, as_array(indices, "indices"))
    wanted, found = [len(numbers), table.embedding_dim], [*np.shape(rows)]
    if found != wanted:
        raise ValueError(f"rows have shape {found}; for these indices and this table they must be {wanted}")
    if not len(numbers):
        return np.empty(0, np.int64), np.empty((0, table.embedding_dim), F32)
    with naming("rows"):
        values, _ = as_rows(rows)
    numbers = numbers.astype(np.int64, copy=False)
    if (numbers[1:] > numbers[:-1]).all():
        return numbers, values
    each, last = np.unique(numbers[::-1], return_index=True)
    return each, values[len(numbers) - 1 - last]


def _as_bytes(clusters: NDArray[Any]) -> NDArray[np.uint8]:
    return clusters.view(np.uint8).reshape(len(clusters), clusters.itemsize)


def find_method(row_format: RowFormat, method: str, place: str) -> Method:
    """Find the method that packs rows of a table.

    Raises:
        ValueError: it is unknown, or makes other rows.
    """
    known = [name for name, each in METHODS.items() if each.layout == row_format.layout]
    if not method and len(known) > 1:
        raise ValueError(
            f"{place}: which method packed its {row_format.layout} rows is unknown; name one of {', '.join(known)}"
        )
    found = parse_method(method or known[0])
    if found.layout != row_format.layout:
        raise ValueError(
            f"{place}: method {found.name!r} makes {found.layout} rows, but the table has {row_format.layout} ones; "
            f"name one of {', '.join(known)}"
        )
    if isinstance(found, TableRange) and found.needs_bounds:
        raise ValueError(f"{place}: method 'table' needs the table's range: 'table:xmin=-1,xmax=1'")
    return found


def _make_packer(method: Method, row_format: RowFormat, codebooks: NDArray[Any] | None, place: str) -> Packer:
    """Make the packer of a table from what its rows share."""
    if codebooks is None:
        return method.fit(lambda: (), 0, row_format, place)  # which looks at no rows, as none share anything
    if isinstance(method, KMeansCls):
        levels = codebooks.astype(F32)
        return ClusterPacker(method, row_format, place, NearestCodebooks(levels), levels)
    form = row_format.form
    assert isinstance(form, TrellisLayout)
    return TrellisPacker(method, row_format, place, TrellisParameters.split(codebooks, form.trellis))


def _refuse_large(rows: NDArray[np.float32], mean: NDArray[np.float32], place: str, numbers: Numbers) -> None:
    with np.errstate(all="ignore"):
        distances = np.abs(rows - mean).max(axis=1)
    distances[~np.isfinite(rows).all(axis=1)] = 0  # of which the packer tells
    row = int(distances.argmax())
    refuse_large(float(distances[row]), f"{place}[{numbers[row]}]")


@dataclass(frozen=True, eq=False)
class NearestCodebooks:
    """Clusters of rows by codebooks alone, for nobody has kept the centres."""

    codebooks: NDArray[np.float32]

    def assign(self, rows: NDArray[Any]) -> NDArray[np.uint32]:
        """Find the cluster of each row."""
        return assign(widen(rows), self.codebooks)

    def state(self) -> list[NDArray[Any]]:
        """All that rows are assigned by."""
        return [self.codebooks]


def assign(rows: NDArray[np.float32], codebooks: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Find the codebook with the least squared error of each row, of equal ones the first; uint32 [n].

    Args:
        rows: [n, d].
        codebooks: [K, 2^bits], each ascending.
    """
    numbers = np.empty(len(rows), np.uint32)
    bits = codebooks.shape[1].bit_length() - 1
    _native.assign_codebooks(np.ascontiguousarray(rows), np.ascontiguousarray(codebooks), bits, numbers)
    return numbers


def assign_reference(rows: NDArray[np.float32], codebooks: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Do what assign does in plain NumPy: the specification.

    Of a row in order, the values nearest to a level lie one after the other, and their squared error is that of sums:
    squares + level * (level * count - 2 * sum). Of two levels that are as near, the lower one has the value.
    """
    levels = codebooks.astype(np.float64)
    bounds = (levels[:, :-1] + levels[:, 1:]) * 0.5
    found = np.empty(len(rows), np.uint32)
    for number, row in enumerate(rows):
        values = np.sort(row).astype(np.float64)
        ends = np.full(levels.shape, len(values))
        ends[:, :-1] = np.searchsorted(values, bounds, side="right")
        counts = np.diff(ends, prepend=0)
        sums = np.diff(np.concatenate([[0.0], np.cumsum(values)])[ends], prepend=0.0)
        errors = np.where(counts > 0, levels * (levels * counts - 2 * sums), 0.0).cumsum(axis=1)[:, -1]
        found[number] = np.argmin(np.where(np.isnan(errors), np.inf, errors))
    return found


def find_misfits(rows: NDArray[np.float32], decoded: NDArray[np.float32], row_format: RowFormat) -> NDArray[np.bool_]:
    """Find the rows that what they share with others does not fit, [n].

    A row that shares nothing could have a grid of its own, evenly from its smallest value to its largest. Of the bits
    that its codes have, that would cost it a twelfth of a squared step a value, on average. Where sharing costs many
    times as much, the row is unlike those that the shared values were made for. One whose values are all the same,
    which a grid has exactly, is not counted.

    Args:
        rows: [n, d], as they were packed.
        decoded: [n, d], what they are now.
        row_format: of the table.
    """
    form, bits = row_format.form, row_format.bits
    if isinstance(form, TrellisLayout):  # whose codes have the bytes of scale and bias, too
        bits = min(form.trellis.code_bits / form.embedding_dim, MOST_BITS)
    span = rows.max(axis=1).astype(np.float64) - rows.min(axis=1)
    of_grid = np.square(span / (2**bits - 1)) / 12 * rows.shape[1]
    errors = np.square(decoded.astype(np.float64) - rows).sum(axis=1)
    misfits: NDArray[np.bool_] = (span > 0) & (errors > MISFIT_FACTORS[row_format.layout] * of_grid)
    return misfits
