"""Array in, packed table out."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.chunks import iter_chunks, span_rows
from embpack.layouts import LAYOUTS, RowFormat
from embpack.layouts.trellis import TrellisParameters
from embpack.methods import (
    DEFAULT_METHOD,
    ClusteredMethod,
    Clusters,
    CodebookMethod,
    Method,
    TableRange,
    Trellis,
    UniformMethod,
    parse_method,
)
from embpack.reference import store_levels
from embpack.rows import as_rows, widen
from embpack.table import PackedTable

_NOT_FINITE = 1


@dataclass
class RowPacker:
    """Packs the chunks of one table, in order and rotated already, and measures the loss over all of them.

    Attributes:
        method: a fitted one (see fit_method).
        row_format: of the rows that come out.
        table_name: for messages.
        shared: what all rows share, for layouts in which they do (see fit_shared).
        error_weights: of the squared errors, float32 [1 or num_embeddings, 1 or embedding_dim]; None: all are 1.
    """

    method: Method
    row_format: RowFormat
    table_name: str = "weight"
    shared: Clusters | TrellisParameters | None = None
    error_weights: NDArray[np.float32] | None = None
    rows_packed: int = 0
    _sums: list[tuple[float, float]] = field(default_factory=list)

    def pack(self, rows: NDArray[Any], packed: NDArray[np.uint8]) -> None:
        """Pack a chunk: any number of whole spans, and the last one.

        Args:
            rows: float32, float16 or (bfloat16 as) uint16 [n, embedding_dim].
            packed: uint8 [n, row_bytes], C-contiguous; filled.

        Raises:
            ValueError: a value is NaN or infinite, or a scale or bias overflows; row and column are named.
        """
        weights = self._weights_of(len(rows))
        fault, row, sums = self._call_kernel(np.ascontiguousarray(rows), packed, weights)
        if fault:
            raise _row_error(fault, rows[row], self.rows_packed + row, self.row_format, self.table_name)
        self.rows_packed += len(rows)
        self._sums += sums if weights is None else [_sum_by_weights(rows, packed, weights, self.row_format)]

    def _weights_of(self, num_rows: int) -> NDArray[np.float32] | None:
        """The error weights of the next rows, contiguous, in a row for all of them or in one for each."""
        weights = self.error_weights
        if weights is None:
            return None
        if len(weights) > 1:
            weights = weights[self.rows_packed : self.rows_packed + num_rows]
        return np.ascontiguousarray(np.broadcast_to(weights, (len(weights), self.row_format.embedding_dim)))

    def _call_kernel(
        self, rows: NDArray[Any], packed: NDArray[np.uint8], weights: NDArray[np.float32] | None
    ) -> tuple[int, int, list[tuple[float, float]]]:
        method, shared = self.method, self.shared
        span = span_rows(self.row_format.embedding_dim)
        if isinstance(shared, TrellisParameters):
            own = (shared.narrow, shared.wide, shared.scales, shared.mean)
            return _native.encode_trellis(rows, *own, span, packed)
        bits, has_f16_params = int(self.row_format.bits), self.row_format.has_f16_params
        if shared is not None:
            of_row = shared.of_row[self.rows_packed : self.rows_packed + len(rows)].astype(np.uint32)
            levels = shared.levels
            return _native.quantize_with_clusters(rows, of_row, levels, bits, has_f16_params, span, packed)
        if isinstance(method, CodebookMethod):
            return _native.quantize_with_codebooks(rows, method.kernel, bits, has_f16_params, span, packed)
        assert isinstance(method, UniformMethod)
        how = (method.kernel, method.search_params(), bits, has_f16_params, span)
        return _native.quantize(rows, *how, packed, weights)

    @property
    def loss(self) -> float:
        """Normalized l2 loss ||X - Q(X)|| / ||X|| of the rows packed so far, its squares weighted; 0 for zeros."""
        square_error, square = (math.fsum(sums) for sums in zip(*self._sums, strict=True))
        return math.sqrt(square_error / square) if square else 0.0


def _sum_by_weights(
    rows: NDArray[Any], packed: NDArray[np.uint8], weights: NDArray[np.float32], row_format: RowFormat
) -> tuple[float, float]:
    """Weighted sums of the squared errors and of the squares, by a method that makes uniform rows."""
    values = widen(rows).astype(np.float64)
    errors = values - PackedTable(packed, row_format).as_packed.dequantize()
    error, square = (float((np.square(part) * weights).sum()) for part in (errors, values))
    return error, square


def as_error_weights(values: Any, shape: tuple[int, ...], method: Method) -> NDArray[np.float32]:
    """Make error weights an array, float32 [1 or num_embeddings, 1 or embedding_dim].

    Raises:
        ValueError: they are not of these shapes, one is negative, NaN or infinite, or the method takes none.
    """
    if not isinstance(method, UniformMethod) or not method.takes_error_weights:
        raise ValueError(f"method {method.name!r} has no error_weights; choose 'optimal'")
    weights = np.atleast_2d(np.asarray(values.detach() if hasattr(values, "detach") else values, np.float32))
    if weights.ndim != 2 or any(own not in (1, whole) for own, whole in zip(weights.shape, shape, strict=True)):
        raise ValueError(
            f"error_weights have shape {list(np.shape(values))}; for a table of {shape[0]} x {shape[1]} they are "
            f"[{shape[1]}] by columns, [{shape[0]}, 1] by rows, or [{shape[0]}, {shape[1]}]"
        )
    wrong = np.argwhere(~((weights >= 0) & (weights < np.inf)))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(f"error_weights[{row}, {column}] is {weights[row, column]}; weights are finite and at least 0")
    return weights


def _row_error(fault: int, row: NDArray[Any], index: int, row_format: RowFormat, name: str) -> ValueError:
    values = widen(row)
    if fault == _NOT_FINITE:
        column = int(np.flatnonzero(~np.isfinite(values))[0])
        return ValueError(
            f"{name}[{index}, {column}] is {values[column]}; NaN and infinity cannot be packed, replace them first"
        )
    where = f"{name}[{index}] has values from {values.min():.6g} to {values.max():.6g}"
    params = "scale or bias" if row_format.layout == "uniform" else "codebook"
    if row_format.has_f16_params:
        return ValueError(f"{where}: its {params} overflows float16 (largest: 65504); use param_dtype='float32'")
    return ValueError(f"{where}: its scale overflows float32; rescale the table")


def fit_method(method: Method, chunks: Callable[[], Iterable[NDArray[Any]]], name: str = "weight") -> Method:
    """Give a method what it must know of the whole table; only TABLE asks for anything.

    Args:
        method: as parse_method made it.
        chunks: yields all rows of the table, each time that it is called.
        name: of the table, for messages.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not isinstance(method, TableRange) or not method.needs_bounds:
        return method
    xmin, xmax, seen = math.inf, -math.inf, 0
    for rows in chunks():
        fault, row, chunk_min, chunk_max = _native.bound(np.ascontiguousarray(rows))
        if fault:
            raise _row_error(fault, rows[row], seen + row, RowFormat(rows.shape[1]), name)
        xmin, xmax, seen = min(xmin, chunk_min), max(xmax, chunk_max), seen + len(rows)
    return TableRange(xmin, xmax)


def fit_shared(
    method: Method,
    chunks: Callable[[], Iterable[NDArray[Any]]],
    num_embeddings: int,
    row_format: RowFormat,
    name: str = "weight",
) -> Clusters | TrellisParameters | None:
    """Find the clusters and codebooks of a table's rows, or what trellis-coded ones share; None for other methods.

    Args:
        method: as parse_method made it.
        chunks: yields all rows of the table, each time that it is called.
        num_embeddings: how many there are.
        row_format: of the packed rows.
        name: of the table, for messages.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not isinstance(method, ClusteredMethod | Trellis):
        return None
    fit_method(TableRange(), chunks, name)  # looks at every value
    return method.fit(chunks, num_embeddings, row_format)


def list_shared(
    shared: Clusters | TrellisParameters | None, row_format: RowFormat
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """Clusters and codebooks as a PackedTable has them."""
    if isinstance(shared, TrellisParameters):
        return None, shared.join()
    return (shared.of_row, store_levels(shared.levels, row_format)) if shared is not None else (None, None)


def make_row_format(
    embedding_dim: int, bits: float, param_dtype: str | None, layout: str = "uniform", rotation: str | None = None
) -> RowFormat:
    """Make a row format; param_dtype None is the default for these bits and this layout."""
    return RowFormat(embedding_dim, bits, param_dtype or LAYOUTS[layout].default_param_dtype(bits), layout, rotation)


def quantize(
    weight: Any,
    method: str | Method = DEFAULT_METHOD,
    bits: float = 4,
    param_dtype: str | None = None,
    *,
    error_weights: Any = None,
    rotate: str | None = None,
) -> PackedTable:
    """Pack a trained embedding table, each row with its own scale and bias.

    Args:
        weight: [num_embeddings, embedding_dim] of float32, float16 or bfloat16; NumPy or PyTorch, contiguous or
            not.
        method: how each row's range is chosen: a name in embpack.METHODS, with parameters if need be
            ("greedy:b=1000,r=0.5"), or a Method.
        bits: a code, 2, 4 or 8; for "trellis" any number from 2 to 7, for the bytes of a uniform row of so many.
        param_dtype: of scale and bias or of codebooks, "float16" or "float32"; None is float16, but for uniform
            rows at 8 bits float32, which makes rows that PyTorch and FBGEMM read.
        error_weights: what squared errors count, at least 0: [embedding_dim] by columns, such as the mean second
            moments of the columns' gradients; [num_embeddings, 1] by rows, such as access counts; or of each value,
            [num_embeddings, embedding_dim]. For "optimal". None: all count the same.
        rotate: "hadamard" multiplies rows by a fixed orthogonal matrix before they are packed, and lookups undo it:
            less loss where values are heavy-tailed (embpack.rotation). Error weights are then by rows only, for a
            packed value is of many columns.

    Returns:
        A PackedTable; its ``loss`` is what packing cost, with the error_weights.

    Raises:
        TypeError: weight is of another type.
        ValueError: weight is not 2-D, is empty or has NaN or infinity; a row's scale or bias overflows
            param_dtype; no such method, bits or rotation; error_weights are not as above.

    Source: Guan et al. 2019; with method="asym" the bytes of torch.ops.quantized.embedding_bag_4bit_prepack.
    """
    rows, dtype = as_rows(weight)
    chosen = parse_method(method)
    row_format = make_row_format(rows.shape[1], bits, param_dtype, chosen.layout, rotate)
    fitted = fit_method(chosen, lambda: iter_chunks(rows, rotate))
    shared = fit_shared(fitted, lambda: iter_chunks(rows, rotate), len(rows), row_format)
    weights = None if error_weights is None else as_error_weights(error_weights, rows.shape, fitted)
    if weights is not None and rotate is not None and weights.shape[1] > 1:
        raise ValueError(
            f"error_weights have {weights.shape[1]} columns, but with rotate={rotate!r} a packed value is of many "
            "columns; give weights by rows, [num_embeddings, 1], or leave rotate out"
        )
    packer = RowPacker(fitted, row_format, shared=shared, error_weights=weights)
    packed = np.empty((len(rows), row_format.row_bytes), np.uint8)
    for chunk in iter_chunks(rows, rotate):
        packer.pack(chunk, packed[packer.rows_packed : packer.rows_packed + len(chunk)])
    beside = list_shared(shared, row_format)
    return PackedTable(packed, row_format, dtype, fitted.spec, packer.loss, *beside)
