"""The race from memory: a table that no cache holds, and what this machine gives at most."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bags import Bags, Expected, make_bags, make_table, quantize_normal, repeat_rows
from benchmarks.harness import Contestant, Workload
from benchmarks.lookup_setup import (
    BAG_SIZES,
    OTHER_DIM,
    Setup,
    bind_table,
    describe_race,
    find_wrong_by,
    find_wrong_of_two,
    make_ours,
    make_peer,
)
from benchmarks.peers import Lookup, Pooler
from benchmarks.touch import LINE_BYTES, compile_touch, sum_touched
from embpack import PackedTable
from embpack.layouts import RowFormat


def race_out_of_cache(setup: Setup) -> Iterator[Workload[Any]]:
    """A table that no cache holds; each call takes one of many batches, so that none is still there from last time."""
    table = make_table(_count_rows(setup), OTHER_DIM)
    batches = _make_batches(setup, table)
    others = [
        make_peer(peer, _in_turns(peer.name, peer.load([table]), batches), batches[0], setup.goals.memory)
        for peer in setup.poolers
        if has_room(setup, peer, *table.shape)
    ]
    others += _list_bare_loop(setup, table, batches)
    ours = make_ours(_in_turns("embpack", bind_table(table), batches), batches[0])
    settings = describe_race("out-of-cache", table, batches[0]) | _describe_batches(batches)
    find_wrong, touched = find_wrong_by(Expected([table], batches[0])), sum_touched(table, batches[0].indices)

    def find_wrong_or_untouched(ours: Any, theirs: Any) -> str | None:
        if isinstance(theirs, int):
            return None if theirs == touched else f"bytes sum to {theirs}, not {touched}"
        return find_wrong(ours, theirs)

    yield Workload(settings, ours, others, find_wrong_or_untouched)


def race_layouts_out_of_cache(setup: Setup) -> Iterator[Workload[Any]]:
    """Trellis-coded rows against uniform ones of as many bytes, from memory."""
    few, many = setup.sizes.rows, _count_rows(setup)
    uniform, table = (repeat_rows(quantize_normal(few, OTHER_DIM, method), many) for method in ("asym", "trellis"))
    batches = _make_batches(setup, table)
    ours, other = (
        make_ours(_in_turns(name, bind_table(each), batches), batches[0], name, goal=goal)
        for name, each, goal in (
            ("embpack, trellis", table, None),
            ("embpack, uniform", uniform, setup.goals.memory_layout),
        )
    )
    settings = describe_race("layouts-out-of-cache", table, batches[0]) | _describe_batches(batches)
    yield Workload(
        settings, ours, [other], find_wrong_of_two(*(Expected([each], batches[0]) for each in (table, uniform)))
    )


def _count_rows(setup: Setup) -> int:
    return max(setup.sizes.table_bytes // RowFormat(OTHER_DIM).row_bytes, 1)


def _make_batches(setup: Setup, table: PackedTable) -> list[Bags]:
    sizes = setup.sizes
    return [
        make_bags(len(table), min(BAG_SIZES), sizes.indices, seed=1 + batch)
        for batch in range(max(1, table.nbytes // (sizes.indices * LINE_BYTES)))
    ]


def _describe_batches(batches: Sequence[Bags]) -> dict[str, Any]:
    return {"batches": len(batches), "last_level_cache_bytes": read_last_level_cache()}


def _in_turns(name: str, bind: Callable[[Bags], Lookup], batches: Sequence[Bags]) -> Lookup:
    """Make a call that takes the first batch first, which answers are compared on, and then one at random.

    Each contestant draws its own, or it would find in the cache what the one before it has fetched.
    """
    calls = [bind(batch) for batch in batches]
    choose, waiting = random.Random(name), [calls[0]]
    return lambda: (waiting.pop() if waiting else choose.choice(calls))()


def has_room(setup: Setup, peer: Pooler, rows: int, embedding_dim: int) -> bool:
    """Whether a peer's tables of so many rows in all fit half of the free memory; setup says so if they do not."""
    needed, room = peer.bytes_needed(rows, embedding_dim), read_available_memory() // 2
    if needed > room:
        what = f"{rows} rows take {needed >> 20} MB while they are made, half of the free memory is {room >> 20}"
        setup.left_out[f"{peer.name}, out-of-cache"] = what
    return needed <= room


def _list_bare_loop(setup: Setup, table: PackedTable, batches: Sequence[Bags]) -> list[Contestant[Any]]:
    try:
        touch = compile_touch()
    except OSError as error:
        setup.left_out["bare loop"] = str(error)
        return []
    call = _in_turns("bare loop", lambda bags: lambda: touch(table, bags.indices), batches)
    rows = len(batches[0].indices)
    return [Contestant("bare loop", call, rows, lambda: None, "portable", setup.goals.bare_loop)]


def read_last_level_cache() -> int:
    """Bytes of the last-level cache, by Linux; 32 MB elsewhere."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=32 << 20)


def read_available_memory() -> int:
    """Bytes that a program can take without swapping, by Linux; 4 GB elsewhere."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), 4 << 30)


def choose_table_bytes() -> int:
    """Ten times the last-level cache, or a third of the free memory if that is less."""
    return min(10 * read_last_level_cache(), read_available_memory() // 3)
