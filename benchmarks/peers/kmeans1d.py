"""kmeans1d: exact one-dimensional k-means (Gronlund et al. 2017), one call a row."""

from collections.abc import Callable
from typing import ClassVar

import kmeans1d  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Clustered, Clusterer
from embpack.layouts import RowFormat

NUM_LEVELS = RowFormat(1, 4).num_levels


class KMeans1d(Clusterer):
    """kmeans1d.cluster."""

    name: ClassVar[str] = "kmeans1d"

    def clusterer(self, weight: NDArray[np.float32]) -> Callable[[], Clustered]:
        """Sixteen clusters a row."""
        return lambda: [kmeans1d.cluster(row, NUM_LEVELS) for row in weight]

    def levels(self, answer: Clustered) -> NDArray[np.float64]:
        """The centroid of each value."""
        return np.array([np.take(row.centroids, row.clusters) for row in answer])


PEER = KMeans1d()
