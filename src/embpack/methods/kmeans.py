"""KMEANS: a codebook for each row (Guan et al. 2019, section 3.2)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack.arithmetic import F32
from embpack.layouts import RowFormat
from embpack.methods.codebook import CodebookMethod
from embpack.reference import Row

F64 = np.float64
Values = NDArray[np.float64]

# Lloyd's iteration ends by itself; the limit only bounds what a row can cost.
MOST_LLOYD_ITERATIONS = 300


@dataclass(frozen=True)
class SortedRow:
    """A row in order, counted from the middle of its range, where sums of squares cancel the least.

    Attributes:
        middle: half way between the smallest and the largest value.
        values: float64 [d], ascending.
        sums: float64 [d + 1], of the first j values, added one after the other.
        squares: float64 [d + 1], of their squares.
    """

    middle: np.float64
    values: Values
    sums: Values
    squares: Values

    @classmethod
    def make(cls, x: Row) -> "SortedRow":
        """Sort a row."""
        ordered = np.sort(x).astype(F64)
        middle = (ordered[0] + ordered[-1]) * 0.5
        values = ordered - middle
        return cls(middle, values, _sums_before(values), _sums_before(values * values))

    def errors(self) -> Values:
        """Squared errors of clusters, sum of squares - square of sum / count: float64 [d, d], of the values from i to j
        at [i, j], infinite where there are none.
        """  # noqa: D205
        first, last = np.indices((len(self.values),) * 2)
        sums = self.sums[last + 1] - self.sums[first]
        squares = self.squares[last + 1] - self.squares[first]
        inverses = 1.0 / np.maximum(last + 1 - first, 1)
        return np.where(first <= last, squares - sums * sums * inverses, np.inf)

    def mean(self, first: int, end: int) -> np.float64:
        """Mean of the values from ``first`` to before ``end``."""
        return F64((self.sums[end] - self.sums[first]) / F64(end - first))


def _sums_before(values: Values) -> Values:
    sums: Values = np.concatenate([[0.0], np.add.accumulate(values)])
    return sums


def find_best_centres(row: SortedRow, num_clusters: int) -> Values:
    """Solve k-means exactly: float64 [num_clusters], counted from the middle.

    The clusters of a solution are runs of the sorted values. So, with e(i, j) the squared error of the values i .. j as
    one cluster, the least error of the first values up to j in k clusters is
    ``E[k, j] = min over i of E[k - 1, i - 1] + e(i, j)``; the last i of equal ones is taken.
    """
    d = len(row.values)
    errors = row.errors()
    least = errors[0]
    starts = np.zeros((num_clusters, d), np.int64)
    for k in range(1, num_clusters):
        before = np.concatenate([[np.inf], least[:-1]])  # the last cluster cannot start with the first value
        totals = before[:, None] + errors
        starts[k] = d - 1 - np.argmin(totals[::-1], axis=0)
        least = totals[starts[k], np.arange(d)]
    centres, end = np.empty(num_clusters, F64), d
    for k in reversed(range(num_clusters)):
        first = int(starts[k, end - 1])
        centres[k], end = row.mean(first, end), first
    return centres


def iterate_lloyd(row: SortedRow, num_clusters: int) -> Values:
    """Improve the grid of ASYM until nothing moves: float64 [num_clusters], counted from the middle.

    A value half way between two centres belongs to the lower one; a cluster without values keeps its centre.
    """
    step = (row.values[-1] - row.values[0]) / (num_clusters - 1)
    centres: Values = row.values[0] + np.arange(num_clusters) * step
    for _ in range(MOST_LLOYD_ITERATIONS):
        boundaries = (centres[:-1] + centres[1:]) * 0.5
        ends = [*np.searchsorted(row.values, boundaries, side="right"), len(row.values)]
        before = centres.copy()
        for k, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > first:
                centres[k] = row.mean(first, end)
        if np.array_equal(before, centres):
            break
    return centres


@dataclass(frozen=True)
class KMeans(CodebookMethod):
    """The codebook with the least squared error there is, by dynamic programming.

    Rows of at most 2^bits values come back as they are, but for the rounding of the codebook to its type; entries that
    are left over repeat the last one.

    Source: the paper's KMEANS; that one-dimensional k-means can be solved exactly: Wang and Song 2011
    (Ckmeans.1d.dp).
    """

    name: ClassVar[str] = "kmeans"
    kernel: ClassVar[str] = "kmeans"
    summary: ClassVar[str] = "the best codebook for each row; the most bytes"

    def search(self, x: Row, row_format: RowFormat) -> Row:
        """Return the codebook of the row."""
        row = SortedRow.make(x)
        centres = find_best_centres(row, min(row_format.num_levels, len(x)))
        levels = np.pad(row.middle + centres, (0, row_format.num_levels - len(centres)), mode="edge")
        return levels.astype(F32)


@dataclass(frozen=True)
class KMeansLloyd(CodebookMethod):
    """The codebook that Lloyd's iteration finds from the grid of ASYM, as in the paper. Source: its KMEANS."""

    name: ClassVar[str] = "kmeans-lloyd"
    kernel: ClassVar[str] = "kmeans-lloyd"
    summary: ClassVar[str] = "a codebook for each row by Lloyd's search; to reproduce"

    def search(self, x: Row, row_format: RowFormat) -> Row:
        """Return the codebook of the row."""
        row = SortedRow.make(x)
        return (row.middle + iterate_lloyd(row, row_format.num_levels)).astype(F32)
