"""What a benchmark asks of a library."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

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
    def quantizer(self, method: str, weight: NDArray[np.float32]) -> Callable[[], Packed]:
        """Return a call that packs float32 rows [N, d] into an array that it allocates, uint8 [N, row_bytes].

        Whatever the library needs beforehand (a tensor over the same memory) is made here, outside the call.
        """
