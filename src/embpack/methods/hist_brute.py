"""HIST-BRUTE: the best selection of consecutive bins (Guan et al. 2019, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from embpack.methods.histogram import Histogram, HistogramMethod, bin_losses


@dataclass(frozen=True)
class HistBrute(HistogramMethod):
    """Tries every number k of consecutive bins at every start s; the smallest loss of the histogram wins.

    ``xmin = min + w * s``, ``xmax = min + w * (s + k)``, with w the width of a bin. Of selections with equal losses
    the widest is taken, then the first. Losses are sums of whole numbers, so they are exact where they are smallest
    and the result does not depend on the order of summation. Source: the paper's HIST-BRUTE.
    """

    name: ClassVar[str] = "hist-brute"
    kernel: ClassVar[str] = "hist-brute"
    summary: ClassVar[str] = "all ranges between bins of a histogram; to compare"

    def select(self, histogram: Histogram, bits: int) -> tuple[int, int]:
        """Select the best."""
        counts = histogram.counts.astype(np.float64)
        best, selection = np.inf, (0, self.b)
        for k in range(self.b, 0, -1):
            losses = np.correlate(bin_losses(self.b, k, bits), counts, "valid")[::-1]
            start = int(losses.argmin())
            if losses[start] < best:
                best, selection = losses[start], (start, k)
        return selection
