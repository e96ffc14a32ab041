"""Trellis-coded rows: how they lie in memory and what they stand for. The specification.

A value's code has a message bit m and an index u. The levels of the table's codebook, in ascending order, are dealt out
to four subsets in turn. The message bits tell which subset a value takes its level from: with c1 = m[t] ^ m[t-2] ^
m[t-5] and c0 = m[t-3], its level is number 4 u + 2 c1 + c0. So a code of b bits chooses from 2^(b+1) levels, of which
the bits before leave it half. Neighbouring levels are as close as with one bit more, and the search for the best
sequence of bits makes up for most of the levels that are out of reach. The bits before a row's first are those of its
scale's number.

Source: Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov sources"; the code with
32 states is Ungerboeck's (1982), (45, 10) in octal digits, the lowest bit for m[t].
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack.arithmetic import F32, fma
from embpack.layouts.base import ArraySpec, Layout
from embpack.rows import narrow, widen

# Bits a value, which may have a fraction. With fewer there is no index; with more, levels are slow to find.
LEAST_BITS, MOST_BITS = 2, 7
# Bytes of a uniform row's float16 scale and bias; trellis rows of equal size use them for codes.
_UNIFORM_PARAM_BYTES = 4
NUM_SCALES = 256
# A state is the last five message bits, the last one highest.
NUM_STATES, STATE_BITS = 32, 5
# Values whose bits lie together: a register has a byte for each. Sixteen of them, a row of lanes, are read at once.
BLOCK, LANES = 64, 16
# Codes of so many bits, and of one bit more, have levels of bfloat16: a register holds twice as many. With more bits
# such levels would be too coarse.
MOST_SHORT_BITS = 5


@dataclass(frozen=True)
class TrellisFormat:
    """Where the parts of a trellis-coded row lie.

    The path takes the values of a row in blocks of 64. A block is taken as if its values stood in four rows of sixteen,
    column after column: 0, 16, 32, 48, 1, 17, ... The message bits of a block lie together, then the lowest bits of all
    indices, the second lowest, and so on: a 64-bit register has one bit of 64 values. An index has one bit less than
    its value's code. As many values as there are bits left over have codes of one bit more. In each block these are the
    first row of sixteen, then the second; in the last row that has some but not all, they are spread evenly. The top
    bits of their indices follow the blocks. The last byte is the number of the row's scale; its upper five bits are the
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
        if self.code_bits < LEAST_BITS * self.embedding_dim:
            least = -(-LEAST_BITS * self.embedding_dim // 8) + 1
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
        return min(self.code_bits // self.embedding_dim, MOST_BITS)

    @property
    def num_wide(self) -> int:
        """How many values have a code of one bit more."""
        has_wide = self.narrow_bits < MOST_BITS
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
        """Round levels to the type that this format has for them: to nearest, ties to even."""
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
        scales: float32 [256], not negative, several of which may be the same; number 0 is 0, for rows that equal the
            mean.
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


def find_subsets(messages: NDArray[np.uint8], numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Which subset of the levels that of each step is of, [N, embedding_dim], given message bits and scale numbers."""
    before = np.unpackbits(numbers[:, None], axis=1, bitorder="little")[:, 8 - STATE_BITS :]
    bits = np.concatenate([before, messages], axis=1)
    c1 = messages ^ bits[:, 3:-2] ^ bits[:, :-5]
    c0 = bits[:, 2:-3]
    subsets: NDArray[np.uint8] = 2 * c1 + c0
    return subsets


def decode(packed: NDArray[np.uint8], trellis: TrellisFormat, parameters: TrellisParameters) -> NDArray[np.float32]:
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


class TrellisLayout(Layout):
    """Codes of a path through a trellis, and the number of a scale; all rows share levels, scales and a mean."""

    name: ClassVar[str] = "trellis"
    least_dim: ClassVar[int] = 4
    most_dim: ClassVar[float] = 65536
    param_dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    needs: ClassVar[str] = "codebooks: the values that all rows share"
    caution: ClassVar[str] = (
        "embpack alone reads these rows, and sums them at .6 to .9 of uniform rows' speed on CPUs with AVX-512 and "
        "GFNI, at .2 to .4 with AVX2"
    )
    unsized_bits: ClassVar[tuple[int, ...]] = ()  # rows of one size are read in one way

    @classmethod
    def read_bits(cls, bits: Any) -> int | float:
        """Check a number of bits, which may have a fraction."""
        if isinstance(bits, str) or not hasattr(bits, "__float__"):
            raise TypeError(f"bits is {bits!r}; give a number from {LEAST_BITS} to {MOST_BITS}")
        number = float(bits)
        number = int(number) if number.is_integer() else number
        if not LEAST_BITS <= number <= MOST_BITS:
            raise ValueError(f"bits is {number}; the {cls.name} layout has {LEAST_BITS} to {MOST_BITS}")
        return number

    @property
    def code_bytes(self) -> int:
        """Bytes of a row, all of which are codes."""
        return math.ceil(self.embedding_dim * float(self.bits) / 8 - 1e-6) + _UNIFORM_PARAM_BYTES

    @property
    def row_bytes(self) -> int:
        """Bytes of a uniform row of so many bits with float16 parameters."""
        return self.code_bytes

    @cached_property
    def trellis(self) -> TrellisFormat:
        """Where the parts of a row lie."""
        return TrellisFormat(self.embedding_dim, self.row_bytes)

    @property
    def num_stored_levels(self) -> int:
        """Levels of both codebooks that lie beside the rows: their upper halves."""
        return sum(self.trellis.num_levels) // 2

    def shared(self, num_codebooks: int | None = None) -> ArraySpec | None:
        """List levels, scales and mean, as TrellisParameters.join does."""
        count = self.num_stored_levels + NUM_SCALES + self.embedding_dim
        return ArraySpec("codebooks", ".codebook", (self.param_type,), (1, count))

    def check_shared(self, values: NDArray[Any]) -> None:
        """Raise ValueError if levels are not bfloat16 where they must be."""
        lower = values[0, : self.num_stored_levels].view(np.uint32) & 0xFFFF
        if self.trellis.has_short_levels and lower.any():
            raise ValueError(
                f"level {int(lower.argmax())} of the codebook is not a bfloat16 value, as those of codes of "
                f"{self.trellis.narrow_bits} bits are; it is damaged, or from an earlier embpack: pack the table again"
            )

    def decode(
        self, packed: NDArray[np.uint8], by_row: NDArray[Any] | None = None, shared: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """Read rows."""
        assert shared is not None
        return decode(packed, self.trellis, TrellisParameters.split(shared, self.trellis))
