"""The races of python -m benchmarks.lookup: CASES, each a number of workloads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
    make_contestant,
    make_ours,
    readying,
    readying_us,
)
from benchmarks.peers import Pooler
from embpack import PackedTable, TableGroup, _native
from embpack.layouts import RowFormat

FOUR_BIT_GOAL, FP32_GOAL = 1.5, 1.0
THREADS_GOAL = 1.8
GROUP_GOAL = 1.5
SINGLE_BAG_GOAL = 1.0
AVX2_GOAL = 0.8

THREADED_DIMS = (64, 128)
# Waking a thread takes some microseconds, so calls that are worth two are longer than those that are raced on one.
THREADED_INDICES = 4
# Methods for the other layouts, and how fast lookups of these are to be, by uniform rows.
LAYOUT_GOALS = {"kmeans-lloyd": 0.8, "kmeans-cls:K=16": 0.8, "trellis": 0.45}
# A caller of its own does so many calls at a time that handing them to it does not count.
CALLS_A_CALLER = 16

Goals = Callable[[Pooler], float | None]


def make_workloads(setup: Setup, cases: Iterable[str]) -> Iterator[Workload[Any]]:
    """Make the races of some of CASES, each when it is asked for: tables are large."""
    for case in cases:
        yield from CASES[case](setup)


def race_in_cache(setup: Setup) -> Iterator[Workload[Any]]:
    """4 bits against everybody, by width, bag size and distribution."""
    goals = {4: FOUR_BIT_GOAL, 32: FP32_GOAL}
    for d in setup.sizes.dims:
        for bag_size in setup.sizes.bag_sizes:
            for distribution in DISTRIBUTIONS:
                yield _race_poolers(setup, "in-cache", d, (bag_size, distribution), lambda peer: goals.get(peer.bits))


def race_avx2(setup: Setup) -> Iterator[Workload[Any]]:
    """Ours held to AVX2; peers use what they find."""
    if "avx2" not in _native.available_isas():
        setup.left_out["avx2"] = "this CPU has no AVX2"
        return
    slower = Setup(setup.sizes, [peer for peer in setup.poolers if peer.bits == 4], setup.left_out, "avx2")
    for d in setup.sizes.dims:
        yield _race_poolers(slower, "avx2", d, (min(BAG_SIZES), "uniform"), lambda _: AVX2_GOAL)


def _race_poolers(setup: Setup, case: str, d: int, bags_of: tuple[int, str], goals: Goals) -> Workload[Any]:
    sizes = setup.sizes
    table, (bag_size, distribution) = make_table(sizes.rows, d), bags_of
    bags = make_bags(sizes.rows, bag_size, sizes.indices, distribution)
    others = [
        make_contestant(peer.name, peer.load([table])(bags), bags, readying(peer), goals(peer))
        for peer in setup.poolers
    ]
    settings = describe_race(case, setup, table, bags) | {"distribution": distribution}
    return Workload(settings, make_ours(setup, table, bags), others, find_wrong_by(Expected([table], bags)))


def race_threads(setup: Setup) -> Iterator[Workload[Any]]:
    """Two threads against one, and against two callers of one thread each: what the machine gives at most."""
    sizes = setup.sizes
    for d in THREADED_DIMS:
        table = make_table(sizes.rows, d)
        bags = make_bags(sizes.rows, min(BAG_SIZES), THREADED_INDICES * sizes.indices)
        two = make_ours(setup, table, bags, threads=2)
        others = [make_ours(setup, table, bags, goal=THREADS_GOAL), _two_callers(setup, table, bags)]
        settings = describe_race("threads", setup, table, bags) | {"threads": 2}
        yield Workload(settings, two, others, find_wrong_by(Expected([table], bags)))


def _two_callers(setup: Setup, table: PackedTable, bags: Bags) -> Contestant[Any]:
    """Both sum all bags again and again, wait for nothing but their own work, and share nothing but the memory."""
    pool = bind_table(table)(bags)
    callers = ThreadPoolExecutor(2)

    def repeat() -> Any:
        for _ in range(CALLS_A_CALLER - 1):
            pool()
        return pool()

    def call() -> Any:
        first, second = (callers.submit(repeat) for _ in range(2))
        second.result()
        return first.result()

    return Contestant("embpack, 2 callers", call, 2 * CALLS_A_CALLER * len(bags.indices), readying_us(setup.isa))


def race_layouts(setup: Setup) -> Iterator[Workload[Any]]:
    """Rows of other layouts against uniform rows; each answers for its own table."""
    sizes = setup.sizes
    for d in setup.sizes.dims:
        bags = make_bags(sizes.rows, min(BAG_SIZES), sizes.indices)
        uniform = quantize_normal(sizes.rows, d, "asym")
        for method, goal in LAYOUT_GOALS.items():
            table = quantize_normal(sizes.rows, d, method)
            settings = describe_race("layouts", setup, table, bags)
            ours = make_contestant(
                f"embpack, {table.layout}", bind_table(table)(bags), bags, readying_us(setup.isa), None
            )
            other = make_contestant("embpack, uniform", bind_table(uniform)(bags), bags, readying_us(setup.isa), goal)
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
        make_contestant(peer.name, peer.load(tables)(bags), bags, readying(peer), GROUP_GOAL)
        for peer in setup.poolers
        if peer.takes_groups and peer.bits == 4 and has_room(setup, peer, rows, OTHER_DIM)
    ]
    ours = make_contestant(
        "embpack", lambda: group.embedding_bag(bags.indices, bags.offsets), bags, readying_us(setup.isa), None
    )
    settings = describe_group_race("many-tables", setup, tables, bags)
    return Workload(settings, ours, others, find_wrong_by(Expected(tables, bags)))


def race_single_bag(setup: Setup) -> Iterator[Workload[Any]]:
    """One bag from Python: what a call costs."""
    table = make_table(setup.sizes.rows, OTHER_DIM)
    bags = make_bags(len(table), 20, 20)
    peers = [peer for peer in setup.poolers if peer.library == "PyTorch" and peer.bits == 4]
    others = [
        make_contestant(peer.name, peer.load([table])(bags), bags, readying(peer), SINGLE_BAG_GOAL) for peer in peers
    ]
    settings = describe_race("single-bag", setup, table, bags)
    if peers:
        others += _ours_from_torch(setup, table, bags)
    yield Workload(settings, make_ours(setup, table, bags), others, find_wrong_by(Expected([table], bags)))


def _ours_from_torch(setup: Setup, table: PackedTable, bags: Bags) -> list[Contestant[Any]]:
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
    return [make_contestant(name, call, bags, readying_us(setup.isa), None) for name, call in calls.items()]


CASES: dict[str, Callable[[Setup], Iterator[Workload[Any]]]] = {
    "in-cache": race_in_cache,
    "out-of-cache": race_out_of_cache,
    "threads": race_threads,
    "layouts": race_layouts,
    "layouts-out-of-cache": race_layouts_out_of_cache,
    "many-tables": race_many_tables,
    "single-bag": race_single_bag,
    "modules": race_modules,
    "avx2": race_avx2,
}
