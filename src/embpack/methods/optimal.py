"""OPTIMAL: rounding and least squares in turns, from many starts."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack._native import SearchParams
from embpack.arithmetic import F32
from embpack.layouts import RowFormat
from embpack.methods.greedy import Greedy, surely_less
from embpack.methods.uniform import UniformMethod
from embpack.reference import Row, make_grid, round_trip, store_param

# Scales to start from, in hundredths of the full range's. Rows of few values also start from the wide ones: their best
# grid may have levels that no value uses.
SCALES = tuple(range(35, 106, 5))
WIDE_SCALES = (110, 125, 140, 160, 180, 200, 225, 250, 280, 320, 360, 400)
# Where the middle of the grid lies, in quarters of a level from the middle of the range.
QUARTERS = (-2, -1, 0, 1)


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        scale_step, quarter_step: every how many of SCALES and WIDE_SCALES, and of QUARTERS, is a start.
        num_kept: starts that least squares goes on with after the first step.
        num_steps: steps from each of these.
        is_exact: whether the best range of all, in real arithmetic, is a start too.
    """

    scale_step: int
    quarter_step: int
    num_kept: int
    num_steps: int
    is_exact: bool = False


EFFORTS = {"fast": Effort(3, 2, 1, 5), "normal": Effort(1, 1, 5, 6), "exact": Effort(1, 1, 6, 8, is_exact=True)}

Ranges = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Optimal(UniformMethod):
    """The best of the uniform grids that rounding and least squares, in turns, find from many starts.

    Given a row's codes c, the best scale and bias are the regression of its values on c; given these, rounding gives
    the best codes. Neither step makes the error larger, and in turns they end in a local optimum; which one depends on
    the start. Scale and bias are rounded to the type that they are stored in at every step.

    It starts from GREEDY's range, and from those of SCALES x QUARTERS that are best after one step; at effort "exact"
    also from the optimum over all scales and biases (see find_exact). On every row its loss is at most GREEDY's, and at
    most that of zeros: a row too small for float16 parameters gets the range of a row of zeros.

    Each value's squared error may have a weight, such as the second moment of its gradient: all sums are weighted then.

    Attributes:
        effort: "fast", "normal" or "exact", see EFFORTS.

    Source: Lloyd's iteration for a uniform codebook; the paper's section 3 searches for a range only.
    """

    name: ClassVar[str] = "optimal"
    kernel: ClassVar[str] = "optimal"
    takes_error_weights: ClassVar[bool] = True
    summary: ClassVar[str] = "least squares: the least error at uniform rows' bytes"

    effort: str = "normal"

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise ValueError(f"{self.name}: effort is {self.effort!r}; choose one of {', '.join(EFFORTS)}")

    def search(self, x: Row, row_format: RowFormat, error_weights: Row | None = None) -> tuple[np.float32, np.float32]:
        """Return the best range that was found; error_weights are of the squared errors, float32 [d], none negative."""
        w = np.ones(len(x), F32) if error_weights is None else error_weights
        greedy = Greedy().search(x, row_format)
        with np.errstate(all="ignore"):
            kept = _keep_best(x, w, row_format, greedy, self._effort)
            starts = [greedy, *zip(*kept, strict=True)]
            if self._effort.is_exact:
                starts.append(find_exact(x, w, row_format.bits, greedy))
            xmin, xmax = (np.array(ends, F32) for ends in zip(*starts, strict=True))
            found = _refine(x, w, row_format, (xmin, xmax), self._effort.num_steps)
            zeros = F32(0), F32(0)
            loss, known, loss_of_zeros = (_measure(x, w, *ends, row_format) for ends in (found, greedy, zeros))
        num_terms = len(x) if error_weights is None else len(x) + 2
        best, loss = (found, loss) if surely_less(loss, known, num_terms) else (greedy, known)
        return zeros if surely_less(loss_of_zeros, loss, num_terms) else best

    def search_params(self) -> SearchParams:
        """How much is tried."""
        effort = self._effort
        return SearchParams(
            scale_step=effort.scale_step,
            quarter_step=effort.quarter_step,
            num_kept=effort.num_kept,
            num_steps=effort.num_steps,
            is_exact=effort.is_exact,
        )

    @property
    def _effort(self) -> Effort:
        return EFFORTS[self.effort]


def _make_starts(x: Row, bits: int, effort: Effort) -> Ranges:
    top, half = F32(2**bits - 1), F32(0.5)
    low, high = x.min(), x.max()
    scales = SCALES[:: effort.scale_step]
    if len(x) <= 3 << bits:
        scales += WIDE_SCALES[:: effort.scale_step]
    offsets = QUARTERS[:: effort.quarter_step]
    scale = np.repeat(np.array(scales, F32) / F32(100), len(offsets)) * ((high - low) / top)
    quarters = np.tile(np.array(offsets, F32) / F32(4), len(scales))
    xmin = ((low * half + high * half) - half * top * scale) + quarters * scale
    return xmin, xmin + top * scale


def _total(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.add.accumulate(values, axis=-1, dtype=F32)[..., -1]


def _measure(x: Row, w: Row, xmin: np.float32, xmax: np.float32, row_format: RowFormat) -> np.float32:
    """The root of the weighted sum of squared errors; squares are summed in order, in float32."""
    error = x - round_trip(x, xmin, xmax, row_format)
    return F32(np.sqrt(_total(error * error * w)))


def _step(x: Row, w: Row, row_format: RowFormat, ranges: Ranges) -> tuple[Ranges, NDArray[np.float32]]:
    """Find the least-squares ranges for the codes that ranges give, and the squared errors before."""
    top, n = F32(2**row_format.bits - 1), _total(w)
    grid = make_grid(*ranges, row_format)
    scale, bias = grid.scale, grid.bias
    z = (x - bias[:, None]) * grid.inverse[:, None]
    c = np.clip(np.rint(z), F32(0), top)
    r = z - c  # in which regression has small numbers only, wherever the row lies
    wc, wr = w * c, w * r
    sum_c, sum_cc, sum_r, sum_rc, sum_rr = (_total(values) for values in (wc, wc * c, wr, wr * c, wr * r))
    spread = n * sum_cc - sum_c * sum_c
    slope = (n * sum_rc - sum_c * sum_r) / spread
    new_bias = bias + scale * ((sum_r - slope * sum_c) / n)
    stored = store_param(new_bias, row_format)
    # The best scale for the bias as it is stored.
    new_scale = (scale * (sum_rc + sum_cc) + (bias - stored) * sum_c) / sum_cc
    usable = (spread > 0) & (new_scale > 0) & np.isfinite(new_scale)
    xmin = np.where(usable, new_bias, ranges[0])
    xmax = np.where(usable, stored + top * new_scale, ranges[1])
    return (xmin, xmax), scale * scale * sum_rr


def _keep_best(
    x: Row, w: Row, row_format: RowFormat, fallback: tuple[np.float32, np.float32], effort: Effort
) -> Ranges:
    """Return the best starts after a step, of equal ones the first; the fallback where there are not enough."""
    (xmin, xmax), _ = _step(x, w, row_format, _make_starts(x, row_format.bits, effort))
    _, losses = _step(x, w, row_format, (xmin, xmax))
    order = np.argsort(np.where(losses < np.inf, losses, np.inf), kind="stable")[: effort.num_kept]
    fits = losses[order] < np.inf
    return np.where(fits, xmin[order], fallback[0]), np.where(fits, xmax[order], fallback[1])


def _refine(x: Row, w: Row, row_format: RowFormat, ranges: Ranges, num_steps: int) -> tuple[np.float32, np.float32]:
    """Take steps from each range; return the best one on the way, of equal ones the first."""
    steps, losses = [ranges], []
    for _ in range(num_steps + 1):
        ranges, loss = _step(x, w, row_format, ranges)
        steps.append(ranges)
        losses.append(loss)
    by_start = np.array(losses).T
    start, step = np.unravel_index(np.where(by_start < np.inf, by_start, np.inf).argmin(), by_start.shape)
    return steps[step][0][start], steps[step][1][start]


def find_exact(x: Row, w: Row, bits: int, fallback: tuple[np.float32, np.float32]) -> tuple[np.float32, np.float32]:
    """Find the range with the least weighted squared error of all, before scale and bias are rounded.

    In the plane of scale s and bias b, codes change on the lines b + s (k + 1/2) = x_i only, for thresholds k of
    0 .. 2^bits - 2. The optimum lies in a cell between lines, and every cell touches one; so it is enough to walk along
    each line, as s falls, and to regress x on the codes on its two sides. On the way x_j's code changes where
    s = (x_j - x_i) / q, for another threshold k + q, and each change updates the sums of the regression. Codes are
    counted from k, so that all lines of x_i have the same changes, each those within its thresholds.

    Values that weigh nothing have no lines. Returns the fallback where all codes are one.
    """
    ascending = np.argsort(x, kind="stable")
    ascending = ascending[w[ascending] > 0]
    values, weights = x[ascending].astype(np.float64), w[ascending].astype(np.float64)
    top, total_weight = 2**bits - 1, _sum(weights)
    if not total_weight:
        return fallback
    mean = _sum(weights * values) / total_weight
    values -= mean
    weighted = weights * values
    best_gain, best_ends = 0.0, fallback
    for i in range(len(values)):
        if i > 0 and values[i] == values[i - 1]:
            continue
        difference = values - values[i]
        right, own = difference > 0, difference == 0
        sign = np.sign(difference)
        q = np.arange(1, top) * sign[:, None]
        scale = np.divide(difference[:, None], q, out=np.zeros_like(q), where=q != 0)
        order = np.argsort(-scale, axis=None, kind="stable")[: (top - 1) * np.count_nonzero(sign)]
        j, q = order // (top - 1), q.reshape(-1)[order]
        changes = [sign[j] * weights[j], sign[j] * (2 * q + 1) * weights[j], sign[j] * weighted[j]]
        above = np.array([_sum(weights[right]), _sum(weights[right]), _sum(weighted[right])])
        of_own = np.array([_sum(weights[own]), _sum(weights[own]), _sum(weighted[own])])
        for k in range(top):
            here = (q >= -k) & (q < top - k)
            moved = np.array([np.add.accumulate(np.append(0.0, change[here])) for change in changes])
            for start in (above, above + of_own):
                sum_c, sum_cc, sum_cx = start[:, None] + moved
                spread = total_weight * sum_cc - sum_c * sum_c
                varies = spread > 1e-10 * (total_weight * sum_cc)
                gains = np.divide(total_weight * sum_cx * sum_cx, spread, out=np.zeros_like(spread), where=varies)
                at = int(gains.argmax())
                if gains[at] > best_gain:
                    best_gain = gains[at]
                    best_scale = total_weight * sum_cx[at] / spread[at]
                    bias = mean - best_scale * (k + sum_c[at] / total_weight)
                    best_ends = F32(bias), F32(bias + top * best_scale)
    return best_ends


def _sum(values: NDArray[np.float64]) -> float:
    """The sum in order, one addition at a time."""
    return float(np.add.accumulate(values)[-1]) if len(values) else 0.0
