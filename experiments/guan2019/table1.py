"""Table 1: how many values embedding_bag (the paper's SparseLengthsSum) adds a second, on one thread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

import embpack
from benchmarks.harness import Contestant, Standing, Timing, Workload, race
from experiments.guan2019.pooling import FP32, INT4, INT8, Bags, Summer, Values, list_summers
from experiments.guan2019.report import Entry, Result

DIMS = (64, 128, 256, 512)
COLD, CACHED = "cold", "cached"
OURS = "INT4, embpack"

# Billion sums a second; one 2 GHz Skylake core with AVX-512.
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    FP32: {COLD: (1.939, 1.908, 1.997, 2.063), CACHED: (2.804, 4.165, 4.209, 4.127)},
    INT8: {COLD: (1.246, 1.511, 2.726, 3.076), CACHED: (2.242, 2.510, 3.748, 3.450)},
    INT4: {COLD: (1.608, 2.047, 2.532, 5.581), CACHED: (2.093, 2.878, 6.454, 6.893)},
}

ROWS_IN_BAG = 64
LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")

NOTES = (
    f"A sum is one value added: rows times embedding_dim. Bags of {ROWS_IN_BAG} rows, each row looked up at most once.",
    "cold: the last-level cache is flushed before each call; cached: the same call again and again.",
    "Contestants take turns; a figure is the fastest round's. The paper's is another machine's.",
)


@dataclass(frozen=True)
class Sizes:
    """How much to measure: widths, rows looked up a call (of four times as many), samples a contestant."""

    dims: Sequence[int] = DIMS
    lookups: int = 8192
    rounds: int = 25


@dataclass(frozen=True)
class Sums:
    """What a contestant answers, and the rows that it summed."""

    values: Values
    rows: Values


def run(sizes: Sizes) -> Result:
    """Race everybody at every width, cold and in cache."""
    flush = _make_flush()
    points = [(cache, d) for cache in (COLD, CACHED) for d in sizes.dims]
    entries: list[Entry] = []
    for cache, d in track(points, "Table 1", transient=True):
        entries += _race(d, sizes, cache, flush if cache == COLD else lambda: None)
    entries.sort(key=lambda entry: (FP32, INT8, INT4).index(entry.series[:4]))
    settings = {"lookups": sizes.lookups, "rounds": sizes.rounds, "rows_in_bag": ROWS_IN_BAG}
    return Result("table1", "Table 1: billion sums a second, one thread, by embedding_dim", settings, entries, NOTES)


def _race(d: int, sizes: Sizes, cache: str, flush: Callable[[], None]) -> list[Entry]:
    bags = _make_bags(d, sizes.lookups)
    contestants = {contestant.name: contestant for contestant in _make_contestants(bags, flush)}
    ours = contestants.pop(OURS)
    settings = {"embedding_dim": d, "cache": cache}
    workload = Workload(settings, ours, list(contestants.values()), lambda _, sums: _find_error(sums, bags), _no_loss)
    # One call a sample when cold: no time is too short for it.
    sample_seconds = 1e-9 if cache == COLD else 2e-3
    standings = race(workload, Timing(sizes.rounds, sample_seconds))
    return [_make_entry(standing, d, cache) for standing in standings]


def _make_bags(d: int, lookups: int) -> Bags:
    rng = np.random.default_rng(d)
    weight = rng.standard_normal((4 * lookups, d), dtype=np.float32)
    return Bags(weight, rng.permutation(len(weight))[:lookups].reshape(-1, ROWS_IN_BAG))


def _make_contestants(bags: Bags, flush: Callable[[], None]) -> list[Contestant[Sums]]:
    def make_ready() -> None:
        _use_one_thread()
        flush()

    def answer(summer: Summer) -> Callable[[], Sums]:
        return lambda: Sums(summer.pool(), summer.rows)

    lookups = bags.indices.size
    return [Contestant(f"{s.kind}, {s.name}", answer(s), lookups, make_ready) for s in list_summers(bags)]


def _use_one_thread() -> None:
    embpack.set_num_threads(1)
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


def _make_flush() -> Callable[[], None]:
    """Return a call that fills the last-level cache with something else."""
    text = LAST_LEVEL_CACHE.read_text() if LAST_LEVEL_CACHE.exists() else "65536K"
    other = np.zeros(2 * int(text.strip().removesuffix("K")) * 1024, np.uint8)

    def flush() -> None:
        np.add(other, np.uint8(1), out=other)

    return flush


def _find_error(sums: Sums, bags: Bags) -> str | None:
    """A sum is right if it is as near the exact one as float32 brings it.

    Adding n values rounds at most n times, each by 2^-24 of a partial sum, and a value of a packed row is rounded up
    to three times before: in all less than (n + 3) * 2^-24 times the sum of magnitudes, counted twice for levels that
    are computed bias first.
    """
    rows = sums.rows[bags.indices].astype(np.float64)
    bound = 2 * (ROWS_IN_BAG + 3) * 2.0**-24 * np.abs(rows).sum(axis=1)
    wrong = np.flatnonzero((np.abs(sums.values - rows.sum(axis=1)) > bound).any(axis=1))
    return f"{len(wrong)} of {len(sums.values)} bags are not summed right" if len(wrong) else None


def _no_loss(_: Sums) -> float:
    return 0.0


def _make_entry(standing: Standing, d: int, cache: str) -> Entry:
    kind, _, name = standing.name.partition(", ")
    paper = PAPER[kind][cache][DIMS.index(d)] if d in DIMS else None
    ratio = {"ours_by_this": vars(standing.ratio)} if standing.ratio else {}
    details = {"embedding_dim": d, "cache": cache, "type": kind, "contestant": name, **ratio}
    return Entry(standing.name, f"{d} {cache}", paper, standing.rows_per_second * d / 1e9, details=details)
