"""How a packed row lies in memory (the bytes themselves: docs/format.md)."""

import math
import re
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from embpack.trellis import TrellisFormat

BITS = (2, 4, 8)
PARAM_BYTES = {"float16": 2, "float32": 4}
# Of a layout with shared values: values a row, and bits a value, which may have a fraction. With fewer bits there is no
# index, with more, levels are no longer quick to look up.
LEAST_SHARED_DIM, MOST_SHARED_DIM = 4, 4096
LEAST_SHARED_BITS, MOST_SHARED_BITS = 2, 7
# What scale and bias, as float16, take of a uniform row: of the bytes of so many bits, all are for the codes.
_UNIFORM_PARAM_BYTES = 4
NUM_SCALES = 256
ROTATIONS = ("hadamard",)


@dataclass(frozen=True)
class Layout:
    """One way to lay a row out.

    Attributes:
        params: what follows a row's codes, in values of the parameter type: scale and bias, a codebook, or nothing.
        is_clustered: whether the row's codebook is shared, chosen by a cluster number that lies beside the rows.
        has_shared_values: whether all rows share one array of float32 values, which lies beside them: rows are
            trellis-coded, and their bits may have a fraction.
    """

    name: str
    params: Literal["scale and bias", "codebook", "nothing"]
    is_clustered: bool = False
    has_shared_values: bool = False

    def params_per_row(self, bits: int) -> int:
        """Values of the parameter type that follow a row's codes."""
        return {"scale and bias": 2, "codebook": 1 << bits, "nothing": 0}[self.params]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("uniform", "scale and bias"),
        Layout("codebook", "codebook"),
        Layout("clustered", "nothing", is_clustered=True),
        Layout("trellis", "nothing", has_shared_values=True),
    )
}
# What the numbers of clusters are, by how many there are at most.
CLUSTER_DTYPES: "dict[int, np.dtype[Any]]" = {256: np.dtype(np.uint8), 65536: np.dtype("<u2")}


def default_param_dtype(bits: float, layout: str = "uniform") -> str:
    """The parameter type if none is asked for.

    Uniform rows are PyTorch's and FBGEMM's: float16 at 2 and 4 bits, float32 at 8. Codebooks are float16, shared values
    float32.
    """
    if layout in LAYOUTS and LAYOUTS[layout].has_shared_values:
        return "float32"
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
    """Everything that fixes what the bytes of a row mean.

    Attributes:
        embedding_dim: values a row, at least 1.
        bits: of each code: 2, 4 or 8. With shared values any number from 2 to 7, float where it has a fraction: a row
            has the bytes of a uniform one of so many bits with float16 parameters.
        param_dtype: "float16" or "float32", of scale and bias or of a codebook; "float32" for shared values.
        layout: a name in LAYOUTS.
        rotation: what the values are multiplied by before they are packed: None, or "hadamard" (embpack.rotation).

    Raises:
        TypeError: embedding_dim or bits is no integer, or bits no number for a layout with shared values.
        ValueError: a value is none of the above.
    """

    embedding_dim: int
    bits: Any = 4  # int, or float for shared values
    param_dtype: str = "float16"
    layout: str = "uniform"
    rotation: str | None = None

    def __post_init__(self) -> None:
        # NumPy's integers are welcome, but JSON has no place for them.
        object.__setattr__(self, "embedding_dim", index(self.embedding_dim))
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim is {self.embedding_dim}; a row needs at least one value")
        if self.has_shared_values:
            self._check_shared_values()
        else:
            object.__setattr__(self, "bits", index(self.bits))
            if self.bits not in BITS:
                raise ValueError(f"bits is {self.bits}; choose 2, 4 or 8")
        if self.param_dtype not in PARAM_BYTES:
            raise ValueError(f"param_dtype is {self.param_dtype!r}; choose 'float16' or 'float32'")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; choose one of {', '.join(LAYOUTS)}")
        if self.rotation not in (None, *ROTATIONS):
            raise ValueError(f"rotation is {self.rotation!r}; choose None or one of {', '.join(map(repr, ROTATIONS))}")

    def _check_shared_values(self) -> None:
        bits = float(self.bits)
        object.__setattr__(self, "bits", int(bits) if bits.is_integer() else bits)
        least, most = LEAST_SHARED_BITS, MOST_SHARED_BITS
        if not least <= bits <= most:
            raise ValueError(f"bits is {self.bits}; the {self.layout} layout has {least} to {most}")
        least, most = LEAST_SHARED_DIM, MOST_SHARED_DIM
        if not least <= self.embedding_dim <= most:
            raise ValueError(
                f"embedding_dim is {self.embedding_dim}; a row of the {self.layout} layout has {least} to {most} values"
            )
        if self.param_dtype != "float32":
            raise ValueError(f"param_dtype is {self.param_dtype!r}; the {self.layout} layout has 'float32'")

    @classmethod
    def parse(cls, text: str) -> "RowFormat":
        """Read what str makes of a row format, such as "uniform:64:4:float16" or "trellis:64:3.5:float32:hadamard".

        Raises:
            ValueError: it is something else.
        """
        match = re.fullmatch(r"(\w+):(\d+):(\d+(?:\.\d+)?):(\w+)(?::(\w+))?", text)
        if not match or ("." in match[3] and not (match[1] in LAYOUTS and LAYOUTS[match[1]].has_shared_values)):
            raise ValueError(
                f"row format is {text!r}; it has layout, embedding_dim, bits and param_dtype: 'uniform:64:4:float16'"
            )
        layout, embedding_dim, bits, param_dtype, rotation = match.groups()
        return cls(int(embedding_dim), float(bits) if "." in bits else int(bits), param_dtype, layout, rotation)

    def __str__(self) -> str:
        rotation = f":{self.rotation}" if self.rotation else ""
        return f"{self.layout}:{self.embedding_dim}:{self.bits}:{self.param_dtype}{rotation}"

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes; the last one is padded with zeros. With shared values, of all of a row."""
        if self.has_shared_values:
            return math.ceil(self.embedding_dim * float(self.bits) / 8 - 1e-6) + _UNIFORM_PARAM_BYTES
        return (self.embedding_dim * int(self.bits) + 7) // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.code_bytes + LAYOUTS[self.layout].params_per_row(int(self.bits)) * PARAM_BYTES[self.param_dtype]

    @property
    def has_f16_params(self) -> bool:
        """Whether scale and bias, or codebooks, are float16."""
        return self.param_dtype == "float16"

    @property
    def is_clustered(self) -> bool:
        """Whether cluster numbers and codebooks lie beside the rows."""
        return LAYOUTS[self.layout].is_clustered

    @property
    def has_shared_values(self) -> bool:
        """Whether all rows share one array of float32 values, the only codebook beside them."""
        return self.layout in LAYOUTS and LAYOUTS[self.layout].has_shared_values

    @property
    def has_codebooks_beside(self) -> bool:
        """Whether codebooks, or values that all rows share, lie beside the rows."""
        return self.is_clustered or self.has_shared_values

    @property
    def trellis(self) -> "TrellisFormat":
        """Where the parts of a row with shared values lie."""
        from embpack.trellis import TrellisFormat  # which needs row formats itself

        return TrellisFormat(self.embedding_dim, self.row_bytes)

    @property
    def num_levels(self) -> int:
        """Values of one codebook: those that a code can stand for, or all that rows share."""
        if not self.has_shared_values:
            return 1 << int(self.bits)
        return sum(self.trellis.num_levels) // 2 + NUM_SCALES + self.embedding_dim

    @property
    def codebook_bytes(self) -> int:
        """Bytes of one codebook."""
        return self.num_levels * PARAM_BYTES[self.param_dtype]
