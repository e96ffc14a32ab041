"""Reproduces Post-Training 4-bit Quantization on Embedding Tables (Guan et al. 2019): its numbers beside ours."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from embpack import MissingExtraError
from experiments.guan2019 import figure1, figure2, table1, table2, table3
from experiments.guan2019.report import Result, console
from experiments.guan2019.training import DIMS, Setting

EPILOG = """
Each command prints the paper's number, ours and the difference, and writes them to DIR/<command>.json; fig1 and
fig2 also draw DIR/<command>.png.

  fig1      loss of every method on normal values, by embedding_dim          half a minute
  fig2      time a row, NumPy references and kernels                         minutes
  table1    sums a second of embedding_bag, with PyTorch and FBGEMM          half a minute
  table2    loss of a trained table; trains a model for each embedding_dim   half an hour; needs PyTorch
  table3    log loss and size; in one command with table2 it trains once     half an hour; needs PyTorch
  all       everything

  python -m experiments.guan2019 all --small                    every command in its small setting
  python -m experiments.guan2019 table2 table3                  of the same models
  python -m experiments.guan2019 table3 --data day_0.gz         Criteo's logs in place of generated clicks:
      tab-separated lines of a label, 13 integers and 26 hexadecimal hashes (Kaggle's train.txt, or day_N of the
      Terabyte Click Logs, plain or gzipped); the first --examples lines are trained on, --held-out follow
  python -m experiments.guan2019 table2 --dims 32 --rows 1000   one width, small tables
"""

SMALL = Setting(rows=1000, examples=20_000, held_out=10_000)
FULL = Setting()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.guan2019",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="+", choices=[*COMMANDS, "all"], metavar="WHAT", help=f"{', '.join(COMMANDS)}, or all")
    add("--out", type=Path, default=Path("guan2019-results"), metavar="DIR", help="default: %(default)s")
    add("--small", action="store_true", help="fewer draws, rounds, widths and examples")
    add("--dims", type=int, nargs="+", metavar="D", help="embedding_dim (default: the paper's)")
    of_tables = parser.add_argument_group("table2 and table3")
    add = of_tables.add_argument
    add("--data", type=Path, metavar="PATH", help="a log in Criteo's format (default: generated clicks)")
    add("--rows", type=int, metavar="N", help=f"of each of the 26 tables (default: {FULL.rows}, small {SMALL.rows})")
    add("--examples", type=int, metavar="N", help=f"trained on (default: {FULL.examples}, small {SMALL.examples})")
    add("--held-out", type=int, metavar="N", help=f"measured on (default: {FULL.held_out}, small {SMALL.held_out})")
    options = parser.parse_args(arguments)
    for name in ("rows", "examples", "held_out"):
        value = getattr(options, name)
        if value is not None and value < 2:
            parser.error(f"--{name.replace('_', '-')} is {value}; give 2 or more")
    return options


def _run_figure1(options: argparse.Namespace) -> list[Result]:
    dims = options.dims or figure1.DIMS
    return [figure1.run(figure1.Sizes(dims, seeds=3) if options.small else figure1.Sizes(dims))]


def _run_figure2(options: argparse.Namespace) -> list[Result]:
    dims = options.dims or figure1.DIMS
    return [figure2.run(figure2.Sizes(dims, 0.01, 1.0) if options.small else figure2.Sizes(dims))]


def _run_table1(options: argparse.Namespace) -> list[Result]:
    dims = options.dims or table1.DIMS
    return [table1.run(table1.Sizes(dims, lookups=1024, rounds=3) if options.small else table1.Sizes(dims))]


def make_setting(options: argparse.Namespace) -> Setting:
    """What tables 2 and 3 train."""
    default = SMALL if options.small else FULL
    return Setting(
        tuple(options.dims or DIMS),
        options.rows or default.rows,
        options.examples or default.examples,
        options.held_out or default.held_out,
        options.data,
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], list[Result]]] = {
    "fig1": _run_figure1,
    "fig2": _run_figure2,
    "table1": _run_table1,
    "table2": lambda options: table2.run(make_setting(options)),
    "table3": lambda options: table3.run(make_setting(options)),
}


def _write(result: Result, folder: Path) -> None:
    """Print, write the JSON, draw what the paper draws."""
    result.print()
    console.print(f"{result.write(folder)} written", soft_wrap=True)
    if result.name not in ("fig1", "fig2"):
        return
    try:
        plots = import_module("experiments.guan2019.plots")
    except ImportError:
        console.print("no picture: that needs matplotlib: pip install '.[bench]'")
        return
    draw = plots.draw_figure1 if result.name == "fig1" else plots.draw_figure2
    path = folder / f"{result.name}.png"
    draw(result, path)
    console.print(f"{path} drawn", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name in COMMANDS if "all" in options.what else options.what:
            for result in COMMANDS[name](options):
                _write(result, options.out)
    except (MissingExtraError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
