"""Methods that choose a codebook for each row."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.chunks import span_rows
from embpack.layouts import RowFormat
from embpack.methods.base import Chunks, Encoded, Method, OnRows, Packer
from embpack.reference import Row


@dataclass(frozen=True)
class CodebookMethod(Method):
    """Chooses a codebook for each row.

    Class attributes:
        kernel: the native search that does the same as ``search``.
    """

    layout: ClassVar[str] = "codebook"
    kernel: ClassVar[str]

    @abstractmethod
    def search(self, x: Row, row_format: RowFormat) -> Row:
        """Return the codebook of the row ``x``, float32 [d]: float32 [2^bits], ascending: the specification."""

    def fit(self, chunks: Chunks, num_embeddings: int, row_format: RowFormat, name: str = "weight") -> Packer:
        """Make the packer; the table need not be read for it."""
        return CodebookPacker(self, row_format, name)


@dataclass(frozen=True, eq=False)
class CodebookPacker(Packer):
    """Packs rows, each with the codebook that its method chooses."""

    method: CodebookMethod

    def _encode(
        self,
        rows: NDArray[Any],
        packed: NDArray[np.uint8],
        start: int,
        on_rows: OnRows | None,
        by_row: NDArray[Any] | None,
    ) -> Encoded:
        form = self.row_format.form
        how = (self.method.kernel, form.bits, self.row_format.has_f16_params, span_rows(form.embedding_dim))
        return _native.quantize_with_codebooks(rows, *how, packed, on_rows)
