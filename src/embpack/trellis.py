"""Trellis-coded rows: how they lie in memory, what they stand for, and how they are found. The specification.

A value's code has a message bit m and an index u. The levels of the table's codebook, in ascending order, are dealt out
to four subsets in turn, and which subset a value takes its level from, the message bits tell: with c1 = m[t] ^ m[t-2] ^
m[t-5] and c0 = m[t-3], it is number 4 u + 2 c1 + c0. So a code of b bits chooses from 2^(b+1) levels, of which the bits
before leave it half: neighbouring levels are as close as with one bit more, and the search for the best sequence of
bits makes up for most of what is not there to choose. The bits before a row's first are those of its scale's number.

Source: Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov sources"; the code with
32 states is Ungerboeck's (1982), (45, 10) in octal digits, the lowest bit for m[t].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from embpack.layouts import LEAST_SHARED_BITS, MOST_SHARED_BITS, NUM_SCALES
from embpack.reference import F32, fma
from embpack.rows import narrow, widen

# A state is the last five message bits, the last one highest.
NUM_STATES, STATE_BITS = 32, 5
# Values whose bits lie together: a register has a byte for each. Sixteen of them, a row of lanes, are read at once.
BLOCK, LANES = 64, 16
# Levels of codes of so many bits, and of one bit more, are bfloat16: whoever looks them up has twice as many in a
# register. With more bits they would be too coarse.
MOST_SHORT_BITS = 5
# Scales that are tried, by the row's largest value: the codebook reaches about from -1 to 1. At most so many.
LOWEST, HIGHEST, MOST_TRIES = F32(0.8), F32(1.3), 12

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class TrellisFormat:
    """Where the parts of a trellis-coded row lie.

    The path takes the values of a row in blocks of 64, and in these as if they stood in four rows of sixteen, column
    after column: 0, 16, 32, 48, 1, 17, ... Of each block all message bits lie together, then the lowest bits of all
    indices, the second lowest, and so on: whoever has them in a register has one bit of 64 values. An index has one bit
    less than its value's code. As many values as there are bits left over have codes of one bit more. In each block
    these are the first row of sixteen, then the second, spread over the row that is not all theirs. The top bits of
    their indices follow the blocks; the last byte is the number of the row's scale, whose upper five bits are the
    message bits before the first, the last one highest. The lowest bit of a byte is first.

    Attributes:
        embedding_dim: values a row.
        row_bytes: bytes of a row.

    Raises:
        ValueError: the bytes are too few.
    """

    embedding_dim: int
    row_bytes: int

    def __post_init__(self) -> None:
        if self.code_bits < LEAST_SHARED_BITS * self.embedding_dim:
            least = -(-LEAST_SHARED_BITS * self.embedding_dim // 8) + 1
            raise ValueError(
                f"a trellis-coded row of {self.embedding_dim} values takes at least {least} bytes, not {self.row_bytes}"
            )

    @property
    def code_bits(self) -> int:
        """Bits for all codes of a row."""
        return 8 * (self.row_bytes - 1)

    @property
    def narrow_bits(self) -> int:
        """Bits of the shorter codes."""
        return min(self.code_bits // self.embedding_dim, MOST_SHARED_BITS)

    @property
    def num_wide(self) -> int:
        """How many values have a code of one bit more."""
        has_wide = self.narrow_bits < MOST_SHARED_BITS
        return self.code_bits - self.narrow_bits * self.embedding_dim if has_wide else 0

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """Which value each step of the path is, [embedding_dim]."""
        column = np.arange(self.embedding_dim)
        return np.lexsort((column % BLOCK // LANES, column % LANES, column // BLOCK))

    @cached_property
    def is_wide(self) -> NDArray[np.bool_]:
        """Which steps have the longer codes, [embedding_dim]."""
        d = self.embedding_dim
        of_columns = np.zeros(d, np.bool_)
        for start in range(0, d, BLOCK):
            stop = min(start + BLOCK, d)
            left = stop * self.num_wide // d - start * self.num_wide // d
            for first in range(start, stop, LANES):
                lanes = of_columns[first : min(first + LANES, stop)]
                before = np.arange(len(lanes) + 1) * min(left, len(lanes)) // len(lanes)
                lanes[:] = before[1:] > before[:-1]
                left -= int(before[-1])
        return of_columns[self.columns]

    @property
    def num_levels(self) -> tuple[int, int]:
        """Levels of the codebooks of narrow and of wide codes; 0 where there are none."""
        return 2 << self.narrow_bits, 4 << self.narrow_bits if self.num_wide else 0

    @property
    def has_short_levels(self) -> bool:
        """Whether levels are bfloat16: float32 of which the lower 16 bits are 0."""
        return self.narrow_bits <= MOST_SHORT_BITS

    def round_levels(self, levels: NDArray[np.float64]) -> NDArray[np.float32]:
        """Round levels as this format has them, to the nearest, of two to the one with an even last bit."""
        return widen(narrow(levels.astype(F32), "bfloat16" if self.has_short_levels else "float32"))

    def pack(
        self, messages: NDArray[np.uint8], indices: NDArray[np.uint8], scales: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Pack message bits and indices [N, embedding_dim], in steps, and numbers of scales [N]: [N, row_bytes]."""
        planes = [messages, *(indices >> np.uint8(k) & np.uint8(1) for k in range(self.narrow_bits - 1))]
        starts = range(0, self.embedding_dim, BLOCK)
        bits = [plane[:, start : start + BLOCK] for start in starts for plane in planes]
        bits.append(indices[:, self.is_wide] >> np.uint8(self.narrow_bits - 1))
        codes = np.packbits(np.concatenate(bits, axis=1), axis=1, bitorder="little")
        packed = np.zeros((len(messages), self.row_bytes), np.uint8)
        packed[:, : codes.shape[1]] = codes
        packed[:, -1] = scales
        return packed

    def unpack(self, packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Undo pack."""
        d, bits = self.embedding_dim, np.unpackbits(packed[:, :-1], axis=1, bitorder="little")
        planes = np.zeros((self.narrow_bits, len(packed), d), np.uint8)
        for start in range(0, d, BLOCK):
            count, at = min(BLOCK, d - start), start * self.narrow_bits
            of_block = bits[:, at : at + count * self.narrow_bits].reshape(len(packed), self.narrow_bits, count)
            planes[:, :, start : start + count] = of_block.swapaxes(0, 1)
        messages, *of_indices = planes
        indices = np.zeros((len(packed), d), np.uint8)
        for k, plane in enumerate(of_indices):
            indices |= plane << np.uint8(k)
        at = d * self.narrow_bits
        indices[:, self.is_wide] |= bits[:, at : at + self.num_wide] << np.uint8(self.narrow_bits - 1)
        return messages, indices, packed[:, -1]


@dataclass(frozen=True, eq=False)
class TrellisParameters:
    """What all rows of a table share.

    Attributes:
        narrow, wide: float32, the levels of shorter and longer codes, ascending, symmetric about 0, and rounded as
            TrellisFormat.round_levels does.
        scales: float32 [256], not negative, several of which may be the same; number 0 is 0, of rows that are the mean.
        mean: float32 [embedding_dim], which is added to every row.
    """

    narrow: NDArray[np.float32]
    wide: NDArray[np.float32]
    scales: NDArray[np.float32]
    mean: NDArray[np.float32]

    def join(self) -> NDArray[np.float32]:
        """As a table has them beside its rows, [1, n]: the upper halves of narrow and wide, then scales and mean."""
        halves = (levels[len(levels) // 2 :] for levels in (self.narrow, self.wide))
        return np.concatenate([*halves, self.scales, self.mean], dtype=F32)[None]

    @classmethod
    def split(cls, values: NDArray[np.float32], trellis: TrellisFormat) -> "TrellisParameters":
        """Undo join."""
        narrow, both = trellis.num_levels[0] // 2, sum(trellis.num_levels) // 2
        upper_narrow, upper_wide, scales, mean = np.split(values[0], [narrow, both, both + NUM_SCALES])
        return cls(_mirror(upper_narrow), _mirror(upper_wide), scales, mean)

    def levels_of(self, trellis: TrellisFormat, t: int) -> NDArray[np.float32]:
        """The codebook of step t."""
        return self.wide if trellis.is_wide[t] else self.narrow

    @cached_property
    def grid(self) -> NDArray[np.float32]:
        """The scales that are not 0, each once, ascending, [G]."""
        return np.unique(self.scales[self.scales > 0])

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """The lowest number of each scale of the grid by the state that it stands for; 0 for none, [G, NUM_STATES]."""
        numbers = np.zeros((len(self.grid), NUM_STATES), np.int64)
        for number in reversed(range(1, NUM_SCALES)):
            if self.scales[number] > 0:
                numbers[np.searchsorted(self.grid, self.scales[number]), first_state(number)] = number
        return numbers


def first_state(number: int) -> int:
    """The state in which the path of a row begins, given the number of its scale."""
    return number >> (8 - STATE_BITS)


def _mirror(upper: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([-upper[::-1], upper])


Encode = Callable[[Rows, TrellisFormat, TrellisParameters], NDArray[np.uint8]]


def find_subsets(messages: NDArray[np.uint8], numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Which subset of the levels that of each step is of, [N, embedding_dim], given message bits and scale numbers."""
    before = np.unpackbits(numbers[:, None], axis=1, bitorder="little")[:, 8 - STATE_BITS :]
    bits = np.concatenate([before, messages], axis=1)
    c1 = messages ^ bits[:, 3:-2] ^ bits[:, :-5]
    c0 = bits[:, 2:-3]
    subsets: NDArray[np.uint8] = 2 * c1 + c0
    return subsets


def decode(packed: NDArray[np.uint8], trellis: TrellisFormat, parameters: TrellisParameters) -> Rows:
    """Values of rows, uint8 [N, row_bytes] to float32 [N, embedding_dim]: fma(scale, level, mean)."""
    messages, indices, scales = trellis.unpack(packed)
    numbers = 4 * indices.astype(np.int64) + find_subsets(messages, scales)
    is_wide = trellis.is_wide
    levels = np.empty(numbers.shape, F32)
    levels[:, is_wide] = parameters.wide[numbers[:, is_wide]]
    levels[:, ~is_wide] = parameters.narrow[numbers[:, ~is_wide]]
    values = np.empty(numbers.shape, F32)
    values[:, trellis.columns] = fma(parameters.scales[scales][:, None], levels, parameters.mean[trellis.columns])
    return values


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
# How many scales a table may have. With fewer, each may begin in more states.
GRID_SIZES = (8, 16, 32, 64, 128, 256)
# Of the scales' distances, what is even between the smallest and the largest, the rest being as rows lie.
EVEN_SHARE = 0.15


def make_scales(largest: NDArray[np.float32], bounds: tuple[float, float], count: int) -> NDArray[np.float32]:
    """Scales, [NUM_SCALES], of which `count` differ, for rows with these largest values, less the mean, [n].

    Args:
        largest: of some rows.
        bounds: the least that is not 0 and the largest of all rows. At most 2^16 apart are taken: what smaller rows
            lose is nothing to a table with the largest.
        count: one of GRID_SIZES.
    """
    high = np.log2(bounds[1] * 1.2)
    low = max(np.log2(bounds[0] * 0.85), high - 16)
    wanted = np.sort(np.log2(np.outer(largest[largest > 0].astype(np.float64), np.linspace(0.85, 1.2, 8)).reshape(-1)))
    at = np.linspace(low, high, 1025)
    even = np.linspace(0, 1, len(at))
    share = np.searchsorted(wanted, at) / len(wanted) if len(wanted) else even
    positions = np.interp(np.linspace(0, 1, count), EVEN_SHARE * even + (1 - EVEN_SHARE) * share, at)
    return _deal_out(np.exp2(positions).astype(F32))


def _deal_out(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales by their numbers, [NUM_SCALES]: each state has as many of a grid, in turn."""
    of_state = NUM_SCALES // NUM_STATES
    apart = len(grid) // of_state
    places = [number % of_state * apart + first_state(number) % apart for number in range(NUM_SCALES)]
    scales = grid[places]
    scales[0] = 0
    return scales


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
    few = sample[:SHAPE_ROWS]

    def find_best(tried: list[TrellisParameters]) -> TrellisParameters:
        errors = [
            np.square(few.astype(np.float64) - decode(encode(few, trellis, one), trellis, one)).sum() for one in tried
        ]
        return tried[int(np.argmin(errors))]

    largest = np.abs(sample - mean).max(axis=1)
    best = find_best([TrellisParameters(*levels, make_scales(largest, bounds, n), mean) for n in GRID_SIZES])
    best = find_best([TrellisParameters(*_make_shape(trellis, share), best.scales, mean) for share in SHAPES])
    for _ in range(NUM_ROUNDS):
        best = _refit(sample, encode(sample, trellis, best), trellis, best)
    return best


def _make_shape(trellis: TrellisFormat, share: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    halves = ((np.arange(count) + 0.5) / max(count, 1) * 2 - 1 for count in trellis.num_levels)
    narrow, wide = (trellis.round_levels((1 - share) * u + share * u**3) for u in halves)
    return narrow, wide


def _refit(
    sample: Rows, packed: NDArray[np.uint8], trellis: TrellisFormat, parameters: TrellisParameters
) -> TrellisParameters:
    """The levels, symmetric about 0, with the least squared error for the codes of rows; and the scales for those."""
    messages, indices, numbers_of_scales = trellis.unpack(packed)
    numbers = 4 * indices.astype(np.int64) + find_subsets(messages, numbers_of_scales)
    x = (sample.astype(np.float64) - parameters.mean)[:, trellis.columns]
    scale = parameters.scales[numbers_of_scales].astype(np.float64)[:, None]
    products, squares = x * scale, np.broadcast_to(scale * scale, x.shape)
    fitted, chosen = [], np.empty(x.shape)
    for levels, steps in ((parameters.narrow, ~trellis.is_wide), (parameters.wide, trellis.is_wide)):
        of = numbers[:, steps].reshape(-1)
        product, square = (
            np.bincount(of, values[:, steps].reshape(-1), minlength=len(levels)) for values in (products, squares)
        )
        product, square = product - product[::-1], square + square[::-1]
        means = np.divide(product, square, out=levels.astype(np.float64), where=square > 0)
        fitted.append(trellis.round_levels(np.sort(means)))
        chosen[:, steps] = fitted[-1][numbers[:, steps]]
    narrow, wide = fitted
    # All but the first and the last scale, for there may be rows that are none of the sample.
    place = np.searchsorted(parameters.grid, parameters.scales)
    of_rows, is_coded = place[numbers_of_scales], numbers_of_scales > 0
    product, square = (
        np.bincount(of_rows, np.where(is_coded, sums, 0), minlength=len(parameters.grid))
        for sums in ((x * chosen).sum(axis=1), np.square(chosen).sum(axis=1))
    )
    grid = parameters.grid.astype(np.float64)
    grid[1:-1] = np.divide(product, square, out=grid.copy(), where=product * square > 0)[1:-1]
    scales = np.where(parameters.scales > 0, np.sort(grid).astype(F32)[place], F32(0))
    return TrellisParameters(narrow, wide, scales, parameters.mean)
