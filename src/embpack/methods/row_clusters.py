"""Clusters of similar rows: k-means over rows, to the same bits on every machine.

Source: Guan et al. 2019, section 3.2, tier 1 of KMEANS-CLS.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embpack import _native
from embpack.arithmetic import F32

Rows = NDArray[np.float32]
Numbers = NDArray[np.int64]

# More centres than this are found in two steps: groups first, then the centres of each group.
MOST_FLAT_CENTRES = 256
ITERATIONS = 10


@dataclass(frozen=True)
class Groups:
    """Things in groups, by their numbers.

    Attributes:
        order: int64, those of each group after those of the one before; None where they are in this order already.
        starts: int64 [num_groups + 1], where in that order each group begins, and the last one ends.
    """

    order: Numbers | None
    starts: Numbers

    @classmethod
    def single(cls, count: int) -> "Groups":
        """All of so many things."""
        return cls(None, np.array([0, count]))

    @classmethod
    def sort(cls, numbers: NDArray[np.uint32], num_groups: int) -> "Groups":
        """Group things by the number of the group of each, below 65536; in a group they keep their order."""
        order = np.argsort(numbers.astype(np.uint16), kind="stable")  # of 16 bits by radix sort
        return cls(order, _starts(np.bincount(numbers, minlength=num_groups)))

    @property
    def counts(self) -> Numbers:
        """How many things each group has."""
        return np.diff(self.starts)


def _starts(counts: Numbers) -> Numbers:
    return np.append(0, np.cumsum(counts))


def find_nearest(
    rows: NDArray[Any], factor: np.float32, groups: Groups, centres: Rows, starts: Numbers
) -> NDArray[np.uint32]:
    """Number of the nearest centre of each row, of equally near ones the first.

    Args:
        rows: float32, float16 or (bfloat16 as) uint16 [n, d].
        factor: a power of two that rows are multiplied by.
        groups: of the rows, each of them in one.
        centres: float32 [num_centres, d].
        starts: int64 [num_groups + 1]: a group has the centres from starts[g] to starts[g + 1]; at least one if it has
            rows.
    """
    numbers = np.empty(len(rows), np.uint32)
    _native.find_nearest(rows, float(factor), groups.order, groups.starts, centres, starts, numbers)
    return numbers


def find_nearest_reference(rows: Rows, centres: Rows) -> Numbers:
    """Do what find_nearest does for rows of one group in plain NumPy: the specification.

    The score of a row x for a centre c is x c - |c|^2 / 2: each product and each sum is rounded to float32, one column
    after the other, and the half square comes first. The nearest centre has the largest score.
    """
    squares = np.add.accumulate(centres * centres, axis=1)[:, -1]
    scores = np.tile(squares * F32(-0.5), (len(rows), 1))
    for of_rows, of_centres in zip(rows.T, centres.T, strict=True):
        scores = scores + of_rows[:, None] * of_centres
    return np.asarray(scores.argmax(axis=1))


def find_centres(
    rows: NDArray[Any], factor: np.float32, groups: Groups, starts: Numbers, rng: np.random.Generator
) -> Rows:
    """Find centres of the rows of each group by Lloyd's iteration, from some of these rows.

    Args:
        rows: float32, float16 or (bfloat16 as) uint16 [n, d].
        factor: as find_nearest takes it.
        groups: of the rows.
        starts: int64 [num_groups + 1], where each group's centres begin; it has at most as many as rows.
        rng: draws the rows.

    Returns:
        float32 [starts[-1], d], of rows times factor.
    """
    centres = rows[_draw_first(groups, starts, rng)] * factor
    for _ in range(ITERATIONS):
        own = Groups.sort(find_nearest(rows, factor, groups, centres, starts), len(centres))
        sums, counts = np.empty(centres.shape), own.counts
        _native.sum_groups(rows, own.order, own.starts, sums)
        sums *= factor
        sums /= np.maximum(counts, 1)[:, None]
        np.copyto(centres, sums, casting="same_kind", where=(counts > 0)[:, None])
    return centres


def _draw_first(groups: Groups, starts: Numbers, rng: np.random.Generator) -> Numbers:
    """Draw as many rows of each group as it is to have centres."""
    drawn = []
    for (first, end), count in zip(pairwise(groups.starts), np.diff(starts), strict=True):
        chosen = np.sort(rng.choice(end - first, count, replace=False))
        drawn.append(first + chosen if groups.order is None else groups.order[first + chosen])
    return np.concatenate(drawn)


@dataclass(frozen=True, eq=False)
class RowClusters:
    """Centres of rows, in groups, so that finding the nearest takes few distances.

    Attributes:
        factor: a power of two that rows are multiplied by, so that squares neither overflow nor vanish.
        groups: float32 [num_groups, d], the centres of the groups.
        centres: float32 [num_centres, d], those of each group after those of the one before.
        starts: int64 [num_groups + 1], where the centres of each group begin; every group has some.
    """

    factor: np.float32
    groups: Rows
    centres: Rows
    starts: Numbers

    @classmethod
    def train(cls, rows: Rows, num_centres: int) -> "RowClusters":
        """Find centres of rows [n, d], num_centres <= n, at most 65536."""
        _, _, smallest, largest = _native.bound(rows)
        exponent = int(np.frexp(max(-smallest, largest))[1])
        factor = F32(2.0 ** -min(max(exponent, -126), 126))
        rng = np.random.default_rng(0)
        groups, of_groups = Groups.single(len(rows)), np.zeros((1, rows.shape[1]), F32)
        if num_centres > MOST_FLAT_CENTRES:
            of_groups = find_centres(rows, factor, groups, np.array([0, int(num_centres**0.5)]), rng)
            groups = _group_rows(rows, factor, of_groups)
        shares = _share_out(num_centres, groups.counts)
        if not shares.all():
            of_groups, shares = of_groups[shares > 0], shares[shares > 0]
            groups = _group_rows(rows, factor, of_groups)
        return cls(factor, of_groups, find_centres(rows, factor, groups, _starts(shares), rng), _starts(shares))

    def state(self) -> list[NDArray[Any]]:
        """All that rows are assigned by."""
        return [np.array(self.factor), self.groups, self.centres, self.starts]

    def assign(self, rows: NDArray[Any]) -> NDArray[np.uint32]:
        """Number of the nearest centre, within the nearest group, of each row [n, d]."""
        groups = Groups.single(len(rows))
        if len(self.groups) > 1:
            groups = _group_rows(rows, self.factor, self.groups)
        return find_nearest(rows, self.factor, groups, self.centres, self.starts)


def _group_rows(rows: NDArray[Any], factor: np.float32, centres: Rows) -> Groups:
    """Group rows by the nearest of some centres."""
    numbers = find_nearest(rows, factor, Groups.single(len(rows)), centres, np.array([0, len(centres)]))
    return Groups.sort(numbers, len(centres))


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
