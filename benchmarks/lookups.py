"""The races of python -m benchmarks.lookup: CASES, each a number of workloads."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from benchmarks.bags import (
    DISTRIBUTIONS,
    Bags,
    Expected,
    make_bags,
    make_table,
    make_uneven_bags,
    quantize_normal,
    repeat_rows,
)
from benchmarks.harness import Contestant, Workload
from benchmarks.lookup_memory import has_room, race_layouts_out_of_cache, race_out_of_cache
from benchmarks.lookup_modules import race_modules
from benchmarks.lookup_setup import (
    BAG_SIZES,
    OTHER_DIM,
    Setup,
    bind_table,
    describe_group_race,
    describe_race,
    find_wrong_by,
    find_wrong_of_two,
    make_ours,
    make_peer,
)
from benchmarks.peers import Lookup, Pooler
from embpack import PackedTable, TableGroup
from embpack.layouts import RowFormat

THREADED_DIMS = (64, 128)
# Waking a thread takes some microseconds, so calls that are worth two are longer than those that are raced on one.
THREADED_INDICES = 4
# Methods for the other layouts.
LAYOUT_METHODS = ("kmeans-lloyd", "kmeans-cls:K=16", "trellis")
# A caller of its own does so many calls at a time that handing them to it does not count.
CALLS_A_CALLER = 16


def make_workloads(setup: Setup, cases: Iterable[str]) -> Iterator[Workload[Any]]:
    """Make the races of some of CASES, each when it is asked for: tables are large."""
    for case in cases:
        yield from CASES[case](setup)


def race_in_cache(setup: Setup) -> Iterator[Workload[Any]]:
    """4 bits against everybody, by width, bag size and distribution."""
    for d in setup.sizes.dims:
        goals = {peer: setup.goals.by_pooler(peer, d) for peer in setup.poolers}
        for bag_size in setup.sizes.bag_sizes:
            for distribution in DISTRIBUTIONS:
                yield _race_poolers(setup, "in-cache", d, (bag_size, distribution), goals)


def race_widths(setup: Setup) -> Iterator[Workload[Any]]:
    """4 bits against 4 bits at widths that are not one tile."""
    goals = {peer: setup.goals.widths for peer in setup.poolers if peer.bits == 4}
    for d in setup.sizes.widths:
        for bag_size in setup.sizes.bag_sizes:
            yield _race_poolers(setup, "widths", d, (bag_size, "uniform"), goals)


def _race_poolers(
    setup: Setup, case: str, d: int, bags_of: tuple[int, str], goals: Mapping[Pooler, float | None]
) -> Workload[Any]:
    """Race against the peers that goals has."""
    sizes = setup.sizes
    table, (bag_size, distribution) = make_table(sizes.rows, d), bags_of
    bags = make_bags(sizes.rows, bag_size, sizes.indices, distribution)
    others = [make_peer(peer, peer.load([table])(bags), bags, goal) for peer, goal in goals.items()]
    settings = describe_race(case, table, bags) | {"distribution": distribution}
    ours = make_ours(bind_table(table)(bags), bags)
    return Workload(settings, ours, others, find_wrong_by(Expected([table], bags)))


def race_threads(setup: Setup) -> Iterator[Workload[Any]]:
    """Two threads against one, and against two callers of one thread each: what the machine gives at most."""
    sizes = setup.sizes
    for d in THREADED_DIMS:
        table = make_table(sizes.rows, d)
        bags = make_bags(sizes.rows, min(BAG_SIZES), THREADED_INDICES * sizes.indices)
        pool = bind_table(table)(bags)
        two = make_ours(pool, bags, "embpack, 2 threads", threads=2)
        others = [make_ours(pool, bags, goal=setup.goals.threads), _two_callers(pool, bags)]
        settings = describe_race("threads", table, bags) | {"threads": 2}
        yield Workload(settings, two, others, find_wrong_by(Expected([table], bags)))


def _two_callers(pool: Lookup, bags: Bags) -> Contestant[Any]:
    """Both sum all bags again and again, wait for nothing but their own work, and share nothing but the memory."""
    callers = ThreadPoolExecutor(2)

    def repeat() -> Any:
        for _ in range(CALLS_A_CALLER - 1):
            pool()
        return pool()

    def call() -> Any:
        first, second = (callers.submit(repeat) for _ in range(2))
        second.result()
        return first.result()

    one = make_ours(call, bags, "embpack, 2 callers")
    return replace(one, rows=2 * CALLS_A_CALLER * one.rows)


def race_layouts(setup: Setup) -> Iterator[Workload[Any]]:
    """Rows of other layouts against uniform rows; each answers for its own table."""
    sizes = setup.sizes
    for d in setup.sizes.dims:
        bags = make_bags(sizes.rows, min(BAG_SIZES), sizes.indices)
        uniform = quantize_normal(sizes.rows, d, "asym")
        for method in LAYOUT_METHODS:
            table, goal = quantize_normal(sizes.rows, d, method), setup.goals.layouts.get(method)
            settings = describe_race("layouts", table, bags)
            ours = make_ours(bind_table(table)(bags), bags, f"embpack, {table.layout}")
            other = make_ours(bind_table(uniform)(bags), bags, "embpack, uniform", goal=goal)
            yield Workload(
                settings, ours, [other], find_wrong_of_two(Expected([table], bags), Expected([uniform], bags))
            )


def race_many_tables(setup: Setup) -> Iterator[Workload[Any]]:
    """A hundred tables in one call: of some size, and as many bytes in all as the table out of the cache has."""
    sizes = setup.sizes
    rows_out_of_cache = sizes.table_bytes // sizes.tables // RowFormat(OTHER_DIM).row_bytes
    for rows in (sizes.rows_a_table, max(rows_out_of_cache, 1)):
        tables = [repeat_rows(make_table(sizes.rows_a_table, OTHER_DIM, seed), rows) for seed in range(sizes.tables)]
        bags = make_uneven_bags(rows, 10, sizes.tables * sizes.bags_a_table)
        yield _race_group(setup, tables, bags)


def _race_group(setup: Setup, tables: list[PackedTable], bags: Bags) -> Workload[Any]:
    rows, group = sum(map(len, tables)), TableGroup(tables)
    others = [
        make_peer(peer, peer.load(tables)(bags), bags, setup.goals.group)
        for peer in setup.poolers
        if peer.takes_groups and peer.bits == 4 and has_room(setup, peer, rows, OTHER_DIM)
    ]
    ours = make_ours(lambda: group.embedding_bag(bags.indices, bags.offsets), bags)
    settings = describe_group_race("many-tables", tables, bags)
    return Workload(settings, ours, others, find_wrong_by(Expected(tables, bags)))


def race_single_bag(setup: Setup) -> Iterator[Workload[Any]]:
    """One bag from Python: what a call costs."""
    table = make_table(setup.sizes.rows, OTHER_DIM)
    bags = make_bags(len(table), 20, 20)
    peers = [peer for peer in setup.poolers if peer.library == "PyTorch" and peer.bits == 4]
    others = [make_peer(peer, peer.load([table])(bags), bags, setup.goals.single_bag) for peer in peers]
    settings = describe_race("single-bag", table, bags)
    if peers:
        others += _ours_from_torch(table, bags)
    ours = make_ours(bind_table(table)(bags), bags)
    yield Workload(settings, ours, others, find_wrong_by(Expected([table], bags)))


def _ours_from_torch(table: PackedTable, bags: Bags) -> list[Contestant[Any]]:
    """Our method and our operator, called with tensors."""
    import torch  # Installed, or there were no peers.

    from embpack.torch import PackedEmbeddingBag

    indices, offsets = torch.from_numpy(bags.indices), torch.from_numpy(bags.offsets[:-1].copy())
    pool, packed = torch.ops.embpack.embedding_bag.default, PackedEmbeddingBag.from_table(table).packed
    row_format = str(table.row_format)
    calls = {
        "embpack, torch tensors": lambda: table.embedding_bag(indices, offsets, mode="sum"),
        "embpack::embedding_bag": lambda: pool(packed, row_format, indices, offsets, "sum"),
    }
    return [make_ours(call, bags, name) for name, call in calls.items()]


CASES: dict[str, Callable[[Setup], Iterator[Workload[Any]]]] = {
    "in-cache": race_in_cache,
    "widths": race_widths,
    "out-of-cache": race_out_of_cache,
    "threads": race_threads,
    "layouts": race_layouts,
    "layouts-out-of-cache": race_layouts_out_of_cache,
    "many-tables": race_many_tables,
    "single-bag": race_single_bag,
    "modules": race_modules,
}
