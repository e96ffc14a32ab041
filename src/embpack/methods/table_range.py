"""TABLE: one range for all rows (Guan et al. 2019, section 3)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from embpack._native import SearchParams
from embpack.layouts import RowFormat
from embpack.methods.base import Chunks, Packer, bound_values
from embpack.methods.uniform import UniformMethod, UniformPacker
from embpack.reference import Row


@dataclass(frozen=True)
class TableRange(UniformMethod):
    """ASYM with the range of the whole table. Source: the paper's TABLE.

    Attributes:
        xmin: the smallest value of the table; found in a pass of its own unless given.
        xmax: the largest.
    """

    name: ClassVar[str] = "table"
    kernel: ClassVar[str] = "table"
    summary: ClassVar[str] = "one range for the whole table; to compare"

    xmin: float = math.nan
    xmax: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.xmin) != math.isnan(self.xmax) or self.xmin > self.xmax:
            raise ValueError(
                f"table: xmin is {self.xmin} and xmax is {self.xmax}; give both, the smaller first, or neither"
            )
        largest = float(np.finfo(np.float32).max)
        if max(abs(self.xmin), abs(self.xmax)) > largest:
            raise ValueError(f"table: xmin is {self.xmin} and xmax is {self.xmax}; no float32 is beyond {largest:.6g}")

    @property
    def needs_bounds(self) -> bool:
        """Whether the range has still to be found."""
        return math.isnan(self.xmin)

    def fit(self, chunks: Chunks, num_embeddings: int, row_format: RowFormat, name: str = "weight") -> Packer:
        """Find the range, unless it is given."""
        if not self.needs_bounds:
            return super().fit(chunks, num_embeddings, row_format, name)
        xmin, xmax, seen = math.inf, -math.inf, 0
        for rows in chunks():
            smallest, largest = bound_values(rows, name, seen)
            xmin, xmax, seen = min(xmin, smallest), max(xmax, largest), seen + len(rows)
        return UniformPacker(TableRange(xmin, xmax), row_format, name)

    @property
    def longest_spec(self) -> str:
        """With bounds of as many digits as floats have."""
        longest = -1.2345678901234567e-300
        return TableRange(longest, longest).spec

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return the range of the table."""
        return np.float32(self.xmin), np.float32(self.xmax)

    def search_params(self) -> SearchParams:
        """The range of the table."""
        return SearchParams(xmin=self.xmin, xmax=self.xmax)
