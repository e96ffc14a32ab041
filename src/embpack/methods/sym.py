"""SYM: a range symmetric about zero (Guan et al. 2019, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from embpack.layouts import RowFormat
from embpack.methods.uniform import UniformMethod
from embpack.reference import Row


@dataclass(frozen=True)
class Sym(UniformMethod):
    """``xmax = max(abs(X))``, ``xmin = -xmax``. Source: the paper's SYM."""

    name: ClassVar[str] = "sym"
    kernel: ClassVar[str] = "sym"
    summary: ClassVar[str] = "a range symmetric about zero; to compare"

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return minus and plus the largest magnitude of the row."""
        xmax = np.abs(x).max()
        return -xmax, xmax
