"""HIST-BRUTE: the best selection of consecutive bins (Guan et al. 2019, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from embpack._native import SearchParams
from embpack.layouts import RowFormat
from embpack.methods.base import UniformMethod
from embpack.methods.histogram import bin_losses, check_bins, count_bins
from embpack.reference import Row


@dataclass(frozen=True)
class HistBrute(UniformMethod):
    """Tries every number k of consecutive bins at every start s; the smallest loss of the histogram wins.

    ``xmin = min + w * s``, ``xmax = min + w * (s + k)``, with w the width of a bin. Of selections with equal losses
    the widest is taken, then the first. Losses are sums of whole numbers, so they are exact where they are smallest
    and the result does not depend on the order of summation. Source: the paper's HIST-BRUTE.

    Attributes:
        b: number of bins, 1 to 1024.
    """

    name: ClassVar[str] = "hist-brute"
    kernel: ClassVar[str] = "hist-brute"
    summary: ClassVar[str] = "every range that ends between bins of the row's histogram; for comparison"

    b: int = 200

    def __post_init__(self) -> None:
        check_bins(self.name, self.b)

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return the range of the best selection."""
        if x.min() == x.max():
            return x.min(), x.max()
        histogram = count_bins(x, self.b)
        counts = histogram.counts.astype(np.float64)
        best, selection = np.inf, (0, self.b)
        for k in range(self.b, 0, -1):
            losses = np.correlate(bin_losses(self.b, k, row_format.bits), counts, "valid")[::-1]
            start = int(losses.argmin())
            if losses[start] < best:
                best, selection = losses[start], (start, k)
        return histogram.select(*selection)

    def search_params(self) -> SearchParams:
        """The number of bins."""
        return SearchParams(b=self.b)
