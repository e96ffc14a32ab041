"""What a method is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack._native import SearchParams
from embpack.layouts import RowFormat
from embpack.reference import Row


@dataclass(frozen=True)
class Method(ABC):
    """Chooses what the codes of each row stand for; its fields are its parameters.

    Class attributes:
        name: what users call it.
        layout: of the rows that it makes, a name in LAYOUTS.
        summary: one line on what it does and when to use it.
    """

    name: ClassVar[str]
    layout: ClassVar[str]
    summary: ClassVar[str]

    def num_codebooks(self, num_embeddings: int, row_format: RowFormat) -> int:
        """How many codebooks lie beside the rows of a table of so many: never more than it has rows."""
        return 0

    @property
    def spec(self) -> str:
        """Name and parameters, as parse_method reads them."""
        settings = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        return f"{self.name}:{settings}" if settings else self.name


@dataclass(frozen=True)
class UniformMethod(Method):
    """Chooses the clipping range of each row.

    Class attributes:
        kernel: the native search that does the same as ``search``.
        takes_error_weights: whether ``search`` takes a third argument, weights of the squared errors, float32 [d].
    """

    layout: ClassVar[str] = "uniform"
    kernel: ClassVar[str]
    takes_error_weights: ClassVar[bool] = False

    @abstractmethod
    def search(self, x: Row, row_format: RowFormat) -> tuple[np.float32, np.float32]:
        """Return the clipping range (xmin, xmax) of the row ``x``, float32 [d]: the specification."""

    def search_params(self) -> SearchParams:
        """The parameters, as the native search takes them."""
        return SearchParams()


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


@dataclass(frozen=True, eq=False)
class Clusters:
    """Codebooks that rows share.

    Attributes:
        of_row: uint8 or uint16 [num_embeddings]: which codebook a row has.
        levels: float32 [num_codebooks, 2^bits], each codebook ascending.
    """

    of_row: NDArray[Any]
    levels: NDArray[np.float32]


@dataclass(frozen=True)
class ClusteredMethod(Method):
    """Chooses codebooks that rows share, from the whole table."""

    layout: ClassVar[str] = "clustered"

    @abstractmethod
    def fit(self, chunks: Callable[[], Iterable[NDArray[Any]]], num_embeddings: int, row_format: RowFormat) -> Clusters:
        """Cluster the rows of a table and find the codebooks.

        Args:
            chunks: yields all rows, each time that it is called; all finite.
            num_embeddings: how many there are.
            row_format: of the packed rows.
        """
