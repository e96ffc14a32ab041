"""How trellis-coded rows, and what they share, are found (embpack.layouts.trellis). The specification.

Source: docs/trellis.md.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from embpack.arithmetic import F32, exp2, interpolate, log2, sum_along
from embpack.layouts.trellis import (
    NUM_SCALES,
    NUM_STATES,
    TrellisFormat,
    TrellisParameters,
    decode,
    find_subsets,
    first_state,
)

# The scales that are tried, as shares of the row's largest value, for the codebook reaches about from -1 to 1; and at
# most how many.
LOWEST, HIGHEST, MOST_TRIES = F32(0.8), F32(1.3), 12

Rows = NDArray[np.float32]
Encode = Callable[[Rows, TrellisFormat, TrellisParameters], NDArray[np.uint8]]


def _subset_of(message: NDArray[np.int64], state: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which subset a step takes its level from, with that message bit from that state."""
    return 2 * (message ^ (state >> 3 & 1) ^ (state & 1)) + (state >> 2 & 1)


def _nearest(y: Rows, levels: NDArray[np.float32]) -> tuple[NDArray[np.uint8], Rows]:
    """Of each subset the index of the level nearest to y [N], the lower one of two, and the squared error."""
    subsets = levels.reshape(-1, 4).T  # [4, count]
    errors = np.square(y[:, None, None] - subsets)
    indices = errors.argmin(axis=2)
    return indices.astype(np.uint8), np.take_along_axis(errors, indices[:, :, None], axis=2)[:, :, 0]


def _walk(
    y: Rows, starts: NDArray[np.bool_], trellis: TrellisFormat, parameters: TrellisParameters
) -> tuple[Rows, list[NDArray[np.uint8]]]:
    """Viterbi's algorithm over rows y [N, d] in units of their scale, from the states that are starts [N, NUM_STATES].

    Into state n two paths come, from states 2 (n mod 16) and one more; of equal ones the first is taken.

    Returns:
        The squared error of the best path to each state, and of each step which of two was best, [N, NUM_STATES].
    """
    n = np.arange(NUM_STATES)
    message, sources = n >> 4, (n & 15) << 1
    cost = np.where(starts, F32(0), F32(np.inf))
    choices = []
    for t in range(trellis.embedding_dim):
        _, errors = _nearest(y[:, t], parameters.levels_of(trellis, t))
        first, second = (cost[:, source] + errors[:, _subset_of(message, source)] for source in (sources, sources + 1))
        choices.append((second < first).astype(np.uint8))
        cost = np.where(second < first, second, first)
    return cost, choices


def _trace(
    y: Rows, starts: NDArray[np.bool_], trellis: TrellisFormat, parameters: TrellisParameters
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
    """Message bits and indices [N, d] of the best paths, and the states that they begin in [N]."""
    cost, choices = _walk(y, starts, trellis, parameters)
    state = cost.argmin(axis=1)
    messages, subsets, indices = (np.zeros(y.shape, np.uint8) for _ in range(3))
    for t in reversed(range(trellis.embedding_dim)):
        message = state >> 4
        state = ((state & 15) << 1) + np.take_along_axis(choices[t], state[:, None], axis=1)[:, 0]
        messages[:, t] = message
        subsets[:, t] = _subset_of(message, state)
        of_subsets, _ = _nearest(y[:, t], parameters.levels_of(trellis, t))
        indices[:, t] = np.take_along_axis(of_subsets, subsets[:, t : t + 1], axis=1)[:, 0]
    return messages, indices, state


def _find_tries(largest: NDArray[np.float32], grid: NDArray[np.float32]) -> NDArray[np.int64]:
    """Numbers in the grid of the scales to try, [N, MOST_TRIES], ascending; of few the last is repeated."""
    low = np.minimum(np.searchsorted(grid, largest * LOWEST), len(grid) - 1)
    span = np.maximum(np.searchsorted(grid, largest * HIGHEST, side="right") - 1, low) - low
    last = np.clip(span, 1, MOST_TRIES - 1)[:, None]
    tried: NDArray[np.int64] = low[:, None] + np.minimum(np.arange(MOST_TRIES), last) * span[:, None] // last
    return tried


def encode(rows: Rows, trellis: TrellisFormat, parameters: TrellisParameters) -> NDArray[np.uint8]:
    """Find the codes of rows, float32 [N, embedding_dim]: uint8 [N, row_bytes].

    For each of some scales, by the row's largest value, the best path is found among those from the states that the
    scale's numbers stand for; that of the least squared error is kept, of equal ones the first. All in float32, a sum
    along a path in the order of its steps.
    """
    grid = parameters.grid
    x = (rows - parameters.mean)[:, trellis.columns]
    if not len(grid):
        return np.zeros((len(x), trellis.row_bytes), np.uint8)
    largest = np.abs(x).max(axis=1)
    best_error = np.full(len(x), np.inf, F32)
    best = np.zeros(len(x), np.int64)
    starts = parameters.numbers > 0
    with np.errstate(all="ignore"):
        for tried in _find_tries(largest, grid).T:
            scale = grid[tried]
            cost, _ = _walk(x * (F32(1) / scale)[:, None], starts[tried], trellis, parameters)
            error = scale * scale * cost.min(axis=1)
            best = np.where(error < best_error, tried, best)
            best_error = np.fmin(best_error, error)
        messages, indices, state = _trace(x * (F32(1) / grid[best])[:, None], starts[best], trellis, parameters)
    numbers = parameters.numbers[best, state].astype(np.uint8)
    is_zero = (largest == 0) | (best_error == np.inf)
    messages[is_zero], indices[is_zero], numbers[is_zero] = 0, 0, 0
    return trellis.pack(messages, indices, numbers)


# Shapes of a codebook to start from: the share of the cube in (1 - share) u + share u^3, u evenly from -1 to 1.
SHAPES = (0.3, 0.45, 0.6, 0.8)
# Rows that a codebook is fitted to, and how often.
SAMPLE_ROWS, SHAPE_ROWS, NUM_ROUNDS = 4096, 512, 8
# Fewer where rows are wider than this: as many values.
SAMPLE_DIM = 4096
# Of which NumPy makes arrays together, so that memory stays bounded.
VALUES_AT_A_TIME = 1 << 18
# How many scales a table may have. With fewer, each may begin in more states.
GRID_SIZES = (8, 16, 32, 64, 128, 256)
# This share of the scales is spread evenly between the smallest and the largest, the rest as the rows' sizes are.
EVEN_SHARE = 0.15


def count_sample(most_rows: int, embedding_dim: int) -> int:
    """How many rows to take of a table, where most_rows of rows of usual width would do."""
    return most_rows * SAMPLE_DIM // max(SAMPLE_DIM, embedding_dim)


def make_scales(largest: NDArray[np.float32], bounds: tuple[float, float], count: int) -> NDArray[np.float32]:
    """Scales, [NUM_SCALES], of which `count` differ, for rows with these largest values, less the mean, [n].

    Args:
        largest: of some rows.
        bounds: of the largest values of all rows, the smallest that is not 0 and the largest. Scales are at most 2^16
            apart: what smaller rows lose is nothing beside the errors of the largest.
        count: one of GRID_SIZES.
    """
    high = float(log2(bounds[1] * 1.2))
    low = max(float(log2(bounds[0] * 0.85)), high - 16)
    wanted = np.sort(log2(np.outer(largest[largest > 0].astype(np.float64), np.linspace(0.85, 1.2, 8)).reshape(-1)))
    at = np.linspace(low, high, 1025)
    even = np.linspace(0, 1, len(at))
    share = np.searchsorted(wanted, at) / len(wanted) if len(wanted) else even
    positions = interpolate(np.linspace(0, 1, count), EVEN_SHARE * even + (1 - EVEN_SHARE) * share, at)
    return _deal_out(exp2(positions).astype(F32))


def _deal_out(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales by their numbers, [NUM_SCALES]: each state has as many of a grid, in turn."""
    scales = grid[_find_places(len(grid))]
    scales[0] = 0
    return scales


@cache
def _find_places(count: int) -> NDArray[np.int64]:
    """Where in a grid of so many each scale is."""
    of_state = NUM_SCALES // NUM_STATES
    apart = count // of_state
    places = [number % of_state * apart + first_state(number) % apart for number in range(NUM_SCALES)]
    return np.array(places)


def fit(
    sample: Rows,
    trellis: TrellisFormat,
    bounds: tuple[float, float],
    mean: NDArray[np.float32],
    encode: Encode = encode,
) -> TrellisParameters:
    """Fit codebooks and scales to rows: how many scales, the best shape, then encoding and least squares in turns.

    Args:
        sample: float32 [n, embedding_dim], at most SAMPLE_ROWS of the table's.
        trellis: of the packed rows.
        bounds: as make_scales takes them.
        mean: of the columns.
        encode: does what encode does.
    """
    levels = _make_shape(trellis, SHAPES[1])
    if not bounds[1]:
        return TrellisParameters(*levels, np.zeros(NUM_SCALES, F32), mean)
    few = sample[: count_sample(SHAPE_ROWS, trellis.embedding_dim)]

    def find_best(tried: list[TrellisParameters]) -> TrellisParameters:
        left = [few.astype(np.float64) - decode(encode(few, trellis, one), trellis, one) for one in tried]
        errors = [float(sum_along(np.square(each).reshape(-1))) for each in left]
        return tried[int(np.argmin(errors))]

    largest = np.abs(sample - mean).max(axis=1)
    best = find_best([TrellisParameters(*levels, make_scales(largest, bounds, n), mean) for n in GRID_SIZES])
    best = find_best([TrellisParameters(*_make_shape(trellis, share), best.scales, mean) for share in SHAPES])
    for _ in range(NUM_ROUNDS):
        best = _refit(sample, encode(sample, trellis, best), trellis, best)
    return best


def _make_shape(trellis: TrellisFormat, share: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    halves = ((np.arange(count) + 0.5) / max(count, 1) * 2 - 1 for count in trellis.num_levels)
    narrow, wide = (trellis.round_levels((1 - share) * u + share * u * u * u) for u in halves)
    return narrow, wide


def _refit(
    sample: Rows, packed: NDArray[np.uint8], trellis: TrellisFormat, parameters: TrellisParameters
) -> TrellisParameters:
    """The levels, symmetric about 0, with the least squared error for the codes of rows; and the scales for those."""
    step = max(1, VALUES_AT_A_TIME // trellis.embedding_dim)
    parts = [slice(start, start + step) for start in range(0, len(sample), step)]
    codebooks = ((parameters.narrow, ~trellis.is_wide), (parameters.wide, trellis.is_wide))
    numbers, numbers_of_scales = np.empty(sample.shape, np.uint8), packed[:, -1]
    sums = [np.zeros((2, len(levels))) for levels, _ in codebooks]
    for rows in parts:
        messages, indices, _ = trellis.unpack(packed[rows])
        numbers[rows] = 4 * indices + find_subsets(messages, numbers_of_scales[rows])
        x = _center(sample[rows], trellis, parameters)
        scale = parameters.scales[numbers_of_scales[rows]].astype(np.float64)[:, None]
        products, squares = x * scale, np.broadcast_to(scale * scale, x.shape)
        for total, (levels, steps) in zip(sums, codebooks, strict=True):
            of = numbers[rows][:, steps].reshape(-1)
            for k, values in enumerate((products, squares)):
                total[k] += np.bincount(of, values[:, steps].reshape(-1), minlength=len(levels))
    fitted = []
    for (product, square), (levels, _) in zip(sums, codebooks, strict=True):
        product, square = product - product[::-1], square + square[::-1]
        means = np.divide(product, square, out=levels.astype(np.float64), where=square > 0)
        fitted.append(trellis.round_levels(np.sort(means)))
    of_rows = np.empty((2, len(sample)))
    for rows in parts:
        chosen = np.empty(numbers[rows].shape)
        for levels, (_, steps) in zip(fitted, codebooks, strict=True):
            chosen[:, steps] = levels[numbers[rows][:, steps]]
        of_rows[0, rows] = sum_along((_center(sample[rows], trellis, parameters) * chosen).T)
        of_rows[1, rows] = sum_along(np.square(chosen).T)
    narrow, wide = fitted
    scales = _refit_scales(numbers_of_scales, of_rows[0], of_rows[1], parameters)
    return TrellisParameters(narrow, wide, scales, parameters.mean)


def _center(rows: Rows, trellis: TrellisFormat, parameters: TrellisParameters) -> NDArray[np.float64]:
    """Rows less the mean, in steps."""
    x: NDArray[np.float64] = (rows.astype(np.float64) - parameters.mean)[:, trellis.columns]
    return x


def _refit_scales(
    numbers: NDArray[np.uint8],
    products: NDArray[np.float64],
    squares: NDArray[np.float64],
    parameters: TrellisParameters,
) -> NDArray[np.float32]:
    """The scales with the least squared error, given rows' own, and sums of values times levels and of levels' squares.

    All but the first and the last one, for the table may have rows that the sample has not.
    """
    place = np.searchsorted(parameters.grid, parameters.scales)
    of_rows, is_coded = place[numbers], numbers > 0
    product, square = (
        np.bincount(of_rows, np.where(is_coded, sums, 0), minlength=len(parameters.grid))
        for sums in (products, squares)
    )
    grid = parameters.grid.astype(np.float64)
    grid[1:-1] = np.divide(product, square, out=grid.copy(), where=product * square > 0)[1:-1]
    return np.where(parameters.scales > 0, np.sort(grid).astype(F32)[place], F32(0))
