"""KMEANS-CLS: codebooks that similar rows share (Guan et al. 2019, section 3.2)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.arithmetic import F32
from embpack.chunks import span_rows
from embpack.layouts import PARAM_BYTES, RowFormat
from embpack.layouts.clustered import CLUSTER_DTYPES, cluster_dtype
from embpack.methods.base import Chunks, Encoded, Method, OnRows, Packer, bound_values
from embpack.methods.kmeans import SortedRow, iterate_lloyd
from embpack.methods.row_clusters import Groups, Numbers, RowClusters, Rows
from embpack.reference import store_levels
from embpack.rows import widen

# Values that centres and codebooks are trained on: the whole of most tables, evenly spread rows of larger ones.
MOST_TRAINED_VALUES = 1 << 25


def choose_num_codebooks(num_embeddings: int, row_format: RowFormat) -> int:
    """Find how many codebooks take the bytes that scale and bias take in uniform rows, as in the paper.

    With 16-bit numbers a row has 2 bytes less to give to codebooks than with 8-bit ones, which allow 256 of them.
    """
    param_bytes = PARAM_BYTES[row_format.param_dtype]
    params, codebook_bytes = 2 * param_bytes, row_format.num_levels * param_bytes
    counts = [
        min(most, num_embeddings * (params - dtype.itemsize) // codebook_bytes)
        for most, dtype in CLUSTER_DTYPES.items()
    ]
    return max(1, *counts)


def fit_codebooks(rows: Rows, clusters: Groups, bits: int) -> Rows:
    """Find the codebook of each cluster: k-means over all its values, from a uniform grid.

    Args:
        rows: float32 [n, d].
        clusters: of the rows; one without rows gets zeros.
        bits: of a code.

    Returns:
        float32 [num_clusters, 2^bits], each ascending.
    """
    codebooks = np.empty((len(clusters.counts), 2**bits), F32)
    _native.fit_codebooks(rows, clusters.order, clusters.starts, bits, codebooks)
    return codebooks


def fit_codebooks_reference(rows: Rows, numbers: Numbers, num_codebooks: int, bits: int) -> Rows:
    """Do what fit_codebooks does in plain NumPy: the specification."""
    codebooks = np.zeros((num_codebooks, 2**bits), F32)
    for number in np.unique(numbers):
        row = SortedRow.make(rows[numbers == number].reshape(-1))
        codebooks[number] = row.middle + iterate_lloyd(row, 2**bits)
    return codebooks


@dataclass(frozen=True)
class KMeansCls(Method):
    """Similar rows in clusters, and one codebook for each cluster.

    K-means clusters the rows (tier 1), then all values of each cluster's rows (tier 2). Both are trained on at most
    MOST_TRAINED_VALUES values. Past MOST_FLAT_CENTRES clusters, clusters are in groups, and a row is put into the
    nearest cluster of the nearest group, which is not always the nearest cluster of all.

    Attributes:
        K: number of clusters; 0 for as many as make a table take the bytes of uniform rows, as in the paper.

    Source: the paper's KMEANS-CLS.
    """

    name: ClassVar[str] = "kmeans-cls"
    layout: ClassVar[str] = "clustered"
    summary: ClassVar[str] = "codebooks that similar rows share; to compare"

    K: int = 0

    def __post_init__(self) -> None:
        most = max(CLUSTER_DTYPES)
        if not 0 <= self.K <= most:
            raise ValueError(f"{self.name}: K is {self.K}; give a number of clusters from 1 to {most}, or 0 to choose")

    def num_codebooks(self, num_embeddings: int, row_format: RowFormat) -> int:
        """K, or as many as take the bytes of scale and bias."""
        return min(num_embeddings, self.K or choose_num_codebooks(num_embeddings, row_format))

    def sample_rows(self, num_embeddings: int, row_format: RowFormat) -> int:
        """At least one for each codebook."""
        most = max(self.num_codebooks(num_embeddings, row_format), MOST_TRAINED_VALUES // row_format.embedding_dim)
        return min(num_embeddings, most)

    def for_part(self, num_embeddings: int, row_format: RowFormat) -> Method:
        """With as many codebooks as the table has."""
        return KMeansCls(self.num_codebooks(num_embeddings, row_format))

    def fit(self, chunks: Chunks, num_embeddings: int, row_format: RowFormat, name: str = "weight") -> Packer:
        """Train on a sample."""
        num_codebooks = self.num_codebooks(num_embeddings, row_format)
        count = self.sample_rows(num_embeddings, row_format)
        numbers = np.arange(count) * num_embeddings // count
        sample = _read_sample(chunks, numbers, row_format.embedding_dim, name)
        clusters = RowClusters.train(sample, num_codebooks)
        levels = fit_codebooks(sample, Groups.sort(clusters.assign(sample), num_codebooks), row_format.bits)
        return ClusterPacker(self, row_format, name, clusters, levels)


class Clusters(Protocol):
    """What rows are like which: RowClusters, or, for rows that are added to a packed table, its codebooks."""

    def assign(self, rows: Rows) -> NDArray[np.uint32]:
        """Find the cluster of each row, as Packer.pack takes rows; [n]."""

    def state(self) -> list[NDArray[Any]]:
        """All that rows are assigned by."""


@dataclass(frozen=True, eq=False)
class ClusterPacker(Packer):
    """Packs rows by the codebooks of their clusters.

    Attributes:
        clusters: of rows.
        levels: float32 [num_codebooks, 2^bits], each codebook ascending.
    """

    clusters: Clusters
    levels: NDArray[np.float32]

    def beside(self) -> dict[str, NDArray[Any]]:
        """Codebooks."""
        return {"codebooks": store_levels(self.levels, self.row_format)}

    def state(self) -> list[NDArray[Any]]:
        """What rows are assigned by, and codebooks as they are before they are stored."""
        return [*self.clusters.state(), self.levels]

    def make_by_row(self, num_rows: int) -> NDArray[Any]:
        """Make room for cluster numbers."""
        return np.empty(num_rows, cluster_dtype(len(self.levels)))

    def _encode(
        self,
        rows: NDArray[Any],
        packed: NDArray[np.uint8],
        start: int,
        on_rows: OnRows | None,
        by_row: NDArray[Any] | None,
    ) -> Encoded:
        form, numbers = self.row_format.form, self.clusters.assign(rows)
        if by_row is not None:
            by_row[:] = numbers
        how = (form.bits, self.row_format.has_f16_params, span_rows(form.embedding_dim))
        return _native.quantize_with_clusters(rows, numbers, self.levels, *how, packed, on_rows)


def _read_sample(chunks: Chunks, numbers: Numbers, embedding_dim: int, name: str) -> Rows:
    """Read the rows that have these numbers, in ascending order; float32. All values are looked at."""
    sample, seen = np.empty((len(numbers), embedding_dim), F32), 0
    for rows in chunks():
        bound_values(rows, name, seen)  # refuses NaN and infinity
        first, end = np.searchsorted(numbers, [seen, seen + len(rows)])
        sample[first:end] = widen(rows[numbers[first:end] - seen])
        seen += len(rows)
    return sample
