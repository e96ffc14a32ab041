"""Trellis-coded rows: how they lie in memory, what they stand for, and how they are found. The specification.

A value's code has a message bit m and an index u. The levels of the table's codebook, in ascending order, are dealt out
to four subsets in turn, and which subset a value takes its level from, the message bits tell: with c1 = m[t] ^ m[t-1] ^
m[t-3] and c0 = m[t-2], it is number 4 u + 2 c1 + c0. So a code of b bits chooses from 2^(b+1) levels, of which the bits
before leave it half: neighbouring levels are as close as with one bit more, and the search for the best sequence of
bits makes up for most of what is not there to choose.

Source: Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov sources"; the code with
eight states is Ungerboeck's (1982), (13, 4) in octal digits, the lowest bit for m[t].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from embpack.layouts import LEAST_SHARED_BITS, MOST_SHARED_BITS, NUM_SCALES
from embpack.reference import F32, fma

NUM_STATES = 8
# Values whose bits lie together: a register has a byte for each. Sixteen of them, a row of lanes, are read at once.
BLOCK, LANES = 64, 16
# Scales to start from, by the row's largest value: the codebook reaches from -1 to 1.
FACTORS = np.arange(0.7, 1.075, 0.05, dtype=np.float64).astype(F32)
# How often the best scale for the levels that were found is searched with.
NUM_REFITS = 2

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class TrellisFormat:
    """Where the parts of a trellis-coded row lie.

    The path takes the values of a row in blocks of 64, and in these as if they stood in four rows of sixteen, column
    after column: 0, 16, 32, 48, 1, 17, ... Of each block all message bits lie together, then the lowest bits of all
    indices, the second lowest, and so on: whoever has them in a register has one bit of 64 values. An index has one bit
    less than its value's code. As many values as there are bits left over have codes of one bit more. In each block
    these are the first row of sixteen, then the second, spread over the row that is not all theirs. The top bits of
    their indices follow the blocks; the last byte is the number of the row's scale. The lowest bit of a byte is first.

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
        narrow, wide: float32, the levels of shorter and longer codes, ascending, and symmetric about 0.
        scales: float32 [256], ascending; number 0 is 0, of rows that are the mean.
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


def _mirror(upper: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([-upper[::-1], upper])


Encode = Callable[[Rows, TrellisFormat, TrellisParameters], NDArray[np.uint8]]


def find_subsets(messages: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Which subset of the levels that of each step is of, [N, embedding_dim], given the message bits."""
    before = np.pad(messages, ((0, 0), (3, 0)))
    c1 = messages ^ before[:, 2:-1] ^ before[:, :-3]
    c0 = before[:, 1:-2]
    return 2 * c1 + c0


def decode(packed: NDArray[np.uint8], trellis: TrellisFormat, parameters: TrellisParameters) -> Rows:
    """Values of rows, uint8 [N, row_bytes] to float32 [N, embedding_dim]: fma(scale, level, mean)."""
    messages, indices, scales = trellis.unpack(packed)
    numbers = 4 * indices.astype(np.int64) + find_subsets(messages)
    is_wide = trellis.is_wide
    levels = np.empty(numbers.shape, F32)
    levels[:, is_wide] = parameters.wide[numbers[:, is_wide]]
    levels[:, ~is_wide] = parameters.narrow[numbers[:, ~is_wide]]
    values = np.empty(numbers.shape, F32)
    values[:, trellis.columns] = fma(parameters.scales[scales][:, None], levels, parameters.mean[trellis.columns])
    return values


@dataclass
class _Paths:
    """The best paths of many rows to each state, and what the levels on them sum up to; all [N, NUM_STATES]."""

    cost: Rows  # of squared errors
    level_square: Rows
    level_product: Rows  # of values and levels


def _nearest(y: Rows, levels: NDArray[np.float32]) -> tuple[NDArray[np.uint8], Rows, Rows]:
    """Of each subset the index of the level nearest to y [N], the lower one of two; the level; the squared error."""
    subsets = levels.reshape(-1, 4).T  # [4, count]
    errors = np.square(y[:, None, None] - subsets)
    indices = errors.argmin(axis=2)
    chosen = np.take_along_axis(subsets[None], indices[:, :, None], axis=2)[:, :, 0]
    return indices.astype(np.uint8), chosen, np.square(y[:, None] - chosen)


def _walk(y: Rows, trellis: TrellisFormat, parameters: TrellisParameters) -> tuple[_Paths, list[NDArray[np.uint8]]]:
    """Viterbi's algorithm over rows y [N, d] in units of their scale: paths, and of each step which of two was best.

    State s has the last message bits, m[t-1] highest. Into state n two paths come, from states 2 (n mod 4) and one
    more; of equal ones the first is taken.
    """
    n = np.arange(NUM_STATES)
    message, sources = n >> 2, (n & 3) << 1
    count = len(y)
    paths = _Paths(*(np.zeros((count, NUM_STATES), F32) for _ in range(3)))
    paths.cost[:, 1:] = np.inf
    choices = []
    for t in range(trellis.embedding_dim):
        _, chosen, errors = _nearest(y[:, t], parameters.levels_of(trellis, t))
        ways = []
        for source in (sources, sources + 1):
            subset = 2 * (message ^ (source >> 2) ^ (source & 1)) + ((source >> 1) & 1)
            level = chosen[:, subset]
            ways.append(
                (
                    paths.cost[:, source] + errors[:, subset],
                    paths.level_square[:, source] + level * level,
                    paths.level_product[:, source] + y[:, t : t + 1] * level,
                )
            )
        second = ways[1][0] < ways[0][0]
        paths = _Paths(*(np.where(second, b, a) for a, b in zip(*ways, strict=True)))
        choices.append(second.astype(np.uint8))
    return paths, choices


def _trace(
    y: Rows, trellis: TrellisFormat, parameters: TrellisParameters
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Message bits and indices [N, d] of the best paths."""
    paths, choices = _walk(y, trellis, parameters)
    state = paths.cost.argmin(axis=1)
    messages = np.zeros(y.shape, np.uint8)
    for t in reversed(range(trellis.embedding_dim)):
        messages[:, t] = state >> 2
        state = ((state & 3) << 1) + np.take_along_axis(choices[t], state[:, None], axis=1)[:, 0]
    subsets, indices = find_subsets(messages), np.zeros(y.shape, np.uint8)
    for t in range(trellis.embedding_dim):
        of_subsets, _, _ = _nearest(y[:, t], parameters.levels_of(trellis, t))
        indices[:, t] = np.take_along_axis(of_subsets, subsets[:, t : t + 1], axis=1)[:, 0]
    return messages, indices


def nearest_scale(wanted: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int64]:
    """Numbers of the scales nearest to those wanted, the lower one of two, and never 0."""
    boundaries = (scales[1:-1] + scales[2:]) * F32(0.5)
    return 1 + np.searchsorted(boundaries, wanted, side="left")


def encode(rows: Rows, trellis: TrellisFormat, parameters: TrellisParameters) -> NDArray[np.uint8]:
    """Find the codes of rows, float32 [N, embedding_dim]: uint8 [N, row_bytes].

    For each of some scales by the row's largest value, and for the best ones for the levels that were found with it,
    the best path is found; that of the least squared error is kept, of equal ones the first. All in float32, a sum
    along a path in the order of its steps.
    """
    x = (rows - parameters.mean)[:, trellis.columns]
    largest = np.abs(x).max(axis=1)
    best_error = np.full(len(x), np.inf, F32)
    best_number = np.zeros(len(x), np.int64)
    with np.errstate(all="ignore"):
        for factor in FACTORS:
            number = nearest_scale(largest * factor, parameters.scales)
            for _ in range(NUM_REFITS + 1):
                scale = parameters.scales[number]
                paths, _ = _walk(x * (F32(1) / scale)[:, None], trellis, parameters)
                end = paths.cost.argmin(axis=1)[:, None]
                cost, square, product = (
                    np.take_along_axis(values, end, axis=1)[:, 0]
                    for values in (paths.cost, paths.level_square, paths.level_product)
                )
                error = scale * scale * cost
                is_better = error < best_error
                best_error = np.where(is_better, error, best_error)
                best_number = np.where(is_better, number, best_number)
                number = nearest_scale(scale * (product / square), parameters.scales)
        best_number[largest == 0] = 0
        scale = parameters.scales[best_number]
        inverse = np.where(best_number == 0, F32(0), F32(1) / scale)
        messages, indices = _trace(x * inverse[:, None], trellis, parameters)
    is_zero = best_number == 0
    messages[is_zero], indices[is_zero] = 0, 0
    return trellis.pack(messages, indices, best_number.astype(np.uint8))


# Shapes of a codebook to start from: the share of the cube in (1 - share) u + share u^3, u evenly from -1 to 1.
SHAPES = (0.3, 0.45, 0.6, 0.8)
# Rows that a codebook is fitted to, and how often.
SAMPLE_ROWS, SHAPE_ROWS, NUM_ROUNDS = 4096, 512, 6


def make_scales(smallest: float, largest: float) -> NDArray[np.float32]:
    """Scales for rows whose largest values, less the mean, lie between these, in equal ratios.

    At most 2^16 apart: what smaller rows lose is nothing to a table with the largest.
    """
    high = largest * float(FACTORS[-1])
    low = max(smallest * float(FACTORS[0]), high * 2.0**-16)
    steps = np.arange(NUM_SCALES - 1) / (NUM_SCALES - 2)
    return np.append(0.0, low * (high / low) ** steps).astype(F32) if high else np.zeros(NUM_SCALES, F32)


def fit(
    sample: Rows,
    trellis: TrellisFormat,
    scales: NDArray[np.float32],
    mean: NDArray[np.float32],
    encode: Encode = encode,
) -> TrellisParameters:
    """Fit the codebooks to rows: the best shape, then encoding and least squares in turns.

    Args:
        sample: float32 [n, embedding_dim], at most SAMPLE_ROWS of the table's.
        trellis: of the packed rows.
        scales: as make_scales makes them.
        mean: of the columns.
        encode: does what encode does.
    """
    best_error, best = np.inf, None
    few = sample[:SHAPE_ROWS]
    for share in SHAPES:
        narrow, wide = (_make_shape(count, share) for count in trellis.num_levels)
        parameters = TrellisParameters(narrow, wide, scales, mean)
        error = float(
            np.square(few.astype(np.float64) - decode(encode(few, trellis, parameters), trellis, parameters)).sum()
        )
        if best is None or error < best_error:
            best_error, best = error, parameters
    assert best is not None
    for _ in range(NUM_ROUNDS):
        best = _refit(sample, encode(sample, trellis, best), trellis, best)
    return best


def _make_shape(count: int, share: float) -> NDArray[np.float32]:
    u = (np.arange(count) + 0.5) / max(count, 1) * 2 - 1
    return ((1 - share) * u + share * u**3).astype(F32)


def _refit(
    sample: Rows, packed: NDArray[np.uint8], trellis: TrellisFormat, parameters: TrellisParameters
) -> TrellisParameters:
    """The levels with the least squared error for the codes of rows, symmetric about 0."""
    messages, indices, numbers_of_scales = trellis.unpack(packed)
    numbers = 4 * indices.astype(np.int64) + find_subsets(messages)
    scale = parameters.scales[numbers_of_scales].astype(np.float64)[:, None]
    products = (sample.astype(np.float64) - parameters.mean)[:, trellis.columns] * scale
    squares = np.broadcast_to(scale * scale, products.shape)
    fitted = []
    for levels, steps in ((parameters.narrow, ~trellis.is_wide), (parameters.wide, trellis.is_wide)):
        of = numbers[:, steps].reshape(-1)
        product, square = (
            np.bincount(of, values[:, steps].reshape(-1), minlength=len(levels)) for values in (products, squares)
        )
        product, square = product - product[::-1], square + square[::-1]
        fitted.append(np.sort(np.divide(product, square, out=levels.astype(np.float64), where=square > 0)).astype(F32))
    narrow, wide = fitted
    return TrellisParameters(narrow, wide, parameters.scales, parameters.mean)
