"""How a packed row lies in memory (the bytes themselves: docs/format.md)."""

from dataclasses import dataclass
from operator import index

BITS = (2, 4, 8)
PARAM_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Layout:
    """One way to lay a row out.

    Attributes:
        params_per_row: values of the parameter type that follow a row's codes.
    """

    name: str
    params_per_row: int


LAYOUTS = {layout.name: layout for layout in (Layout("uniform", params_per_row=2),)}


def default_param_dtype(bits: int) -> str:
    """The parameter type of PyTorch's and FBGEMM's rows: float16 at 2 and 4 bits, float32 at 8."""
    return "float32" if bits == 8 else "float16"


@dataclass(frozen=True)
class RowFormat:
    """Everything that fixes the bytes of a row.

    Attributes:
        embedding_dim: values a row, at least 1.
        bits: of each code: 2, 4 or 8.
        param_dtype: "float16" or "float32", of scale and bias.
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

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes; the last one is padded with zeros."""
        return (self.embedding_dim * self.bits + 7) // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.code_bytes + LAYOUTS[self.layout].params_per_row * PARAM_BYTES[self.param_dtype]

    @property
    def has_f16_params(self) -> bool:
        """Whether scale and bias are float16."""
        return self.param_dtype == "float16"
