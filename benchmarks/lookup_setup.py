"""What the races of lookup.py have in common: sizes, who takes part, ours as a contestant."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import embpack
from benchmarks.bags import Bags, Expected
from benchmarks.harness import Contestant
from benchmarks.peers import Lookup, Pooler
from embpack import PackedTable, _native

OTHER_DIM, BAG_SIZES = 64, (20, 64)


@dataclass(frozen=True)
class Sizes:
    """What to race on.

    Attributes:
        dims: embedding_dim of the races in the cache.
        bag_sizes: rows of a bag there.
        rows: of a table there.
        indices: of a call, about.
        table_bytes: packed bytes of the table out of the cache.
        tables, rows_a_table, bags_a_table: of the many tables.
    """

    dims: Sequence[int]
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
        isa: of ours, where a case does not say.
    """

    sizes: Sizes
    poolers: Sequence[Pooler]
    left_out: dict[str, str] = field(default_factory=dict)
    isa: str = field(default_factory=_native.isa)


def make_ours(
    setup: Setup, table: PackedTable, bags: Bags, *, threads: int = 1, goal: float | None = None
) -> Contestant[Any]:
    """Make the contestant that sums bags of one table by us."""
    name = "embpack" if threads == 1 else f"embpack, {threads} threads"
    return make_contestant(name, bind_table(table)(bags), bags, readying_us(setup.isa, threads), goal)


def bind_table(table: PackedTable) -> Callable[[Bags], Lookup]:
    """Return what Pooler.load returns, for us."""

    def bind(bags: Bags) -> Lookup:
        indices, offsets = bags.indices, bags.offsets[:-1].copy()
        return lambda: table.embedding_bag(indices, offsets, mode="sum")

    return bind


def readying_us(isa: str, threads: int = 1) -> Callable[[], None]:
    """Make what readies us before a sample: whose instructions, how many threads."""

    def make_ready() -> None:
        if not _native.use_isa(isa):
            raise ValueError(f"this CPU lacks {isa}")
        embpack.set_num_threads(threads)

    return make_ready


def readying(peer: Pooler) -> Callable[[], None]:
    """Make what readies a peer before a sample: one thread."""
    return lambda: peer.set_num_threads(1)


def make_contestant(
    name: str, call: Lookup, bags: Bags, make_ready: Callable[[], None], goal: float | None
) -> Contestant[Any]:
    """Make a contestant whose call sums those bags."""
    return Contestant(name, call, len(bags.indices), make_ready, goal)


def find_wrong_by(expected: Expected) -> Callable[[Any, Any], str | None]:
    """Both answers must be what the rows sum to."""

    def find_wrong(ours: Any, theirs: Any) -> str | None:
        return expected.find_wrong(np.asarray(ours)) or expected.find_wrong(np.asarray(theirs))

    return find_wrong


def find_wrong_of_two(ours: Expected, theirs: Expected) -> Callable[[Any, Any], str | None]:
    """Each answer must be what its own rows sum to."""
    return lambda our, their: ours.find_wrong(np.asarray(our)) or theirs.find_wrong(np.asarray(their))


def describe_race(case: str, setup: Setup, table: PackedTable, bags: Bags) -> dict[str, Any]:
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
        "isa": setup.isa,
    }


def describe_group_race(case: str, setup: Setup, tables: Sequence[PackedTable], bags: Bags) -> dict[str, Any]:
    """Describe a race on several tables alike, whose bags lie table after table."""
    of_group = {"tables": len(tables), "table_bytes": sum(table.nbytes for table in tables)}
    return describe_race(case, setup, tables[0], bags) | of_group
