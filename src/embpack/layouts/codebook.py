"""Rows that end with a codebook of their own."""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack.arithmetic import F32
from embpack.layouts.base import Layout
from embpack.layouts.codes import unpack_codes


class CodebookLayout(Layout):
    """Codes, then the values that they stand for, ascending."""

    name: ClassVar[str] = "codebook"

    @property
    def row_bytes(self) -> int:
        """Bytes of codes and codebook."""
        return self.code_bytes + self.num_levels * self.param_bytes

    def decode(
        self, packed: NDArray[np.uint8], by_row: NDArray[Any] | None = None, shared: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """Read rows."""
        codes = unpack_codes(packed[:, : self.code_bytes], self.embedding_dim, self.bits)
        levels = np.ascontiguousarray(packed[:, self.code_bytes :]).view(self.param_type).astype(F32)
        return np.take_along_axis(levels, codes.astype(np.int64), axis=1)
