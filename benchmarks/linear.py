"""Vectors times packed rows, an output layer's logits: speed beside torch.nn.Linear."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

import embpack
from benchmarks import isas
from benchmarks.cores import Busyness, watch
from benchmarks.harness import Standing, Timing, describe_machine, race
from benchmarks.report import RaceResult, describe_goal, describe_ratio, print_busyness, print_machine
from embpack.cli import show

DIMS, COUNTS, ROWS = (1024, 4096), (1, 4, 16, 64), 50_000
QUICK_DIMS, QUICK_ROWS = (256,), 2000
FULL, QUICK = Timing(rounds=11, sample_seconds=0.1), Timing(rounds=3, sample_seconds=0.005)
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "2-bits": ("asym", {"bits": 2}),
    "4-bits": ("asym", {"bits": 4}),
    "8-bits": ("asym", {"bits": 8}),
    "trellis": ("trellis", {"bits": 4}),
}

EPILOG = f"""
A layer has 50,000 rows, as many as a language model has words, and no bias. nn.Linear has the same values, unpacked, as
float32 and as bfloat16; answers are compared before anything is timed. Rows a second are those that are multiplied by
all vectors of a call.
{isas.EPILOG}
nn.Linear multiplies float32 by MKL, and bfloat16 by oneDNN where the CPU has AVX-512, else by PyTorch's own kernels.
MKL heeds its switch on Intel's CPUs alone; on others it does not say which instruction set it uses. --isa avx2 switches
oneDNN off, so that bfloat16 is multiplied as on CPUs without AVX-512.

  python -m benchmarks.linear --quick                        a smoke test, in seconds
  python -m benchmarks.linear --dims 1024 --tables 4-bits    some races only
"""


@dataclass(frozen=True)
class LinearReport:
    """Everything that a run found; dataclasses.asdict makes it JSON."""

    machine: dict[str, Any]
    busyness: Busyness
    races: list[RaceResult]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one width, fewer rows, few rounds")
    add("--dims", type=int, nargs="+", metavar="D", help=f"values a row (default: {' '.join(map(str, DIMS))})")
    add("--vectors", type=int, nargs="+", metavar="N", default=COUNTS, help="vectors a call (default: 1 4 16 64)")
    add("--tables", nargs="+", choices=TABLES, metavar="TABLE", default=list(TABLES), help=f"of {', '.join(TABLES)}")
    add("--threads", type=int, metavar="N", help="of everybody (default: as many as there are CPUs)")
    add("--rounds", type=int, metavar="N", help=f"samples a contestant (default: {FULL.rounds})")
    isas.add_isa_option(parser)
    add("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args(arguments)


def run_races(options: argparse.Namespace) -> LinearReport:
    """Run what the options ask for."""
    from benchmarks.products import PEERS, find_isa, make_workloads  # They load PyTorch, which reads what --isa sets.

    timing = QUICK if options.quick else FULL
    timing = Timing(options.rounds or timing.rounds, timing.sample_seconds)
    dims = options.dims or (QUICK_DIMS if options.quick else DIMS)
    if options.isa:
        isas.switch_onednn_off()
        isas.require_held({peer: find_isa(dtype) for peer, dtype in PEERS.items()})
    machine = describe_machine(("embpack", "numpy", "torch"))
    threads = options.threads or embpack.get_num_threads()
    tables = {name: TABLES[name] for name in options.tables}
    workloads = make_workloads(dims, options.vectors, tables, QUICK_ROWS if options.quick else ROWS, threads)
    total = len(dims) * len(options.tables) * len(options.vectors)
    races, busyness = watch(
        lambda: [
            RaceResult(found.settings, race(found, timing))
            for found in track(workloads, "Racing", total=total, console=show.errors)
        ]
    )
    return LinearReport(machine, busyness, races)


def print_linear_report(report: LinearReport) -> None:
    """Print the machine and the races."""
    print_machine(report.machine, {})
    print_busyness(report.busyness)
    show.output.print()
    shown = show.start_table(
        "Vectors times all rows. M rows/s, ms a call: fastest round; ratio: our rate by theirs, median of rounds",
        ("contestant", "isa", "M rows/s", "ms", "ratio", "quartiles", "goal", ""),
        text_columns=2,
        left=("",),
        drop=("ms",),
    )
    for found in report.races:
        settings = found.settings
        shown.add_row("")
        shown.add_row("{table}, d = {embedding_dim}, vectors: {vectors}".format(**settings))
        for standing in found.standings:
            shown.add_row(*_describe(standing))
    show.output.print(shown)


def _describe(standing: Standing) -> tuple[str, ...]:
    rate = standing.rows_per_second
    speed = (f"{rate / 1e6:.2f}", f"{standing.rows / rate * 1e3:.2f}")
    return standing.name, standing.isa, *speed, *describe_ratio(standing.ratio), *describe_goal(standing)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    options = parse_arguments(arguments)
    if options.isa:
        isas.hold_to_avx2()
    report = run_races(options)
    print_linear_report(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()
