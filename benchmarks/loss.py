"""Loss at equal bytes: every method of embpack beside the quantizers of other libraries, on the same tables."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.progress import track

from benchmarks.harness import PACKAGES, describe_machine
from benchmarks.loss_report import LossReport, print_loss_report
from benchmarks.losses import TABLES, list_ours, make_tables, measure_table
from benchmarks.peers import load_quantizers
from embpack.cli import show

DIMS = (64,)
ROWS, QUICK_ROWS = 20_000, 1_000
EXACT_ROWS, QUICK_EXACT_ROWS = 2_000, 100
PEER_PACKAGES = ("torchao", "bitsandbytes", "onnxruntime", "faiss-cpu")

EPILOG = """
tables:
  demo          the first 20,000 rows of user_embedding.weight of embpack demo, d = 64
  normal        values of N(0, 1)
  laplace       values of a Laplace distribution

Everybody quantizes the same float32 rows; losses ||X - Q(X)|| / ||X|| are of all rows, in float64. Bytes are of
everything that is kept, by the number of rows: codes, scales, zero points, codebooks. They are counted as bits where
torchao keeps a code in a byte until a model is exported. The ratio is to the loss of PyTorch's greedy search on the
same rows. Two ways pack only the first rows: optimal:effort=exact takes 7 ms a row at d = 64, and exllamav3's codec 15
to 40 ms a row at d = 160, in NumPy. So one column has the losses of the rows that everybody packed.
Beside our methods at 4 bits there are trellis-coded rows of the bytes of each peer's.

Most peers pack and unpack by their own public functions, if they are installed: torch and fbgemm-gpu-cpu, which the
extra bench brings, onnxruntime and onnx, which the extra test brings, and three that no extra has:

  pip install --no-deps torchao bitsandbytes faiss-cpu            no dependency, or they would bring a PyTorch

All of them run on the CPU; torchao's Int4WeightOnlyConfig, which needs kernels for GPUs, is not compared. A row of
faiss' product quantizer is d / 2 codes of 8 bits, one a pair of values; its training takes a minute at d = 64.

Five are computed in NumPy by their formulas, and need nothing. They pack the tables of n-grams and of layers of
language models today:

  gguf          llama.cpp's blocks of 32 values; tests hold them to the package gguf
  vLLM          "nf4": rows of sixteen levels of a normal distribution
  MLX           groups of 32 and of 64 values with a scale and a bias; tests hold them to the package mlx
  FP8           E4M3 itself, as these tables are published: what packing adds its own loss to
  exllamav3     trellis codes of 2^16 states (benchmarks/ngram_codec.py), 128 rows at most. The mean is one for the
                table, where exllamav3 has one for each hash head

  python -m benchmarks.loss --quick                               a smoke test, in seconds
  python -m benchmarks.loss --tables demo --exact-rows 20000      README's figures, four minutes
  python -m benchmarks.loss --tables normal --dims 16 32 64 128   four widths
  python -m benchmarks.loss --tables normal --dims 160            rows of a table of n-grams, some minutes
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few rows")
    add("--tables", nargs="+", choices=TABLES, metavar="TABLE", default=list(TABLES), help="see below (default: all)")
    dims_help = f"values a row, of all but the demo's table (default: {' '.join(map(str, DIMS))})"
    add("--dims", type=int, nargs="+", metavar="D", default=DIMS, help=dims_help)
    exact_help = f"rows that optimal:effort=exact packs (default: {EXACT_ROWS:,})"
    add("--exact-rows", type=int, metavar="N", help=exact_help)
    add("--json", type=Path, metavar="PATH", help="write all figures there")
    options = parser.parse_args(arguments)
    for d in options.dims:
        if d < 4:
            parser.error(f"--dims: {d} values a row are too few, trellis-coded rows have 4 at least")
    if options.exact_rows is not None and options.exact_rows < 1:
        parser.error(f"--exact-rows: {options.exact_rows} is no positive number")
    return options


def run(options: argparse.Namespace) -> LossReport:
    """Measure what the options ask for."""
    exact_rows = options.exact_rows or (QUICK_EXACT_ROWS if options.quick else EXACT_ROWS)
    peers, left_out = load_quantizers()
    machine = describe_machine((*PACKAGES, *PEER_PACKAGES))
    tables = list(make_tables(options.tables, options.dims, QUICK_ROWS if options.quick else ROWS))
    found = [
        measure_table(name, weight, list_ours(exact_rows), peers)
        for name, weight in track(tables, "Quantizing", console=show.errors)
    ]
    return LossReport(machine, left_out, found)


def main() -> None:
    """Run, print, write."""
    options = parse_arguments()
    report = run(options)
    print_loss_report(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")


if __name__ == "__main__":
    main()
