"""ASYM: the range of the row (Guan et al. 2019, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from embpack.layouts import RowFormat
from embpack.methods.uniform import UniformMethod
from embpack.reference import Row


@dataclass(frozen=True)
class Asym(UniformMethod):
    """``xmin = min(X)``, ``xmax = max(X)``.

    Source: the paper's ASYM (ASYM-8BITS at 8 bits). With default parameters the bytes of PyTorch's
    embedding_bag_{2bit,4bit,byte}_prepack and of FBGEMM's row quantizers.
    """

    name: ClassVar[str] = "asym"
    kernel: ClassVar[str] = "asym"
    summary: ClassVar[str] = "the row's own range, as PyTorch and FBGEMM have it"

    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return the bounds of the row."""
        return x.min(), x.max()
