"""TRELLIS: one codebook for the table, and for each row the best path through a trellis."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.arithmetic import F32
from embpack.layouts import RowFormat
from embpack.layouts.trellis import TrellisFormat, TrellisParameters
from embpack.methods.base import Method
from embpack.methods.trellis_search import SAMPLE_ROWS, fit
from embpack.rows import spread_rows, widen

# Squared errors of larger values would overflow, of smaller ones vanish.
LARGEST = 1e18


@dataclass(frozen=True)
class Trellis(Method):
    """Rows that share a codebook, scales and a mean, and are coded as embpack.layouts.trellis specifies.

    Source: docs/trellis.md.
    """

    name: ClassVar[str] = "trellis"
    layout: ClassVar[str] = "trellis"
    summary: ClassVar[str] = "the errors of kmeans at the bytes of uniform rows, which embpack alone reads"

    def num_codebooks(self, num_embeddings: int, row_format: RowFormat) -> int:
        """One, of the whole table."""
        return 1

    def fit(
        self, chunks: Callable[[], Iterable[NDArray[Any]]], num_embeddings: int, row_format: RowFormat
    ) -> TrellisParameters:
        """Find what the rows of a table share.

        Args:
            chunks: yields all rows, each time that it is called; all finite.
            num_embeddings: how many there are.
            row_format: of the packed rows.

        Raises:
            ValueError: a value is too large.
        """
        trellis = TrellisFormat(row_format.embedding_dim, row_format.row_bytes)
        total = np.zeros(row_format.embedding_dim)
        for rows in chunks():
            total += widen(rows).sum(axis=0, dtype=np.float64)
        mean = (total / num_embeddings).astype(F32)
        numbers = spread_rows(num_embeddings, min(num_embeddings, SAMPLE_ROWS))
        sample, smallest, largest, seen = [], np.inf, 0.0, 0
        for rows in chunks():
            values = widen(rows)
            of_rows = np.abs(values - mean).max(axis=1)
            smallest = float(of_rows[of_rows > 0].min(initial=smallest))
            largest = max(largest, float(of_rows.max()))
            begin, end = np.searchsorted(numbers, (seen, seen + len(rows)))
            sample.append(values[numbers[begin:end] - seen])
            seen += len(rows)
        if largest > LARGEST:
            raise ValueError(f"a value is {largest:.3g} from its column's mean; 'trellis' takes at most {LARGEST:g}")
        return fit(np.concatenate(sample), trellis, (smallest, largest), mean, _encode)


def _encode(rows: NDArray[np.float32], trellis: TrellisFormat, parameters: TrellisParameters) -> NDArray[np.uint8]:
    packed = np.empty((len(rows), trellis.row_bytes), np.uint8)
    own = (parameters.narrow, parameters.wide, parameters.scales, parameters.mean)
    _native.encode_trellis(np.ascontiguousarray(rows), *own, _native.block_rows, packed)
    return packed
