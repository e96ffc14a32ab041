"""What the races of lookup.py have in common: sizes, who takes part, ours as a contestant."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import embpack
from benchmarks.bags import Bags, Expected
from benchmarks.goals import LOOKUP_GOALS, LookupGoals
from benchmarks.harness import Contestant
from benchmarks.peers import Lookup, Pooler
from embpack import PackedTable, _native

OTHER_DIM, BAG_SIZES = 64, (20, 64)


@dataclass(frozen=True)
class Sizes:
    """What to race on.

    Attributes:
        dims: embedding_dim of the races in the cache.
        widths: the same of those of other widths.
        bag_sizes: rows of a bag there.
        rows: of a table there.
        indices: of a call, about.
        table_bytes: packed bytes of the table out of the cache.
        tables, rows_a_table, bags_a_table: of the many tables.
    """

    dims: Sequence[int]
    widths: Sequence[int]
    bag_sizes: Sequence[int]
    table_bytes: int
    rows: int = 2048
    indices: int = 20_000
    tables: int = 100
    rows_a_table: int = 10_000
    bags_a_table: int = 1000


@dataclass(frozen=True)
class Setup:
    """Who races on what.

    Attributes:
        sizes: see there.
        poolers: the peers' ways to look up.
        left_out: who does not race and why; cases add to it.
        goals: those of the instruction set of our kernels.
    """

    sizes: Sizes
    poolers: Sequence[Pooler]
    left_out: dict[str, str] = field(default_factory=dict)
    goals: LookupGoals = field(default_factory=lambda: LOOKUP_GOALS[_native.isa()])


def make_ours(
    call: Lookup, bags: Bags, name: str = "embpack", *, threads: int = 1, goal: float | None = None
) -> Contestant[Any]:
    """Make a contestant of ours, whose call sums those bags."""
    return Contestant(name, call, len(bags.indices), lambda: embpack.set_num_threads(threads), _native.isa(), goal)


def make_peer(peer: Pooler, call: Lookup, bags: Bags, goal: float | None) -> Contestant[Any]:
    """Make a contestant of a peer, on one thread, whose call sums those bags."""
    return Contestant(peer.name, call, len(bags.indices), lambda: peer.set_num_threads(1), peer.isa(), goal)


def bind_table(table: PackedTable) -> Callable[[Bags], Lookup]:
    """Return what Pooler.load returns, for us."""

    def bind(bags: Bags) -> Lookup:
        indices, offsets = bags.indices, bags.offsets[:-1].copy()
        return lambda: table.embedding_bag(indices, offsets, mode="sum")

    return bind


def find_wrong_by(expected: Expected) -> Callable[[Any, Any], str | None]:
    """Both answers must be what the rows sum to."""

    def find_wrong(ours: Any, theirs: Any) -> str | None:
        return expected.find_wrong(np.asarray(ours)) or expected.find_wrong(np.asarray(theirs))

    return find_wrong


def find_wrong_of_two(ours: Expected, theirs: Expected) -> Callable[[Any, Any], str | None]:
    """Each answer must be what its own rows sum to."""
    return lambda our, their: ours.find_wrong(np.asarray(our)) or theirs.find_wrong(np.asarray(their))


def describe_race(case: str, table: PackedTable, bags: Bags) -> dict[str, Any]:
    """Describe a race for a report; bag_size is the mean."""
    return {
        "case": case,
        "embedding_dim": table.embedding_dim,
        "num_embeddings": table.num_embeddings,
        "table_bytes": table.nbytes,
        "layout": table.layout,
        "indices": len(bags.indices),
        "bag_size": round(len(bags.indices) / (len(bags.offsets) - 1)),
        "distribution": "uniform",
        "threads": 1,
    }


def describe_group_race(case: str, tables: Sequence[PackedTable], bags: Bags) -> dict[str, Any]:
    """Describe a race on several tables alike, whose bags lie table after table."""
    of_group = {"tables": len(tables), "table_bytes": sum(table.nbytes for table in tables)}
    return describe_race(case, tables[0], bags) | of_group
