"""KMEANS-CLS: codebooks that similar rows share (Guan et al. 2019, section 3.2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.arithmetic import F32
from embpack.chunks import span_rows
from embpack.layouts import PARAM_BYTES, RowFormat
from embpack.layouts.clustered import CLUSTER_DTYPES, cluster_dtype
from embpack.methods.base import Chunks, Encoded, Method, OnRows, Packer, bound_values
from embpack.methods.kmeans import SortedRow, iterate_lloyd
from embpack.reference import store_levels
from embpack.rows import widen

Rows = NDArray[np.float32]
Numbers = NDArray[np.int64]

# Values that centres and codebooks are trained on: the whole of most tables, evenly spread rows of larger ones.
MOST_TRAINED_VALUES = 1 << 25
# More centres than this are found in two steps: groups first, then the centres of each group.
MOST_FLAT_CENTRES = 256
ITERATIONS = 10
# Values of a matrix of distances, and of rows that are copied: Ctrl-C is heard in between.
_VALUES_AT_A_TIME = 1 << 22


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


def assign(rows: Rows, centres: Rows) -> Numbers:
    """Number of the nearest centre of each row [n, d]; int64 [n]."""
    half_squares = np.einsum("ij,ij->i", centres, centres) * F32(0.5)
    step = max(1, _VALUES_AT_A_TIME // len(centres))
    numbers = [np.argmin(half_squares - part @ centres.T, axis=1) for part in _parts(rows, step)]
    return np.concatenate(numbers)


def _parts(rows: Rows, step: int) -> Iterator[Rows]:
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def find_centres(rows: Rows, num_centres: int, rng: np.random.Generator) -> Rows:
    """Lloyd's iteration over rows [n, d], from some of them; float32 [num_centres, d]."""
    centres = rows[np.sort(rng.choice(len(rows), num_centres, replace=False))].copy()
    for _ in range(ITERATIONS):
        numbers = assign(rows, centres)
        counts = np.bincount(numbers, minlength=num_centres)
        sums = _sum_groups(rows, numbers, num_centres)
        filled = counts > 0
        centres[filled] = sums[filled] / counts[filled, None]
    return centres


def _sum_groups(rows: Rows, numbers: Numbers, num_groups: int) -> NDArray[np.float64]:
    """Sum the rows of each group; float64 [groups, d]."""
    sums = np.zeros((num_groups, rows.shape[1]))
    step = max(1, _VALUES_AT_A_TIME // rows.shape[1])
    for start in range(0, len(rows), step):
        own = numbers[start : start + step]
        order = np.argsort(own, kind="stable")
        groups, firsts = np.unique(own[order], return_index=True)
        sums[groups] += np.add.reduceat(rows[start : start + step][order], firsts, axis=0, dtype=np.float64)
    return sums


@dataclass(frozen=True, eq=False)
class RowClusters:
    """Centres of rows, in groups, so that finding the nearest takes few distances.

    Attributes:
        factor: what rows are multiplied by, so that squares neither overflow nor vanish.
        groups: float32 [num_groups, d], the centres of the groups.
        centres: float32 [num_centres, d], those of each group after those of the one before.
        ends: where the centres of each group end.
    """

    factor: np.float32
    groups: Rows
    centres: Rows
    ends: Numbers

    @classmethod
    def train(cls, rows: Rows, num_centres: int) -> "RowClusters":
        """Find centres of rows [n, d], num_centres <= n; the same for the same rows."""
        rng = np.random.default_rng(0)
        factor = F32(1 / max(float(np.abs(rows).max()), 1e-30))
        rows = rows * factor
        if num_centres <= MOST_FLAT_CENTRES:
            centres = find_centres(rows, num_centres, rng)
            return cls(factor, centres.mean(axis=0, keepdims=True), centres, np.array([num_centres]))
        groups = find_centres(rows, int(num_centres**0.5), rng)
        numbers = assign(rows, groups)
        counts = np.bincount(numbers, minlength=len(groups))
        shares = _share_out(num_centres, counts)
        order = np.argsort(numbers, kind="stable")
        starts = np.cumsum(counts) - counts
        found = [
            find_centres(rows[order[start : start + count]], int(share), rng)
            for start, count, share in zip(starts, counts, shares, strict=True)
            if share
        ]
        return cls(factor, groups, np.concatenate(found), np.cumsum(shares))

    def assign(self, rows: Rows) -> Numbers:
        """Number of the nearest centre, within the nearest group that has any, of each row [n, d]; int64 [n]."""
        rows = rows * self.factor
        starts = self.ends - np.diff(self.ends, prepend=0)
        has_centres = np.flatnonzero(self.ends > starts)
        group_of = has_centres[assign(rows, self.groups[has_centres])]
        numbers = np.empty(len(rows), np.int64)
        for group in np.unique(group_of):
            members = np.flatnonzero(group_of == group)
            start, end = starts[group], self.ends[group]
            numbers[members] = start + assign(rows[members], self.centres[start:end])
        return numbers


def _share_out(total: int, counts: Numbers) -> Numbers:
    """Share a total out in proportion to counts, no share larger than its count; sum(counts) >= total."""
    shares: Numbers = counts * total // counts.sum()
    left = int(total - shares.sum())
    by_room = np.argsort(shares - counts, kind="stable")
    while left:
        takers = by_room[shares[by_room] < counts[by_room]][:left]
        shares[takers] += 1
        left -= len(takers)
    return shares


def fit_codebooks(rows: Rows, numbers: Numbers, num_codebooks: int, bits: int) -> Rows:
    """Find the codebook of each cluster: k-means over all its values, from a uniform grid.

    Args:
        rows: float32 [n, d].
        numbers: int64 [n]: the cluster of each row.
        num_codebooks: clusters; one without rows gets zeros.
        bits: of a code.

    Returns:
        float32 [num_codebooks, 2^bits], each ascending.
    """
    order = np.argsort(numbers, kind="stable")
    values, step = np.empty(rows.shape, F32), max(1, _VALUES_AT_A_TIME // rows.shape[1])
    for start in range(0, len(rows), step):
        np.take(rows, order[start : start + step], axis=0, out=values[start : start + step])
    starts = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=num_codebooks))]) * rows.shape[1]
    codebooks = np.empty((num_codebooks, 2**bits), F32)
    _native.fit_codebooks(values.reshape(-1), starts, bits, codebooks)
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

    Distances are NumPy's matrix products, whose last bits depend on its BLAS and on the CPU: on another machine a row
    that is as near to two centres may be put into the other cluster.

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

    def fit(self, chunks: Chunks, num_embeddings: int, row_format: RowFormat, name: str = "weight") -> Packer:
        """Train on a sample."""
        num_codebooks = self.num_codebooks(num_embeddings, row_format)
        sample = _read_sample(chunks, num_embeddings, row_format.embedding_dim, num_codebooks, name)
        clusters = RowClusters.train(sample, num_codebooks)
        numbers = clusters.assign(sample)
        levels = fit_codebooks(sample, numbers, num_codebooks, row_format.bits)
        return ClusterPacker(self, row_format, name, clusters, levels)


@dataclass(frozen=True, eq=False)
class ClusterPacker(Packer):
    """Packs rows by the codebooks of their clusters.

    Attributes:
        clusters: of rows.
        levels: float32 [num_codebooks, 2^bits], each codebook ascending.
    """

    clusters: RowClusters
    levels: NDArray[np.float32]

    def beside(self) -> dict[str, NDArray[Any]]:
        """Codebooks."""
        return {"codebooks": store_levels(self.levels, self.row_format)}

    def state(self) -> list[NDArray[Any]]:
        """What rows are assigned by, and codebooks as they are before they are stored."""
        return [
            np.array(self.clusters.factor),
            self.clusters.groups,
            self.clusters.centres,
            self.clusters.ends,
            self.levels,
        ]

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
        form, numbers = self.row_format.form, self.clusters.assign(widen(rows))
        if by_row is not None:
            by_row[:] = numbers
        how = (form.bits, self.row_format.has_f16_params, span_rows(form.embedding_dim))
        return _native.quantize_with_clusters(rows, numbers.astype(np.uint32), self.levels, *how, packed, on_rows)


def _read_sample(chunks: Chunks, num_embeddings: int, embedding_dim: int, num_codebooks: int, name: str) -> Rows:
    """Read evenly spread rows, at least one for each codebook; float32. All values are looked at."""
    wanted = min(num_embeddings, max(num_codebooks, MOST_TRAINED_VALUES // embedding_dim))
    positions = np.arange(wanted) * num_embeddings // wanted
    sample, seen = np.empty((wanted, embedding_dim), F32), 0
    for rows in chunks():
        bound_values(rows, name, seen)  # refuses NaN and infinity
        first, end = np.searchsorted(positions, [seen, seen + len(rows)])
        sample[first:end] = widen(rows[positions[first:end] - seen])
        seen += len(rows)
    return sample
