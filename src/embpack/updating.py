"""Rows packed as those of a table that is packed already, for tables that change."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack.arithmetic import F32
from embpack.chunks import iter_chunks
from embpack.layouts import RowFormat
from embpack.layouts.clustered import cluster_dtype
from embpack.layouts.trellis import TrellisLayout, TrellisParameters
from embpack.methods import METHODS, KMeansCls, Method, Packer, TableRange, Trellis, parse_method
from embpack.methods.base import Sums
from embpack.methods.kmeans_cls import ClusterPacker
from embpack.methods.trellis import TrellisPacker, refuse_large
from embpack.rotation import rotate_chunks
from embpack.rows import widen
from embpack.table import PackedTable

Numbers = NDArray[np.int64]

# By layout, of rows that share values. A table's own rows are seldom beyond them: of 4,000 rows of 8 to 64 values, normal,
# heavy-tailed (Student's t, 3 degrees), of sizes a factor of e apart, around a mean, or with zeros among them, at most
# 0.7 % in the trellis layout at 2 to 6 bits (none from 16 values on), and in the clustered layout at 4 bits at most 2 %.
# Rows four times the size of a table's of normal ones were beyond the first at 4 bits by .8 and more.
MISFIT_FACTORS = {"trellis": 2.0, "clustered": 25.0, "uniform": 25.0}
"""A row no longer fits what the table's rows share if its squared error is more than so many times that of ASYM."""


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
    clusters: NDArray[Any] | None = None
    if isinstance(found, KMeansCls):
        assert codebooks is not None
        clusters = np.empty(len(rows), cluster_dtype(len(codebooks)))
    numbers = np.arange(len(rows)) if numbers is None else numbers
    sums, num_misfits, start = list[Sums](), 0, 0
    for chunk in iter_chunks(rows, None):
        own = slice(start, start + len(chunk))
        [values] = rotate_chunks([chunk], row_format.rotation, place, numbers=numbers[own])
        if clusters is not None and codebooks is not None:
            clusters[own] = assign(widen(values), codebooks.astype(F32))
        of_rows = None if clusters is None else clusters[own]
        packer = _make_packer(found, row_format, codebooks, of_rows, place)
        if isinstance(packer, TrellisPacker):
            _refuse_large(values, packer.shared.mean, place, numbers[own])
        sums += packer.pack(values, packed[own], numbers=numbers[own])
        if of_rows is not None or isinstance(found, Trellis | TableRange):
            decoded = PackedTable(packed[own], row_format, clusters=of_rows, codebooks=codebooks).as_packed.dequantize()
            num_misfits += int(find_misfits(widen(values), decoded, row_format).sum())
        start = own.stop
    return Update(packed, clusters, sums, num_misfits)


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


def _make_packer(
    method: Method,
    row_format: RowFormat,
    codebooks: NDArray[Any] | None,
    clusters: NDArray[Any] | None,
    place: str,
) -> Packer:
    """Make the packer of a table from what its rows share, given the clusters of the rows that are to be packed."""
    if codebooks is None:
        return method.fit(lambda: (), 0, row_format, place)  # which looks at no rows, as none share anything
    if clusters is not None:
        return ClusterPacker(method, row_format, place, clusters, codebooks.astype(F32))
    form = row_format.form
    assert isinstance(form, TrellisLayout)
    return TrellisPacker(method, row_format, place, TrellisParameters.split(codebooks, form.trellis))


def _refuse_large(rows: NDArray[Any], mean: NDArray[np.float32], place: str, numbers: Numbers) -> None:
    with np.errstate(all="ignore"):  # of values that are not finite, of which the packer tells
        distances = np.abs(widen(rows) - mean).max(axis=1)
    distances[np.isnan(distances)] = 0
    row = int(distances.argmax())
    refuse_large(float(distances[row]), f"{place}[{numbers[row]}]")


def assign(rows: NDArray[np.float32], codebooks: NDArray[np.float32]) -> Numbers:
    """Find the codebook with the least squared error of each row, of equal ones the first; int64 [n].

    Sums of a row's values in order, and of their squares, give the error of all values that are nearest to one level.

    Args:
        rows: [n, d].
        codebooks: [K, 2^bits], each ascending.
    """
    bounds = (codebooks[:, :-1].astype(np.float64) + codebooks[:, 1:]) * 0.5
    levels = codebooks.astype(np.float64)
    found = np.empty(len(rows), np.int64)
    for number, row in enumerate(rows):
        values = np.sort(row).astype(np.float64)
        ends = np.full(levels.shape, len(values))
        ends[:, :-1] = np.searchsorted(values, bounds, side="right")
        counts = np.diff(ends, prepend=0)
        sums = np.diff(np.concatenate([[0], np.cumsum(values)])[ends], prepend=0)
        errors = np.where(counts > 0, levels * (levels * counts - 2 * sums), 0).cumsum(axis=1)[:, -1]
        found[number] = np.argmin(np.where(np.isnan(errors), np.inf, errors))
    return found


def find_misfits(rows: NDArray[np.float32], decoded: NDArray[np.float32], row_format: RowFormat) -> NDArray[np.bool_]:
    """Find the rows that what they share with others does not fit, [n].

    ASYM shares nothing: a row has a grid of its own, from its smallest value to its largest. Rows for which sharing
    costs many times ASYM's squared error, at the same bits, are unlike those that the shared values were made for. A row
    whose values are all the same, which ASYM has exactly, is not counted.

    Args:
        rows: [n, d], as they were packed.
        decoded: [n, d], what they are now.
        row_format: of the table.
    """
    x = rows.astype(np.float64)
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    step = (high - low) / (int(2**row_format.bits) - 1)
    has_range = step > 0
    codes = np.rint(np.divide(x - low, step, out=np.zeros_like(x), where=has_range))
    of_asym = np.square(low + codes * step - x).sum(axis=1)
    errors = np.square(decoded.astype(np.float64) - x).sum(axis=1)
    misfits: NDArray[np.bool_] = has_range[:, 0] & (errors > MISFIT_FACTORS[row_format.layout] * of_asym)
    return misfits
