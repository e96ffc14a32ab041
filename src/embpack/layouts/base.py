"""What a layout is."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

BITS = (2, 4, 8)
PARAM_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class ArraySpec:
    """What an array beside the rows of a table is, or may be.

    Attributes:
        name: of the attribute of a PackedTable that has it: "clusters" or "codebooks".
        suffix: what a file adds to the table's name for it.
        dtypes: types that it may have; just one where the number of codebooks is known.
        shape: None, in the first place, stands for a number of codebooks that is not known.
    """

    name: str
    suffix: str
    dtypes: tuple[np.dtype[Any], ...]
    shape: tuple[int | None, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type, where it is known."""
        (dtype,) = self.dtypes
        return dtype

    @property
    def known_shape(self) -> tuple[int, ...]:
        """The shape, where it is known."""
        known = tuple(length for length in self.shape if length is not None)
        assert len(known) == len(self.shape)
        return known

    @property
    def nbytes(self) -> int:
        """Bytes of the array, where type and shape are known."""
        return math.prod(self.known_shape) * self.dtype.itemsize

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry along the first axis, where type and shape are known."""
        return math.prod(self.known_shape[1:]) * self.dtype.itemsize

    def admits(self, dtype: "np.dtype[Any] | None", shape: tuple[int, ...]) -> bool:
        """Whether an array of this type and shape can be the one."""
        return (
            dtype in self.dtypes
            and len(shape) == len(self.shape)
            and all(wanted in (None, found) for wanted, found in zip(self.shape, shape, strict=True))
        )

    def describe_shape(self) -> str:
        """Write the shape for a message: "[num_codebooks, 16]"."""
        return f"[{', '.join('num_codebooks' if length is None else str(length) for length in self.shape)}]"


@dataclass(frozen=True)
class Layout(ABC):
    """How rows of one embedding_dim, number of bits and parameter type lie in memory, and what lies beside them.

    Up to two arrays lie beside the rows of a table: one with an entry for each row, which a PackedTable has as its
    clusters, and one that all rows share, which it has as its codebooks.

    Attributes:
        embedding_dim: values a row.
        bits: of each code, or of each value.
        param_dtype: type of scale and bias, of codebooks, or of what all rows share: "float16" or "float32".

    Class attributes:
        name: what users call it.
        least_dim, most_dim: values a row.
        param_dtypes: types that parameters may have.
        has_scale_and_bias: whether rows are those of PyTorch and FBGEMM: codes, scale and bias.
        needs: what lies beside the rows, in words.
        caution: what a user who is offered such rows should know; "" for nothing.
        unsized_bits: numbers of bits that the size of a row may not tell from each other.

    Raises:
        TypeError: bits is not of the right type.
        ValueError: the layout has no rows of this embedding_dim, number of bits or parameter type.
    """

    name: ClassVar[str]
    least_dim: ClassVar[int] = 1
    most_dim: ClassVar[float] = math.inf
    param_dtypes: ClassVar[tuple[str, ...]] = tuple(PARAM_BYTES)
    has_scale_and_bias: ClassVar[bool] = False
    needs: ClassVar[str] = ""
    caution: ClassVar[str] = ""
    unsized_bits: ClassVar[tuple[int, ...]] = BITS

    embedding_dim: int
    bits: Any
    param_dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", self.read_bits(self.bits))
        if not self.least_dim <= self.embedding_dim <= self.most_dim:
            raise ValueError(
                f"embedding_dim is {self.embedding_dim}; a row of the {self.name} layout has {self.least_dim} to "
                f"{self.most_dim} values"
            )
        if self.param_dtype not in self.param_dtypes:
            raise ValueError(
                f"param_dtype is {self.param_dtype!r}; the {self.name} layout has "
                f"{' or '.join(map(repr, self.param_dtypes))}"
            )

    @classmethod
    def read_bits(cls, bits: Any) -> int | float:
        """Check a number of bits, and make NumPy's numbers Python's.

        Raises:
            TypeError: bits is no integer.
            ValueError: the layout has no such rows.
        """
        whole = index(bits)
        if whole not in BITS:
            raise ValueError(f"bits is {whole}; choose 2, 4 or 8")
        return whole

    @classmethod
    def default_param_dtype(cls, bits: float) -> str:
        """The parameter type if none is asked for."""
        return cls.param_dtypes[0]

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes; the last one is padded with zeros."""
        return (self.embedding_dim * int(self.bits) + 7) // 8

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of a row."""

    @property
    def param_type(self) -> np.dtype[Any]:
        """NumPy's type for param_dtype, little endian."""
        return np.dtype(self.param_dtype).newbyteorder("<")

    @property
    def param_bytes(self) -> int:
        """Bytes of one parameter."""
        return PARAM_BYTES[self.param_dtype]

    @property
    def num_levels(self) -> int:
        """Values that a code of a whole number of bits can stand for."""
        return 1 << int(self.bits)

    def by_row(self, num_embeddings: int, num_codebooks: int | None = None) -> ArraySpec | None:
        """Say what the array with an entry for each row is; None if there is none.

        Args:
            num_embeddings: rows.
            num_codebooks: in the shared array; None if that is not known.

        Raises:
            ValueError: no table has so many codebooks.
        """
        return None

    def shared(self, num_codebooks: int | None = None) -> ArraySpec | None:
        """Say what the array that all rows share is; None if there is none."""
        return None

    def beside(self, num_embeddings: int, num_codebooks: int | None = None) -> tuple[ArraySpec, ...]:
        """List the arrays that there are, in the order in which a file and its checksum have them."""
        specs = (self.by_row(num_embeddings, num_codebooks), self.shared(num_codebooks))
        return tuple(spec for spec in specs if spec is not None)

    def check_beside(self, num_embeddings: int, by_row: NDArray[Any] | None, shared: NDArray[Any] | None) -> None:
        """Raise ValueError unless these are the arrays beside so many rows."""
        given = {"clusters": by_row, "codebooks": shared}
        specs = {spec.name: spec for spec in self.beside(num_embeddings)}
        foreign = [name for name in given if name not in specs]
        if any(given[name] is not None for name in foreign):
            raise ValueError(f"{' and '.join(foreign)} go with the clustered layout, not with {self.name!r}")
        if any(given[name] is None for name in specs):
            raise ValueError(f"the {self.name} layout needs {self.needs}")
        for name, spec in specs.items():
            array = given[name]
            if array is not None and not spec.admits(array.dtype, array.shape):
                is_of_format = name == "codebooks" and None not in spec.shape
                where = f"for embedding_dim {self.embedding_dim} at {self.bits} bits " if is_of_format else ""
                raise ValueError(
                    f"{name} are {array.dtype} of shape {list(array.shape)}; {where}they must be "
                    f"{' or '.join(dtype.name for dtype in spec.dtypes)} {spec.describe_shape()}"
                )
        if shared is not None:
            if not len(shared) and num_embeddings:
                raise ValueError(f"there are no codebooks for {num_embeddings} rows")
            self.check_shared(shared)

    def check_shared(self, values: NDArray[Any]) -> None:  # noqa: B027  (most layouts take any)
        """Raise ValueError if the array that rows share has values that it cannot have."""

    @abstractmethod
    def decode(
        self, packed: NDArray[np.uint8], by_row: NDArray[Any] | None = None, shared: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """Read rows, uint8 [N, row_bytes], as they were packed: float32 [N, embedding_dim]. The specification."""
