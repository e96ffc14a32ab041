"""OPTIMAL: rounding and least squares in turns, from many starts."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack._native import SearchParams
from embpack.layouts import RowFormat
from embpack.methods.base import UniformMethod
from embpack.methods.greedy import Greedy, measure, surely_less
from embpack.reference import F32, Row, make_grid, store_param

# Scales to start from, in hundredths of the full range's: all of them, and more for rows of few values, which may be
# best on a grid of which they leave levels unused.
SCALES = tuple(range(35, 106, 5))
WIDE_SCALES = (110, 125, 140, 160, 180, 200, 225, 250, 280, 320, 360, 400)
# Where the middle of the grid lies, in quarters of a level from the middle of the range.
QUARTERS = (-2, -1, 0, 1)


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        scale_step, quarter_step: of SCALES, WIDE_SCALES and QUARTERS every so many are started from.
        num_kept: starts that least squares goes on with after the first step.
        num_steps: how often.
    """

    scale_step: int
    quarter_step: int
    num_kept: int
    num_steps: int


EFFORTS = {"fast": Effort(3, 2, 2, 6), "normal": Effort(1, 1, 6, 8)}

Ranges = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Optimal(UniformMethod):
    """The uniform grid with the least squared error that can be found in a row's time.

    Given a row's codes c, the best scale and bias are the regression of its values on c; given these, rounding gives
    the best codes. Neither step makes the error larger, and in turns they end in a local optimum; which one depends on
    the start. Scale and bias are rounded to the type that they are stored in at every step.

    It starts from GREEDY's range, and from those of SCALES x QUARTERS that are the best ones after one step. On every
    row its loss is at most GREEDY's.

    Attributes:
        effort: "fast" or "normal", see EFFORTS.

    Source: Lloyd's iteration for a uniform codebook; the paper's section 3 searches for a range only.
    """

    name: ClassVar[str] = "optimal"
    kernel: ClassVar[str] = "optimal"
    summary: ClassVar[str] = "least squares from many starts: the least error at uniform rows' bytes"

    effort: str = "normal"

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise ValueError(f"{self.name}: effort is {self.effort!r}; choose one of {', '.join(EFFORTS)}")

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return the best range that was found."""
        greedy = Greedy().search(x, row_format)
        with np.errstate(all="ignore"):
            kept = _keep_best(x, row_format, greedy, self._effort)
            starts = np.append(greedy[0], kept[0]), np.append(greedy[1], kept[1])
            xmin, xmax = _refine(x, row_format, starts, self._effort.num_steps)
        found = measure(x, xmin, xmax, row_format)
        is_better = surely_less(found.loss, measure(x, *greedy, row_format).loss, len(x))
        return (xmin, xmax) if is_better else greedy

    def search_params(self) -> SearchParams:
        """How much is tried."""
        effort = self._effort
        return SearchParams(
            scale_step=effort.scale_step,
            quarter_step=effort.quarter_step,
            num_kept=effort.num_kept,
            num_steps=effort.num_steps,
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


def _step(x: Row, row_format: RowFormat, ranges: Ranges) -> tuple[Ranges, NDArray[np.float32]]:
    """Find the least-squares ranges for the codes that ranges give, and the squared errors before."""
    top, n = F32(2**row_format.bits - 1), F32(len(x))
    grid = make_grid(*ranges, row_format)
    scale, bias = grid.scale, grid.bias
    z = (x - bias[:, None]) * grid.inverse[:, None]
    c = np.clip(np.rint(z), F32(0), top)
    r = z - c  # in which regression has small numbers only, wherever the row lies

    def total(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.add.accumulate(values, axis=1, dtype=F32)[:, -1]

    sum_c, sum_cc, sum_r, sum_rc, sum_rr = (total(values) for values in (c, c * c, r, r * c, r * r))
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


def _keep_best(x: Row, row_format: RowFormat, fallback: tuple[np.float32, np.float32], effort: Effort) -> Ranges:
    """Return the best starts after a step, of equal ones the first; the fallback where there are not enough."""
    (xmin, xmax), _ = _step(x, row_format, _make_starts(x, row_format.bits, effort))
    _, losses = _step(x, row_format, (xmin, xmax))
    order = np.argsort(np.where(losses < np.inf, losses, np.inf), kind="stable")[: effort.num_kept]
    fits = losses[order] < np.inf
    return np.where(fits, xmin[order], fallback[0]), np.where(fits, xmax[order], fallback[1])


def _refine(x: Row, row_format: RowFormat, ranges: Ranges, num_steps: int) -> tuple[np.float32, np.float32]:
    """Take steps from each range; return the best one on the way, of equal ones the first."""
    steps, losses = [ranges], []
    for _ in range(num_steps + 1):
        ranges, loss = _step(x, row_format, ranges)
        steps.append(ranges)
        losses.append(loss)
    by_start = np.array(losses).T
    start, step = np.unravel_index(np.where(by_start < np.inf, by_start, np.inf).argmin(), by_start.shape)
    return steps[step][0][start], steps[step][1][start]
