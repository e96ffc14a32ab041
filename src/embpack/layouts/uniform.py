"""Uniform rows: codes, then scale and bias. PyTorch's and FBGEMM's."""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack.arithmetic import F32, fma
from embpack.layouts.base import Layout
from embpack.layouts.codes import unpack_codes


class UniformLayout(Layout):
    """A value is scale * code + bias, rounded once."""

    name: ClassVar[str] = "uniform"
    has_scale_and_bias: ClassVar[bool] = True

    @classmethod
    def default_param_dtype(cls, bits: float) -> str:
        """PyTorch's and FBGEMM's: float16 at 2 and 4 bits, float32 at 8."""
        return "float32" if bits == 8 else "float16"

    @property
    def row_bytes(self) -> int:
        """Bytes of codes, scale and bias."""
        return self.code_bytes + 2 * self.param_bytes

    def decode(
        self, packed: NDArray[np.uint8], by_row: NDArray[Any] | None = None, shared: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """Read rows."""
        codes = unpack_codes(packed[:, : self.code_bytes], self.embedding_dim, self.bits)
        params = np.ascontiguousarray(packed[:, self.code_bytes :]).view(self.param_type).astype(F32)
        return fma(codes.astype(F32), params[:, :1], params[:, 1:])
