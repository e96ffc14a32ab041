"""Planning the tables of a recommender: how long it takes, and what is lost by measuring on few rows."""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import embpack
from embpack.comparison.array import Sample
from embpack.comparison.checkpoint import TableComparison, compare_sample
from embpack.comparison.front import find_front
from embpack.planning import VARIANTS
from embpack.planning.spread import choose
from embpack.rows import spread_rows
from embpack.samples import make_table

# Rows of the 26 tables, in the proportions of Criteo's; and the embedding_dims, in turn.
ROWS = (
    *(1_460, 583, 1_000_000, 1_000_000, 305, 24, 12_517, 633, 30, 93_145, 5_683, 1_000_000, 3_194),
    *(27, 14_992, 800_000, 19, 5_652, 2_173, 40, 700_000, 18, 16, 186_181, 105, 82_572),
)
DIMS = (16, 32, 64)
# Rows that are made of a table; a larger one repeats them, in another order.
MADE_ROWS = 100_000
# What all variants of a table are measured on for comparison.
FULL_ROWS = 20_000
QUICK = 40
LIMITS = ({}, {"max_bytes": "9 %"}, {"max_bytes": "12.5 %"}, {"max_bytes": "20 %"})
EPILOG = """
All variants are measured on 20,000 rows of each table first. What a plan loses by these losses is compared with the
best choice of the same bytes, and bytes with those of the fewest that lose as little.
"""

Result = TypeVar("Result")


def make_tables(rng: np.random.Generator, shrink: int) -> dict[str, NDArray[np.float32]]:
    """Make the tables, with so many times fewer rows; scales of tables differ, as after training."""
    tables = {}
    for i, rows in enumerate(ROWS):
        rows, dim = max(16, rows // shrink), DIMS[i % len(DIMS)]
        table = make_table(rng, min(rows, MADE_ROWS), dim) * np.float32(rng.lognormal(0, 0.5))
        tables[f"sparse_{i:02}_embedding.weight"] = table[rng.permutation(len(table))[np.arange(rows) % len(table)]]
    return tables


def measure_all(tables: Mapping[str, NDArray[np.float32]], rows: int) -> list[TableComparison]:
    """Measure all variants of each table on some rows."""
    compared = []
    for name, table in tables.items():
        numbers = spread_rows(len(table), min(len(table), rows))
        sample = Sample.make(name, table[numbers], "float32", numbers, len(table))
        compared.append(compare_sample(sample, VARIANTS, lambda name, rows: None))
    return compared


def count_cpu_seconds(function: Callable[[], Result]) -> tuple[Result, float]:
    """Call a function, and count the seconds that all CPUs have worked for it."""
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


@dataclass(frozen=True)
class Outcome:
    """What a plan comes to by the losses that were measured on most rows.

    Attributes:
        loss: of all tables.
        least_loss: of the best choice in no more bytes.
    """

    loss: float
    least_loss: float


def judge(plan: embpack.Plan, compared: Sequence[TableComparison]) -> Outcome:
    """Say what a plan loses by what was measured on most rows, and the least that can be lost in its bytes."""
    errors, options = 0.0, []
    squares = [each.square_norm * each.num_embeddings / each.rows_measured for each in compared]
    for each, square, planned in zip(compared, squares, plan.tables, strict=True):
        loss_of = {result.variant: result.loss for result in each.results}
        errors += loss_of[planned.variant] ** 2 * square
        ways = [*find_front(each.results), *(own for own in each.results if own.variant == planned.variant)]
        sizes = [own.variant.count_bytes(each.num_embeddings, each.embedding_dim) for own in ways]
        options.append((sizes, [own.loss**2 * square for own in ways]))
    best = choose(options, plan.num_bytes, None)
    assert best is not None  # the plan is such a choice
    least = sum(own[1][i] for own, i in zip(options, best, strict=True))
    return Outcome(math.sqrt(errors / sum(squares)), math.sqrt(least / sum(squares)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, and print what it took and what it came to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"tables with {QUICK} times fewer rows")
    is_quick = parser.parse_args(arguments).quick
    tables = make_tables(np.random.default_rng(0), QUICK if is_quick else 1)
    console = Console(highlight=False, soft_wrap=True)
    values = sum(table.size for table in tables.values())
    console.print(f"{len(tables)} tables, {sum(map(len, tables.values())):,} rows, {values:,} values")
    compared, seconds = count_cpu_seconds(lambda: measure_all(tables, FULL_ROWS))
    console.print(f"all variants on {FULL_ROWS:,} rows of each table: {seconds:.1f} s of CPU")
    for limit in LIMITS:
        kept: Any = limit
        plan, seconds = count_cpu_seconds(lambda kept=kept: embpack.plan(tables, **kept))
        outcome = judge(plan, compared)
        console.print(
            f"{limit.get('max_bytes', 'no limit')}: planned in {seconds:.1f} s of CPU; loss {plan.loss:.5f} by the "
            f"plan, {outcome.loss:.5f} by all variants; {outcome.least_loss:.5f} can be in these bytes "
            f"({outcome.loss / outcome.least_loss - 1:+.2%})"
        )


if __name__ == "__main__":
    main()
