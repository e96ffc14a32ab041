"""Summing bags of rows straight from packed bytes: speed beside PyTorch and FBGEMM."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.progress import track

from benchmarks import isas
from benchmarks.bags import make_bags, make_table
from benchmarks.cores import watch
from benchmarks.harness import Timing, describe_machine, race
from benchmarks.lookup_memory import choose_table_bytes
from benchmarks.lookup_report import LookupReport, print_lookup_report
from benchmarks.lookup_setup import BAG_SIZES, Setup, Sizes
from benchmarks.lookups import CASES, make_workloads
from benchmarks.peers import Pooler, load_poolers
from benchmarks.report import RaceResult
from embpack.cli import show

DIMS, QUICK_DIMS = (32, 64, 128, 256, 512), (64,)
# Those of the case of this name.
WIDTHS, QUICK_WIDTHS = (48, 50, 96, 100, 160, 200, 300, 384), (50,)
FULL, QUICK = Timing(rounds=15, sample_seconds=0.02), Timing(rounds=3, sample_seconds=0.005)
QUICK_TABLE_BYTES = 64 << 20

EPILOG = f"""
cases:
  in-cache      2,048 rows, 4 bits against 4 bits, 8 bits and float32; bags of 20 and 64, asked for alike or by
                a power law
  widths        as in-cache, 4 bits against 4 bits alone, at widths that people have: {", ".join(map(str, WIDTHS))}
  out-of-cache  a table of ten times the last-level cache, d = 64, against everybody and against the bare loop of
                touch.cpp, which only reads a byte of each cache line; a call takes a batch at random of so many
                that together they touch the whole table's worth of lines
  threads       two threads against one, and against two callers: what the machine gives at most
  layouts       rows with codebooks, rows that share them, and trellis-coded ones against uniform rows
  layouts-out-of-cache
                trellis-coded rows against uniform ones of as many bytes, as in out-of-cache
  many-tables   100 tables x 1,000 bags in one call of TableGroup, against FBGEMM's table-batched embeddings: tables
                of 10,000 rows, and together of as many bytes as the table of out-of-cache
  single-bag    one bag of 20 rows: what a call from Python costs
  modules       embpack.torch's modules against nn.EmbeddingBag, PyTorch's quantized module and, 100 tables of a
                KeyedJaggedTensor, TorchRec's collections: one bag and many

All tables of a race hold the same values, at 8 bits and in float32 too, so all answers must be the same sums, which
are checked against float64 before anything is timed. Peers are called as users call them, on one thread, output
allocated inside the timed call; FBGEMM takes its indices as int32, the others as int64. Then contestants take turns.
A ratio is our rate by theirs within a round, which a busy machine changes less than the rates themselves. A goal is for
the ratio: it is met or missed, and nothing fails. Goals differ by the instruction set of our kernels.
{isas.EPILOG}
  python -m benchmarks.lookup --quick                              a smoke test, in seconds
  python -m benchmarks.lookup --cases in-cache widths --dims 64    some cases only
  python -m benchmarks.lookup --json lookup.json                   everything, some minutes
  python -m benchmarks.lookup --isa avx2                           the same with AVX2, where the CPU has AVX-512
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lookup",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few widths and rounds, and a smaller table out of the cache")
    add("--cases", nargs="+", choices=CASES, metavar="CASE", default=list(CASES), help="see below (default: all)")
    dims_help = f"values a row, of in-cache and layouts (default: {' '.join(map(str, DIMS))})"
    add("--dims", type=int, nargs="+", metavar="D", help=dims_help)
    add("--rounds", type=int, metavar="N", help=f"samples a contestant (default: {FULL.rounds})")
    bytes_help = "packed bytes of the table out of the cache (default: ten times the cache, at most a third of memory)"
    add("--table-bytes", type=lambda text: int(float(text)), metavar="N", help=bytes_help)
    isas.add_isa_option(parser)
    add("--json", type=Path, metavar="PATH", help="write all figures there")
    options = parser.parse_args(arguments)
    for d in options.dims or ():
        if d < 2 or d % 2:
            parser.error(f"--dims: {d} is not a positive even number")
    return options


def run_races(options: argparse.Namespace) -> LookupReport:
    """Run what the options ask for."""
    timing = QUICK if options.quick else FULL
    timing = Timing(options.rounds or timing.rounds, timing.sample_seconds)
    dims = options.dims or (QUICK_DIMS if options.quick else DIMS)
    table_bytes = options.table_bytes or (QUICK_TABLE_BYTES if options.quick else choose_table_bytes())
    poolers, left_out = load_poolers()
    if options.isa:
        _require_held(poolers)
    machine = describe_machine()
    setup = Setup(Sizes(dims, QUICK_WIDTHS if options.quick else WIDTHS, BAG_SIZES, table_bytes), poolers, left_out)
    workloads = make_workloads(setup, options.cases)
    races, busyness = watch(
        lambda: [
            RaceResult(workload.settings, race(workload, timing))
            for workload in track(workloads, "Racing", console=show.errors)
        ]
    )
    return LookupReport(machine, busyness, left_out, races)


def _require_held(poolers: Sequence[Pooler]) -> None:
    isas.require_held({peer.name: peer.isa() for peer in poolers})
    tables, bags = [make_table(8, 16)], make_bags(8, 4, 8)
    for peer in poolers:
        if peer.bits == 4:
            isas.require_asked(peer.name, peer.load(tables)(bags))


def main() -> None:
    """Run, print, write."""
    options = parse_arguments()
    if options.isa:
        isas.hold_to_avx2()
    # NumPy asks Linux for huge pages; PyTorch does so only by this, and tables that races compare must lie alike.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    report = run_races(options)
    print_lookup_report(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()
