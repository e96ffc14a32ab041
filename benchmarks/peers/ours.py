"""embpack, behind the same interface as its peers."""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

import embpack
from benchmarks.peers.base import Packed, Peer
from embpack import _native


class Embpack(Peer):
    """embpack.quantize."""

    name: ClassVar[str] = "embpack"
    methods: ClassVar[frozenset[str]] = frozenset(embpack.METHODS)

    def set_num_threads(self, count: int) -> None:
        """Set embpack's number."""
        embpack.set_num_threads(count)

    def isa(self, method: str) -> str:
        """Ours in use."""
        return _native.isa()

    def quantizer(self, method: str, weight: NDArray[np.float32]) -> Callable[[], Packed]:
        """Make the call that users make."""
        return lambda: embpack.quantize(weight, method).packed
