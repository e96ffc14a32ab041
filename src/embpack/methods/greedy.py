"""GREEDY: shrink the range step by step (Guan et al. 2019, section 3.3 and Algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from embpack._native import SearchParams
from embpack.arithmetic import F32
from embpack.layouts import RowFormat
from embpack.methods.uniform import UniformMethod
from embpack.reference import Row, round_trip

# After r has stopped the paper's search, Greedy goes on while the best range is among the last PATIENCE ones.
PATIENCE = 4


@dataclass(frozen=True)
class Candidate:
    """A range and its measured loss ||X - Q(X, xmin, xmax)||_2."""

    xmin: np.float32
    xmax: np.float32
    loss: np.float32


def measure(x: Row, xmin: np.float32, xmax: np.float32, row_format: RowFormat) -> Candidate:
    """The loss of a range; squares are summed in order, in float32, as PyTorch does."""
    with np.errstate(all="ignore"):
        error = x - round_trip(x, xmin, xmax, row_format)
        total = np.add.accumulate(error * error, dtype=F32)[-1]
        return Candidate(xmin, xmax, np.sqrt(total))


def surely_less(loss: np.float32, other: np.float32, embedding_dim: int) -> bool:
    """Whether a loss is lower beyond what rounding can make of it: each sum carries up to (d + 8) / 2 roundings."""
    return bool(loss < other * (F32(1) - F32(embedding_dim + 8) * F32(2**-24)))


@dataclass(frozen=True)
class _GreedySearch(UniformMethod):
    """The walk that both variants share.

    From the full range, with ``step = range / b``, move in the end whose move leaves the smaller loss, while the
    range is longer than ``(1 - r)`` of the full one.

    Attributes:
        b: number of steps in the full range, at least 1.
        r: the share of the range that may be cut off, in (0, 1).
    """

    kernel: ClassVar[str] = "greedy"
    local_minima_only: ClassVar[bool]

    b: int = 200
    r: float = 0.16

    def __post_init__(self) -> None:
        if not 1 <= self.b <= 1_000_000:
            raise ValueError(f"{self.name}: b is {self.b}; give a number of steps from 1 to 1000000")
        if not 0 < self.r < 1:
            raise ValueError(f"{self.name}: r is {self.r}; give a share of the range between 0 and 1")

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Walk through the ranges and return the best one remembered."""
        current = measure(x, x.min(), x.max(), row_format)
        best = local_minimum = current
        with np.errstate(all="ignore"):
            step = (current.xmax - current.xmin) / F32(self.b)
            smallest = F32(int(self.b * (1.0 - float(F32(self.r))))) * step
        moves_since_best = 0
        for _ in range(self.b):
            within_r = current.xmin + smallest < current.xmax
            falling = moves_since_best < PATIENCE and current.xmin + step < current.xmax
            if not within_r and (self.local_minima_only or not falling):
                break
            left = measure(x, current.xmin + step, current.xmax, row_format)
            right = measure(x, current.xmin, current.xmax - step, row_format)
            if within_r and current.loss < min(left.loss, right.loss) and current.loss < local_minimum.loss:
                local_minimum = current
            current = left if left.loss < right.loss else right
            if current.loss < best.loss:
                best, moves_since_best = current, 0
            else:
                moves_since_best += 1
        chosen = local_minimum
        if not self.local_minima_only:
            chosen = best if surely_less(best.loss, local_minimum.loss, len(x)) else local_minimum
        return chosen.xmin, chosen.xmax

    def search_params(self) -> SearchParams:
        """The steps, the share, and which variant."""
        return SearchParams(b=self.b, r=self.r, local_minima_only=self.local_minima_only)


@dataclass(frozen=True)
class Greedy(_GreedySearch):
    """The paper's method, with its two weaknesses mended.

    It remembers the best range it measured, wherever on the walk that was (as printed, Algorithm 1 stores only
    the end that moved, so what it returns may be a pair whose loss was never measured). And where the loss still
    falls at the limit r, which is what happens from embedding_dim 1024 on, it goes on until it has risen for
    PATIENCE moves. On every row its loss is at most GREEDY-PAPER's, as long as squares are seen at all: with float32
    parameters and values below 1e-18 they vanish in float32.
    """

    name: ClassVar[str] = "greedy"
    summary: ClassVar[str] = "the paper's search, mended for wide rows"
    local_minima_only: ClassVar[bool] = False


@dataclass(frozen=True)
class GreedyOpt(Greedy):
    """GREEDY with five times as many steps, down to half of the range. Source: the paper's GREEDY (opt)."""

    name: ClassVar[str] = "greedy-opt"
    summary: ClassVar[str] = "greedy in finer steps, as in the paper; to reproduce"

    b: int = 1000
    r: float = 0.5


@dataclass(frozen=True)
class GreedyPaper(_GreedySearch):
    """The search behind the paper's figures, in Caffe2 and now in PyTorch: r is a hard limit, and a range is
    remembered only if both of its neighbours are worse, so wide rows, whose loss falls up to the limit, fall back
    to ASYM (the paper's Figure 1 from d = 1024 on).

    Source: PyTorch's choose_qparams_optimized; at 2 and 4 bits with float16 parameters, the bytes of
    embedding_bag_{2bit,4bit}_prepack(weight, True).
    """  # noqa: D205

    name: ClassVar[str] = "greedy-paper"
    summary: ClassVar[str] = "the paper's and PyTorch's search, to the byte"
    local_minima_only: ClassVar[bool] = True
