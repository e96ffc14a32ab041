"""Rows that are codes alone; similar ones share a codebook, which lies beside them."""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack.arithmetic import F32
from embpack.layouts.base import ArraySpec, Layout
from embpack.layouts.codes import unpack_codes

# The types of cluster numbers, by the most clusters that each is for.
CLUSTER_DTYPES: dict[int, np.dtype[Any]] = {256: np.dtype(np.uint8), 65536: np.dtype("<u2")}


def cluster_dtype(num_codebooks: int) -> np.dtype[Any]:
    """The smallest type for so many cluster numbers.

    Raises:
        ValueError: there are none, or too many.
    """
    for most, dtype in CLUSTER_DTYPES.items():
        if 0 < num_codebooks <= most:
            return dtype
    raise ValueError(f"there are {num_codebooks} codebooks; a table has 1 to {max(CLUSTER_DTYPES)}")


class ClusteredLayout(Layout):
    """Codes; by row the number of its cluster, and shared by all the codebook of each cluster, ascending."""

    name: ClassVar[str] = "clustered"
    needs: ClassVar[str] = "clusters and codebooks"

    @property
    def row_bytes(self) -> int:
        """Bytes of codes."""
        return self.code_bytes

    def by_row(self, num_embeddings: int, num_codebooks: int | None = None) -> ArraySpec | None:
        """Say which codebook a row has."""
        dtypes = tuple(CLUSTER_DTYPES.values()) if num_codebooks is None else (cluster_dtype(num_codebooks),)
        return ArraySpec("clusters", ".cluster", dtypes, (num_embeddings,))

    def shared(self, num_codebooks: int | None = None) -> ArraySpec | None:
        """List the codebooks."""
        return ArraySpec("codebooks", ".codebook", (self.param_type,), (num_codebooks, self.num_levels))

    def decode(
        self, packed: NDArray[np.uint8], by_row: NDArray[Any] | None = None, shared: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """Read rows."""
        assert by_row is not None and shared is not None
        codes = unpack_codes(packed, self.embedding_dim, self.bits)
        return np.take_along_axis(shared[by_row].astype(F32), codes.astype(np.int64), axis=1)
