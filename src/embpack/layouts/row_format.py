"""RowFormat: everything that fixes what the bytes of a row mean."""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import index
from typing import Any

from embpack.layouts.base import PARAM_BYTES, Layout
from embpack.layouts.clustered import ClusteredLayout
from embpack.layouts.codebook import CodebookLayout
from embpack.layouts.trellis import TrellisLayout
from embpack.layouts.uniform import UniformLayout

LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout for layout in (UniformLayout, CodebookLayout, ClusteredLayout, TrellisLayout)
}
ROTATIONS = ("hadamard",)


@dataclass(frozen=True)
class RowFormat:
    """Everything that fixes what the bytes of a row mean.

    Attributes:
        embedding_dim: values a row, at least 1.
        bits: of each code: 2, 4 or 8. For trellis-coded rows any number from 2 to 7, float where it has a fraction: a
            row has the bytes of a uniform row of so many bits with float16 parameters.
        param_dtype: "float16" or "float32", of scale and bias or of codebooks; "float32" for trellis-coded rows.
        layout: a name in LAYOUTS.
        rotation: what the values are multiplied by before they are packed: None, or "hadamard" (embpack.rotation).

    Raises:
        TypeError: embedding_dim or bits is no integer, or bits no number where it may have a fraction.
        ValueError: an attribute is none of the above.
    """

    embedding_dim: int
    bits: Any = 4  # int, or float where it has a fraction
    param_dtype: str = "float16"
    layout: str = "uniform"
    rotation: str | None = None

    def __post_init__(self) -> None:
        # NumPy's integers are welcome, but JSON has no place for them.
        object.__setattr__(self, "embedding_dim", index(self.embedding_dim))
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim is {self.embedding_dim}; a row needs at least one value")
        if self.param_dtype not in PARAM_BYTES:
            raise ValueError(f"param_dtype is {self.param_dtype!r}; choose 'float16' or 'float32'")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; choose one of {', '.join(LAYOUTS)}")
        if self.rotation not in (None, *ROTATIONS):
            raise ValueError(f"rotation is {self.rotation!r}; choose None or one of {', '.join(map(repr, ROTATIONS))}")
        object.__setattr__(self, "bits", self.form.bits)

    @cached_property
    def form(self) -> Layout:
        """The layout, made for this embedding_dim, bits and param_dtype."""
        return LAYOUTS[self.layout](self.embedding_dim, self.bits, self.param_dtype)

    @classmethod
    def parse(cls, text: str) -> "RowFormat":
        """Read what str makes of a row format, such as "uniform:64:4:float16" or "trellis:64:3.5:float32:hadamard".

        Raises:
            ValueError: it is something else.
        """
        match = re.fullmatch(r"(\w+):(\d+):(\d+(?:\.\d+)?):(\w+)(?::(\w+))?", text)
        try:
            if match:
                layout, embedding_dim, bits, param_dtype, rotation = match.groups()
                number = float(bits) if "." in bits else int(bits)
                return cls(int(embedding_dim), number, param_dtype, layout, rotation)
        except TypeError:  # the layout's bits have no fraction
            pass
        raise ValueError(
            f"row format is {text!r}; it has layout, embedding_dim, bits and param_dtype: 'uniform:64:4:float16'"
        )

    def __str__(self) -> str:
        rotation = f":{self.rotation}" if self.rotation else ""
        return f"{self.layout}:{self.embedding_dim}:{self.bits}:{self.param_dtype}{rotation}"

    def find_others_of_size(self) -> list["RowFormat"]:
        """Find the other formats of this embedding_dim and rotation whose tables have arrays of the same sizes."""
        found = []
        for layout in LAYOUTS.values():
            for bits, param_dtype in product(layout.unsized_bits, layout.param_dtypes):
                other = RowFormat(self.embedding_dim, bits, param_dtype, layout.name, self.rotation)
                if other != self and other._sizes == self._sizes:
                    found.append(other)
        return found

    @property
    def _sizes(self) -> tuple[Any, ...]:
        """Bytes of a row, and of the entries of what lies beside a table of one row and one codebook."""
        return (self.row_bytes, *((spec.name, spec.entry_bytes) for spec in self.form.beside(1, 1)))

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes; the last one is padded with zeros."""
        return self.form.code_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.form.row_bytes

    @property
    def num_levels(self) -> int:
        """Values that a code can stand for."""
        return self.form.num_levels

    @property
    def has_f16_params(self) -> bool:
        """Whether scale and bias, or codebooks, are float16."""
        return self.param_dtype == "float16"
