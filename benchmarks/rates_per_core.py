"""Rows a second that one core packs, by each method; and how long one core takes to find what a table shares.

What a core does is what one task of a cluster does: it reads a range of rows, packs them, and writes a part. The file
is in the page cache, and the part is on the disk in the end.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import embpack
from benchmarks.cores import watch
from benchmarks.harness import describe_machine
from benchmarks.streaming import table_file
from embpack.chunks import span_rows
from embpack.cli import show
from embpack.formats import open_checkpoint
from embpack.methods import METHODS
from embpack.methods.base import Packer
from embpack.ranges import fit_table, list_ranges, pack_range
from embpack.rules import Decision, Rules, decide_all
from embpack.shard_writer import TableWriter
from embpack.variant import Variant

DIMS = (64, 160, 256)
# Those that read all of a table before its first row is packed.
FITTED = ("trellis", "kmeans-cls", "table")
RANGE_BYTES, TABLE_BYTES, ROUNDS, LEAST_SECONDS = 1 << 26, 1 << 28, 3, 0.3


def decide(source: Path, method: str) -> Decision:
    """Decide to pack the one table of a file by a method."""
    with open_checkpoint(source) as checkpoint:
        [decision] = decide_all(checkpoint, Rules((), (), Variant(method), {}, ()))
    return decision


def measure_rate(decision: Decision, packer: Packer, folder: Path) -> float:
    """Rows a second of a range, or of as many spans of one as take LEAST_SECONDS; of some rounds the fastest."""
    [(_, most), *_] = list_ranges(TableWriter(decision).whole())

    def measure(rows: int) -> float:
        return _time(lambda: pack_range((decision, packer), 0, 0, rows, folder, "part"))

    rows = min(most, span_rows(packer.row_format.embedding_dim))
    while (seconds := measure(rows)) < LEAST_SECONDS and rows < most:
        rows = min(most, 2 * rows)
    return rows / min(seconds, *(measure(rows) for _ in range(ROUNDS - 1)))


def measure_fit(method: str, dim: int) -> tuple[float, float]:
    """Seconds that fitting takes whatever the size of a table, and values a second that it reads, by two sizes."""
    seconds, values = [], []
    for table_bytes in (TABLE_BYTES, 4 * TABLE_BYTES):
        with table_file(table_bytes // (4 * dim), dim) as source:
            decision = decide(source, method)
            seconds.append(min(_time(partial(fit_table, decision)) for _ in range(2)))
            values.append(decision.tensor.shape[0] * dim)
    rate = (values[1] - values[0]) / (seconds[1] - seconds[0])
    return seconds[0] - values[0] / rate, rate


def _time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def print_rates(methods: Sequence[str], dims: Sequence[int]) -> None:
    """Print rows a second of each method at each width."""
    rates: dict[str, list[float]] = {method: [] for method in methods}
    with TemporaryDirectory() as folder:
        for dim in dims:
            with table_file(RANGE_BYTES // (4 * dim), dim) as source:
                for method, own in rates.items():
                    decision = decide(source, method)
                    own.append(measure_rate(decision, fit_table(decision), Path(folder)))
    columns = ("method", *(f"d = {dim}" for dim in dims), "values a second")
    shown = show.start_table("Rows a second a core", columns, text_columns=1)
    for method, own in rates.items():
        values = min(rate * dim for rate, dim in zip(own, dims, strict=True))
        shown.add_row(method, *(f"{rate:,.0f}" for rate in own), f"{values / 1e6:,.1f} M or more")
    show.output.print(shown)


def print_fits(methods: Sequence[str], dims: Sequence[int]) -> None:
    """Print how long fitting takes."""
    columns = ("method", "d", "of any table", "values a second")
    shown = show.start_table("Fitting what rows share, on one core", columns, text_columns=1)
    for method in methods:
        for dim in dims:
            constant, rate = measure_fit(method, dim)
            shown.add_row(method, str(dim), f"{constant:.1f} s", f"{rate / 1e6:,.0f} M")
    show.output.print(shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates_per_core", description=__doc__)
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=list(METHODS), help="(default: all)")
    parser.add_argument("--dims", type=int, nargs="+", metavar="D", default=DIMS, help="(default: 64 160 256)")
    parser.add_argument("--no-fits", action="store_true", help="leave out how long fitting takes")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    show.output.print(f"{machine['cpu']}, {machine['isa']}")
    embpack.set_num_threads(1)
    _, busyness = watch(lambda: print_rates(options.methods, options.dims))
    if not options.no_fits:
        print_fits([method for method in options.methods if method in FITTED], options.dims)
    lost = ", ".join(f"CPU {cpu.cpu} {max(cpu.before, cpu.after):.0%}" for cpu in busyness.cpus)
    show.output.print(f"lost to others: {lost}")


if __name__ == "__main__":
    main()
