"""ckwrap: Ckmeans.1d.dp (Wang and Song 2011) for Python, one call a row."""

from collections.abc import Callable
from typing import ClassVar

import ckwrap  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Clustered, Clusterer
from embpack.layouts import RowFormat

NUM_LEVELS = RowFormat(1, 4).num_levels


class Ckwrap(Clusterer):
    """ckwrap.ckmeans."""

    name: ClassVar[str] = "ckwrap"

    def clusterer(self, weight: NDArray[np.float32]) -> Callable[[], Clustered]:
        """Sixteen clusters a row; it takes doubles, which are made outside the timed call."""
        rows = weight.astype(np.float64)
        return lambda: [ckwrap.ckmeans(row, NUM_LEVELS) for row in rows]

    def levels(self, answer: Clustered) -> NDArray[np.float64]:
        """The centre of each value."""
        return np.array([np.take(row.centers, row.labels) for row in answer])


PEER = Ckwrap()
