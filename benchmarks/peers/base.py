"""What a benchmark asks of a library."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.bags import Bags
from embpack import PackedTable

Packed = NDArray[np.uint8]


# What a clusterer returns: an object of its own for each row.
Clustered = list[Any]


class Clusterer(ABC):
    """One package that solves k-means in one dimension, on one thread.

    Class attributes:
        name: what reports call it.
    """

    name: ClassVar[str]

    @abstractmethod
    def clusterer(self, weight: NDArray[np.float32]) -> Callable[[], Clustered]:
        """Return a call that clusters each of the float32 rows [N, d]."""

    @abstractmethod
    def levels(self, answer: Clustered) -> NDArray[np.float64]:
        """Return what the values become, float64 [N, d]."""


class Peer(ABC):
    """One library, which packs to 4 bits with float16 parameters.

    Class attributes:
        name: what reports call it.
        methods: what it can do, by the names of embpack.METHODS.
    """

    name: ClassVar[str]
    methods: ClassVar[frozenset[str]]

    @abstractmethod
    def set_num_threads(self, count: int) -> None:
        """Use this many threads from now on."""

    @abstractmethod
    def isa(self, method: str) -> str:
        """Return the instruction set that its kernels for a method are for."""

    @abstractmethod
    def quantizer(self, method: str, weight: NDArray[np.float32]) -> Callable[[], Packed]:
        """Return a call that packs float32 rows [N, d] into an array that it allocates, uint8 [N, row_bytes].

        Whatever the library needs beforehand (a tensor over the same memory) is made here, outside the call.
        """


@dataclass(frozen=True, eq=False)
class Restored:
    """What a library leaves of a table.

    Attributes:
        values: float32 [n, d], by its own dequantization; n may be less than N, where it packs only the first rows.
        nbytes: of everything that it keeps for these: codes, scales, zero points, codebooks.
    """

    values: NDArray[Any]
    nbytes: int


@dataclass(frozen=True)
class Quantizer:
    """One way of a library to make 4 bits of a value.

    Attributes:
        library: what reports call the library.
        method: which of its ways it is, as users find it.
        restore: packs float32 rows [N, d] and unpacks them; only the first ones where it has no time for all.
        multiple_of: of which d has to be a multiple.
    """

    library: str
    method: str
    restore: Callable[[NDArray[np.float32]], Restored]
    multiple_of: int = 1


# A lookup: what it returns is float32 [bags, tables * d], an array or a tensor.
Lookup = Callable[[], Any]


class Pooler(ABC):
    """One way of a library to sum bags of rows.

    Class attributes:
        library: what reports call the library.
        operator: which of its ways it is, as users find it.
        bits: of a value, 4, 8 or 32; by 4 the goals are set.
        copies: tables in memory while it is made ready, in tables of its own precision.
        takes_groups: whether one call looks many tables up.
    """

    library: ClassVar[str]
    operator: ClassVar[str]
    bits: ClassVar[int]
    copies: ClassVar[int] = 1
    takes_groups: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.library} fp32" if self.bits == 32 else f"{self.library} {self.bits} bits"

    def bytes_needed(self, rows: int, embedding_dim: int) -> int:
        """Memory that a table takes while it is made ready, about."""
        return rows * (embedding_dim * self.bits // 8 + (8 if self.bits < 32 else 0)) * self.copies

    @abstractmethod
    def set_num_threads(self, count: int) -> None:
        """Use this many threads from now on."""

    @abstractmethod
    def isa(self) -> str:
        """Return the instruction set that its kernels are for."""

    @abstractmethod
    def load(self, tables: Sequence[PackedTable]) -> Callable[[Bags], Lookup]:
        """Hold the values of 4-bit tables at this precision.

        Returns:
            What makes of bags a call that sums them; indices are converted outside of the call.
        """
