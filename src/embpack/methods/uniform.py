"""Methods that choose a clipping range for each row, which becomes its scale and bias."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack._native import SearchParams
from embpack.arithmetic import sum_along
from embpack.chunks import span_rows
from embpack.layouts import RowFormat
from embpack.methods.base import Chunks, Encoded, Method, OnRows, Packer
from embpack.reference import Row
from embpack.rows import widen
from embpack.table import PackedTable


@dataclass(frozen=True)
class UniformMethod(Method):
    """Chooses the clipping range of each row.

    Class attributes:
        kernel: the native search that does the same as ``search``.
        takes_error_weights: whether ``search`` takes a third argument, weights of the squared errors, float32 [d].
    """

    layout: ClassVar[str] = "uniform"
    kernel: ClassVar[str]
    takes_error_weights: ClassVar[bool] = False

    @abstractmethod
    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return the clipping range (xmin, xmax) of the row ``x``, float32 [d]: the specification."""

    def search_params(self) -> SearchParams:
        """The parameters, as the native search takes them."""
        return SearchParams()

    def fit(self, chunks: Chunks, num_embeddings: int, row_format: RowFormat, name: str = "weight") -> Packer:
        """Make the packer; the table need not be read for it."""
        return UniformPacker(self, row_format, name)


@dataclass(frozen=True, eq=False)
class UniformPacker(Packer):
    """Packs rows, each with the scale and bias that its method chooses.

    Attributes:
        error_weights: what squared errors are multiplied by, float32 [1 or num_embeddings, 1 or embedding_dim]; None:
            all are 1.
    """

    params: ClassVar[str] = "scale or bias"

    method: UniformMethod
    error_weights: NDArray[np.float32] | None = None

    def weigh_errors(self, weights: Any, num_embeddings: int) -> Packer:
        """Make a packer that counts squared errors by weights."""
        if not self.method.takes_error_weights:
            return super().weigh_errors(weights, num_embeddings)
        shape = num_embeddings, self.row_format.embedding_dim
        array = as_error_weights(weights, shape)
        if self.row_format.rotation is not None and array.shape[1] > 1:
            raise ValueError(
                f"error_weights have {array.shape[1]} columns, but with rotate={self.row_format.rotation!r} a packed "
                "value is of many columns; give weights by rows, [num_embeddings, 1], or leave rotate out"
            )
        return replace(self, error_weights=array)

    def _encode(
        self,
        rows: NDArray[Any],
        packed: NDArray[np.uint8],
        start: int,
        on_rows: OnRows | None,
        by_row: NDArray[Any] | None,
    ) -> Encoded:
        if self.error_weights is None:
            return self._call_kernel(rows, packed, on_rows, None)
        return self._encode_by_weights(rows, packed, start, on_rows)

    def _encode_by_weights(
        self, rows: NDArray[Any], packed: NDArray[np.uint8], start: int, on_rows: OnRows | None
    ) -> Encoded:
        """Pack span by span, for weights and errors of a value each take more memory than the value."""
        all_sums: list[tuple[float, float, int, float]] = []
        step = span_rows(self.row_format.embedding_dim)
        for first in range(0, len(rows), step):
            own, own_packed = rows[first : first + step], packed[first : first + step]
            weights = self._weights_of(start + first, len(own))
            fault, row, sums = self._call_kernel(own, own_packed, on_rows, weights)
            if fault:
                return fault, first + row, []
            [(_, _, lost_rows, lost_square)] = sums
            all_sums.append((*self._sum_by_weights(own, own_packed, weights), lost_rows, lost_square))
        return 0, 0, all_sums

    def _call_kernel(
        self,
        rows: NDArray[Any],
        packed: NDArray[np.uint8],
        on_rows: OnRows | None,
        weights: NDArray[np.float32] | None,
    ) -> Encoded:
        form = self.row_format.form
        how = (self.method.kernel, self.method.search_params(), form.bits, self.row_format.has_f16_params)
        return _native.quantize(rows, *how, span_rows(form.embedding_dim), packed, on_rows, weights)

    def _weights_of(self, start: int, num_rows: int) -> NDArray[np.float32]:
        """The error weights of some rows, contiguous, in a row for all of them or in one for each."""
        weights = self.error_weights
        assert weights is not None
        if len(weights) > 1:
            weights = weights[start : start + num_rows]
        return np.ascontiguousarray(np.broadcast_to(weights, (len(weights), self.row_format.embedding_dim)))

    def _sum_by_weights(
        self, rows: NDArray[Any], packed: NDArray[np.uint8], weights: NDArray[np.float32]
    ) -> tuple[float, float]:
        """Weighted sums of the squared errors and of the squares."""
        values = widen(rows).astype(np.float64)
        errors = values - PackedTable(packed, self.row_format).as_packed.dequantize()
        error, square = (float(sum_along((np.square(part) * weights).reshape(-1))) for part in (errors, values))
        return error, square


def as_error_weights(values: Any, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Make error weights an array, float32 [1 or num_embeddings, 1 or embedding_dim].

    Raises:
        ValueError: they are not of these shapes, or one is negative, NaN or infinite.
    """
    weights = np.atleast_2d(np.asarray(values.detach() if hasattr(values, "detach") else values, np.float32))
    if weights.ndim != 2 or any(own not in (1, whole) for own, whole in zip(weights.shape, shape, strict=True)):
        raise ValueError(
            f"error_weights have shape {list(np.shape(values))}; for a table of {shape[0]} x {shape[1]} they are "
            f"[{shape[1]}] by columns, [{shape[0]}, 1] by rows, or [{shape[0]}, {shape[1]}]"
        )
    step = span_rows(weights.shape[1])
    for start in range(0, len(weights), step):
        part = weights[start : start + step]
        wrong = np.argwhere(~((part >= 0) & (part < np.inf)))
        if len(wrong):
            row, column = wrong[0]
            value = part[row, column]
            raise ValueError(f"error_weights[{start + row}, {column}] is {value}; weights are finite and at least 0")
    return weights
