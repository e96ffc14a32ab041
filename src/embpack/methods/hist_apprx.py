"""HIST-APPRX: Caffe2's norm minimization (Guan et al. 2019, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from embpack.methods.histogram import Histogram, HistogramMethod, bin_losses

# The quantile bounds move by one over this.
QUANTILE_STEPS = 100_000


def _selection_loss(histogram: Histogram, start: int, end: int, bits: int) -> float:
    """Loss of the bins [start, end], summed in the order of the bins."""
    b, k = len(histogram.counts), end - start + 1
    losses = bin_losses(b, k, bits)[b - k - start : 2 * b - k - start]
    return float(np.add.accumulate(histogram.counts * losses)[-1])


@dataclass(frozen=True)
class HistApprx(HistogramMethod):
    """Drops bins from one end or the other, while the loss of the histogram falls.

    Two quantile bounds, alpha from 0 and beta from 1, move towards each other by a hundred-thousandth at a time. If the
    next alpha would drop more bins than the next beta, alpha moves and the bins on the left are dropped, otherwise beta
    moves and those on the right are. The first selection with a larger loss than the one before ends the search. As in
    its source the full range is not measured, so the first selection always counts. The steps are counted in whole
    numbers, which rounds nothing and lets those that drop no bin be taken at once.

    Source: the paper's HIST-APPRX, which is NonlinearQuantizationParamsSearch of Caffe2's norm_minimization.cc.
    """

    name: ClassVar[str] = "hist-apprx"
    kernel: ClassVar[str] = "hist-apprx"
    summary: ClassVar[str] = "Caffe2's search on the row's histogram; to compare"

    def select(self, histogram: Histogram, bits: int) -> tuple[int, int]:
        """Select what the last selection was that did not lose more."""
        num_values = int(histogram.counts.sum())
        below = np.cumsum(histogram.counts) * QUANTILE_STEPS
        start, end, best = 0, self.b - 1, np.inf
        alpha, beta = 0, QUANTILE_STEPS
        while alpha < beta and start < end:
            # The bins that the next quantile bounds lie in.
            left = start + int(np.searchsorted(below[start:end], (alpha + 1) * num_values))
            right = start + int(np.searchsorted(below[start + 1 : end + 1], (beta - 1) * num_values, side="right"))
            if (left, right) == (start, end):
                # Nothing moves but beta, until it passes the quantile of the last bin.
                beta = min(-(-int(below[end]) // num_values), beta - 1)
                continue
            if left - start > end - right:
                selection = (left, end)
                alpha += 1
            else:
                selection = (start, right)
                beta -= 1
            loss = _selection_loss(histogram, *selection, bits)
            if loss > best:
                break
            best, (start, end) = loss, selection
        return start, end - start + 1
