"""Histograms of rows, and what it costs to spend all levels on some consecutive bins.

Guan et al. 2019 take the values of a row as spread evenly over the bins of its histogram. With the 2^bits levels on a
selection of k consecutive bins, a value costs its squared distance to the nearest level, and a bin costs the integral
of that, ``p * (c^3 - a^3) / 3`` over each part [a, c] of the bin that one level is nearest to. Values outside the
selection fall to its first or last level.

Lengths are counted in units of w / (2 top), with w the width of a bin and top = 2^bits - 1: then edges, levels and the
points half way between levels are whole numbers, and so are three times the integrals, which is what is summed here.
"""

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack._native import SearchParams
from embpack.arithmetic import F32
from embpack.layouts import RowFormat
from embpack.methods.uniform import UniformMethod
from embpack.reference import Row

Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class Histogram:
    """How many values of a row, whose bounds differ, lie in each of b bins of equal width."""

    counts: NDArray[np.int64]
    xmin: np.float32
    xmax: np.float32

    def select(self, start: int, k: int) -> tuple[np.float32, np.float32]:
        """The range of the bins [start, start + k); what ends where the row ends is exactly the row's."""
        b = len(self.counts)
        low, width = float(self.xmin), (float(self.xmax) - float(self.xmin)) / b
        xmin = F32(low + width * start) if start else self.xmin
        xmax = F32(low + width * (start + k)) if start + k < b else self.xmax
        return xmin, xmax


def count_bins(x: Row, b: int) -> Histogram:
    """Histogram of a row, float32 [d], with b bins from its smallest to its largest value."""
    xmin, xmax = x.min(), x.max()
    bins = (x.astype(np.float64) - float(xmin)) * (b / (float(xmax) - float(xmin)))
    counts = np.bincount(np.minimum(bins.astype(np.int64), b - 1), minlength=b)
    return Histogram(counts, xmin, xmax)


@lru_cache(maxsize=2048)
def bin_losses(b: int, k: int, bits: int) -> Float64s:
    """Loss of one value in each bin, by its distance from the start of a selection of k bins.

    Returns:
        float64 [2 b - k], for the bins from b - k before the start to b after it. Read-only.
    """
    top = 2**bits - 1
    begin = 2 * top * np.arange(k - b, b, dtype=np.int64)
    end = begin + 2 * top
    first = np.clip((begin + k) // (2 * k), 0, top)
    last = np.clip((end + k) // (2 * k), 0, top)
    # From the bin's start to the first middle between levels, whole levels, and from the last middle to its end.
    integrals = (end - 2 * k * last) ** 3 - (begin - 2 * k * first) ** 3 + 2 * k**3 * (last - first)
    losses: Float64s = integrals.astype(np.float64)
    losses.flags.writeable = False
    return losses


@dataclass(frozen=True)
class HistogramMethod(UniformMethod):
    """A search on the histogram of a row.

    Attributes:
        b: number of bins, 1 to 1024.
    """

    b: int = 200

    def __post_init__(self) -> None:
        if not 1 <= self.b <= _native.max_bins:
            raise ValueError(f"{self.name}: b is {self.b}; give a number of bins from 1 to {_native.max_bins}")

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return the range of the bins selected; equal values have no bins, and their own range."""
        if x.min() == x.max():
            return x.min(), x.max()
        histogram = count_bins(x, self.b)
        return histogram.select(*self.select(histogram, row_format.bits))

    @abstractmethod
    def select(self, histogram: Histogram, bits: int) -> tuple[int, int]:
        """Select consecutive bins: the first of them, and how many."""

    def search_params(self) -> SearchParams:
        """The number of bins."""
        return SearchParams(b=self.b)
