"""Vectors times packed rows, an output layer's logits: speed beside torch.nn.Linear."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

import embpack
from benchmarks.harness import Contestant, Standing, Timing, Workload, describe_machine, race
from benchmarks.report import RaceResult, describe_ratio, print_machine
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
# Rows that are packed; a table repeats them, for speed is the same whatever its values.
PACKED_ROWS = 500
# Of our rate by theirs, by vectors.
GOALS = {1: 2.0, 64: 0.6}
PEERS = {"nn.Linear, float32": torch.float32, "nn.Linear, bfloat16": torch.bfloat16}
# What an answer may differ by, as a share of the largest: roundings of sums in float32, and of values to bfloat16.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6}

EPILOG = """
A layer has 50,000 rows, as many as a language model has words, and no bias. nn.Linear has the same values, unpacked, as
float32 and as bfloat16; answers are compared before anything is timed. Rows a second are those that are multiplied by
all vectors of a call.

  python -m benchmarks.linear --quick                        a smoke test, in seconds
  python -m benchmarks.linear --dims 1024 --tables 4-bits    some races only
"""


@dataclass(frozen=True)
class LinearReport:
    """Everything that a run found; dataclasses.asdict makes it JSON."""

    machine: dict[str, Any]
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
    add("--json", type=Path, metavar="PATH", help="write all figures there")
    return parser.parse_args(arguments)


def make_workloads(
    dims: Sequence[int], counts: Sequence[int], tables: Sequence[str], rows: int, threads: int
) -> Iterator[Workload[Any]]:
    """Make a race for each width, table and number of vectors."""
    rng = np.random.default_rng(0)
    for d in dims:
        weight = rng.standard_normal((PACKED_ROWS, d), dtype=np.float32)
        for name in tables:
            method, options = TABLES[name]
            table = embpack.quantize(weight, method, **options)
            table = replace(table, packed=np.tile(table.packed, (-(-rows // PACKED_ROWS), 1))[:rows], loss=None)
            layers = {peer: torch.from_numpy(table.dequantize()).to(dtype) for peer, dtype in PEERS.items()}
            for count in counts:
                vectors = rng.standard_normal((count, d), dtype=np.float32)
                yield _make_workload(name, table, layers, vectors, threads)


def _make_workload(
    name: str, table: embpack.PackedTable, layers: dict[str, torch.Tensor], vectors: NDArray[np.float32], threads: int
) -> Workload[Any]:
    count, rows = len(vectors), len(table)

    def make_ready() -> None:
        embpack.set_num_threads(threads)
        torch.set_num_threads(threads)

    def multiply_by(layer: torch.Tensor) -> Callable[[], torch.Tensor]:
        given = torch.from_numpy(vectors).to(layer.dtype)
        return lambda: torch.nn.functional.linear(given, layer)

    ours = Contestant(name, lambda: torch.from_numpy(table.linear(vectors)), rows, make_ready)
    others = [
        Contestant(peer, multiply_by(layer), rows, make_ready, GOALS.get(count)) for peer, layer in layers.items()
    ]
    settings = {"table": name, "embedding_dim": table.embedding_dim, "rows": rows, "vectors": count, "threads": threads}
    return Workload(settings, ours, others, find_other_products)


def find_other_products(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """Say by how much products differ, if it is more than their type explains."""
    largest = ours.abs().max().item()
    furthest = (ours - theirs.float()).abs().max().item()
    if furthest <= TOLERANCES[theirs.dtype] * largest:
        return None
    return f"products of up to {largest:.4g} are up to {furthest:.2g} apart"


def print_linear_report(report: LinearReport) -> None:
    """Print the machine and the races."""
    print_machine(report.machine, {})
    show.output.print()
    shown = show.start_table(
        "Vectors times all rows. M rows/s, ms a call: fastest round; ratio: our rate by theirs, median of rounds",
        ("contestant", "M rows/s", "ms", "ratio", "quartiles", "goal", ""),
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
    goal, verdict = "", ""
    if standing.goal is not None and standing.ratio is not None:
        goal, verdict = f"{standing.goal:g}", "met" if standing.ratio.median >= standing.goal else "missed"
    speed = (f"{rate / 1e6:.2f}", f"{standing.rows / rate * 1e3:.2f}")
    return standing.name, *speed, *describe_ratio(standing.ratio), goal, verdict


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    options = parse_arguments(arguments)
    timing = QUICK if options.quick else FULL
    timing = Timing(options.rounds or timing.rounds, timing.sample_seconds)
    dims = options.dims or (QUICK_DIMS if options.quick else DIMS)
    machine = describe_machine(("embpack", "numpy", "torch"))
    threads = options.threads or embpack.get_num_threads()
    rows = QUICK_ROWS if options.quick else ROWS
    workloads = make_workloads(dims, options.vectors, options.tables, rows, threads)
    total = len(dims) * len(options.tables) * len(options.vectors)
    races = [
        RaceResult(found.settings, race(found, timing))
        for found in track(workloads, "Racing", total=total, console=show.errors)
    ]
    report = LinearReport(machine, races)
    print_linear_report(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()
