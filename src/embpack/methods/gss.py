"""GSS: golden-section search for a symmetric range (Guan et al. 2019, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from embpack.arithmetic import F32
from embpack.layouts import RowFormat
from embpack.methods.uniform import UniformMethod
from embpack.reference import Row, round_trip

# Leaves 0.618^20, a fifteen-thousandth, of the interval.
STEPS = 20
GOLDEN_RATIO = F32(0.618034)


def _measure(x: Row, threshold: np.float32, row_format: RowFormat) -> np.float64:
    """Measure d * f(t): squares in float64, so that they neither overflow nor vanish, summed in order."""
    with np.errstate(all="ignore"):
        error = (x - round_trip(x, -threshold, threshold, row_format)).astype(np.float64)
        return np.float64(np.add.accumulate(error * error)[-1])


@dataclass(frozen=True)
class Gss(UniformMethod):
    """The threshold t in (0, max|X|] that minimizes ``f(t) = mean((X - Q(X, -t, t))^2)``.

    Two inner points divide the interval by the golden ratio. Twenty times, the interval loses what lies beyond the
    worse of them; one of the two stays an inner point, so one loss is measured each time. f need not have a single
    minimum, so the best of all measured thresholds is returned, max|X| among them: never worse than SYM. Source: the
    paper's GSS.
    """

    name: ClassVar[str] = "gss"
    kernel: ClassVar[str] = "gss"
    summary: ClassVar[str] = "the best range symmetric about zero; to compare"

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return minus and plus the best threshold measured."""
        low, high = F32(0), np.abs(x).max()
        best, best_loss = high, _measure(x, high, row_format)

        def measure(threshold: np.float32) -> np.float64:
            nonlocal best, best_loss
            loss = _measure(x, threshold, row_format)
            if loss < best_loss:
                best, best_loss = threshold, loss
            return loss

        left, right = high - GOLDEN_RATIO * (high - low), low + GOLDEN_RATIO * (high - low)
        left_loss, right_loss = measure(left), measure(right)
        for _ in range(STEPS):
            if left_loss < right_loss:
                high, right, right_loss = right, left, left_loss
                left = high - GOLDEN_RATIO * (high - low)
                left_loss = measure(left)
            else:
                low, left, left_loss = left, right, right_loss
                right = low + GOLDEN_RATIO * (high - low)
                right_loss = measure(right)
        return -best, best
