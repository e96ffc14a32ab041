"""TRELLIS: one codebook for the table, and for each row the best path through a trellis."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.arithmetic import F32
from embpack.chunks import span_rows
from embpack.layouts import RowFormat
from embpack.layouts.trellis import TrellisFormat, TrellisParameters
from embpack.methods.base import Chunks, Encoded, Method, OnRows, Packer, bound_values
from embpack.methods.trellis_search import SAMPLE_ROWS, count_sample, fit
from embpack.rows import spread_rows, widen

# The squared errors of larger values would overflow.
LARGEST = 1e18


@dataclass(frozen=True)
class Trellis(Method):
    """Rows that share a codebook, scales and a mean, and are coded as embpack.layouts.trellis specifies.

    Source: docs/trellis.md.
    """

    name: ClassVar[str] = "trellis"
    layout: ClassVar[str] = "trellis"
    summary: ClassVar[str] = "nearly kmeans' errors, at uniform rows' bytes"

    def num_codebooks(self, num_embeddings: int, row_format: RowFormat) -> int:
        """One, of the whole table."""
        return 1

    def sample_rows(self, num_embeddings: int, row_format: RowFormat) -> int:
        """A few thousand."""
        return min(num_embeddings, count_sample(SAMPLE_ROWS, row_format.embedding_dim))

    def fit(self, chunks: Chunks, num_embeddings: int, row_format: RowFormat, name: str = "weight") -> Packer:
        """Find what the rows share, in two passes: the second needs the mean, which the first finds."""
        numbers = spread_rows(num_embeddings, self.sample_rows(num_embeddings, row_format))
        mean, sample = _read_sample(chunks, numbers, num_embeddings, name)
        bounds = _bound_rows(chunks, mean)
        refuse_large(bounds[1], name)
        trellis = TrellisFormat(row_format.embedding_dim, row_format.row_bytes)
        return TrellisPacker(self, row_format, name, fit(sample, trellis, bounds, mean, _encode))


def refuse_large(distance: float, name: str) -> None:
    """Raise ValueError if a value is too far from its column's mean."""
    if distance > LARGEST:
        raise ValueError(
            f"{name}: a value is {distance:.3g} from its column's mean; 'trellis' takes at most {LARGEST:g}: rescale "
            "the table, or choose another method"
        )


@dataclass(frozen=True, eq=False)
class TrellisPacker(Packer):
    """Packs rows by what all of them share."""

    shared: TrellisParameters

    def beside(self) -> dict[str, NDArray[Any]]:
        """Levels, scales and mean."""
        return {"codebooks": self.shared.join()}

    def _encode(
        self,
        rows: NDArray[Any],
        packed: NDArray[np.uint8],
        start: int,
        on_rows: OnRows | None,
        by_row: NDArray[Any] | None,
    ) -> Encoded:
        return _call_kernel(rows, self.shared, span_rows(self.row_format.embedding_dim), packed, on_rows)


def _read_sample(
    chunks: Chunks, numbers: NDArray[np.int64], num_embeddings: int, name: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Find the mean [embedding_dim], and read the rows that have these numbers, in ascending order."""
    sample, seen, total = [], 0, np.zeros(())
    for rows in chunks():
        bound_values(rows, name, seen)  # refuses NaN and infinity
        sums = np.empty((1, rows.shape[1]))
        _native.sum_groups(rows, None, np.array([0, len(rows)]), sums)
        total = total + sums[0]
        begin, end = np.searchsorted(numbers, (seen, seen + len(rows)))
        sample.append(widen(rows[numbers[begin:end] - seen]))
        seen += len(rows)
    return (total / num_embeddings).astype(F32), np.concatenate(sample)


def _bound_rows(chunks: Chunks, mean: NDArray[np.float32]) -> tuple[float, float]:
    """Find the least of the rows' largest distances from the mean that is not 0, and the largest."""
    smallest, largest = np.inf, 0.0
    for rows in chunks():
        least, most = _native.bound_distances(rows, mean)
        smallest, largest = min(smallest, least), max(largest, most)
    return smallest, largest


def _encode(rows: NDArray[np.float32], trellis: TrellisFormat, parameters: TrellisParameters) -> NDArray[np.uint8]:
    packed = np.empty((len(rows), trellis.row_bytes), np.uint8)
    _call_kernel(np.ascontiguousarray(rows), parameters, _native.block_rows, packed)
    return packed


def _call_kernel(
    rows: NDArray[Any], shared: TrellisParameters, span: int, packed: NDArray[np.uint8], on_rows: OnRows | None = None
) -> Encoded:
    return _native.encode_trellis(rows, shared.narrow, shared.wide, shared.scales, shared.mean, span, packed, on_rows)
