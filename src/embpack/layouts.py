"""How a packed row lies in memory (the bytes themselves: docs/format.md)."""

import re
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

import numpy as np

BITS = (2, 4, 8)
PARAM_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Layout:
    """One way to lay a row out.

    Attributes:
        params: what follows a row's codes, in values of the parameter type: scale and bias, a codebook, or nothing.
        is_clustered: whether the row's codebook is shared, chosen by a cluster number that lies beside the rows.
    """

    name: str
    params: Literal["scale and bias", "codebook", "nothing"]
    is_clustered: bool = False

    def params_per_row(self, bits: int) -> int:
        """Values of the parameter type that follow a row's codes."""
        return {"scale and bias": 2, "codebook": 1 << bits, "nothing": 0}[self.params]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("uniform", "scale and bias"),
        Layout("codebook", "codebook"),
        Layout("clustered", "nothing", is_clustered=True),
    )
}
# What the numbers of clusters are, by how many there are at most.
CLUSTER_DTYPES: "dict[int, np.dtype[Any]]" = {256: np.dtype(np.uint8), 65536: np.dtype("<u2")}


def default_param_dtype(bits: int, layout: str = "uniform") -> str:
    """The parameter type if none is asked for.

    Uniform rows are PyTorch's and FBGEMM's: float16 at 2 and 4 bits, float32 at 8. Codebooks are float16.
    """
    return "float32" if bits == 8 and layout == "uniform" else "float16"


def cluster_dtype(num_codebooks: int) -> "np.dtype[Any]":
    """The smallest type for so many cluster numbers.

    Raises:
        ValueError: there are none, or too many.
    """
    for most, dtype in CLUSTER_DTYPES.items():
        if 0 < num_codebooks <= most:
            return dtype
    raise ValueError(f"there are {num_codebooks} codebooks; a table has 1 to {max(CLUSTER_DTYPES)}")


@dataclass(frozen=True)
class RowFormat:
    """Everything that fixes the bytes of a row.

    Attributes:
        embedding_dim: values a row, at least 1.
        bits: of each code: 2, 4 or 8.
        param_dtype: "float16" or "float32", of scale and bias or of a codebook.
        layout: a name in LAYOUTS.

    Raises:
        TypeError: embedding_dim or bits is no integer.
        ValueError: a value is none of the above.
    """

    embedding_dim: int
    bits: int = 4
    param_dtype: str = "float16"
    layout: str = "uniform"

    def __post_init__(self) -> None:
        # NumPy's integers are welcome, but JSON has no place for them.
        object.__setattr__(self, "embedding_dim", index(self.embedding_dim))
        object.__setattr__(self, "bits", index(self.bits))
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim is {self.embedding_dim}; a row needs at least one value")
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; choose 2, 4 or 8")
        if self.param_dtype not in PARAM_BYTES:
            raise ValueError(f"param_dtype is {self.param_dtype!r}; choose 'float16' or 'float32'")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; choose one of {', '.join(LAYOUTS)}")

    @classmethod
    def parse(cls, text: str) -> "RowFormat":
        """Read what str makes of a row format, such as "uniform:64:4:float16".

        Raises:
            ValueError: it is something else.
        """
        match = re.fullmatch(r"(\w+):(\d+):(\d+):(\w+)", text)
        if not match:
            raise ValueError(
                f"row format is {text!r}; it has layout, embedding_dim, bits and param_dtype: 'uniform:64:4:float16'"
            )
        layout, embedding_dim, bits, param_dtype = match.groups()
        return cls(int(embedding_dim), int(bits), param_dtype, layout)

    def __str__(self) -> str:
        return f"{self.layout}:{self.embedding_dim}:{self.bits}:{self.param_dtype}"

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes; the last one is padded with zeros."""
        return (self.embedding_dim * self.bits + 7) // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.code_bytes + LAYOUTS[self.layout].params_per_row(self.bits) * PARAM_BYTES[self.param_dtype]

    @property
    def has_f16_params(self) -> bool:
        """Whether scale and bias, or codebooks, are float16."""
        return self.param_dtype == "float16"

    @property
    def is_clustered(self) -> bool:
        """Whether cluster numbers and codebooks lie beside the rows."""
        return LAYOUTS[self.layout].is_clustered

    @property
    def num_levels(self) -> int:
        """Values that a code can stand for."""
        return 1 << self.bits

    @property
    def codebook_bytes(self) -> int:
        """Bytes of one codebook."""
        return self.num_levels * PARAM_BYTES[self.param_dtype]
