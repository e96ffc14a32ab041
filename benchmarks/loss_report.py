"""What a run of python -m benchmarks.loss found, as JSON and as tables."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.losses import TableLosses
from benchmarks.report import make_table, print_machine


@dataclass(frozen=True)
class LossReport:
    """Everything that a run found; dataclasses.asdict makes it JSON."""

    machine: dict[str, Any]
    left_out: dict[str, str]
    tables: list[TableLosses]


def print_loss_report(report: LossReport) -> None:
    """Print the machine, who is left out, and a table for each table."""
    console = Console()
    print_machine(console, report.machine, report.left_out)
    for table in report.tables:
        console.print(_make_losses_table(table))
        for way, reason in table.left_out.items():
            console.print(f"{way} is left out: {reason}")
    console.print("* least loss at its size. Ratio: to PyTorch's greedy search, or FBGEMM")


def _make_losses_table(table: TableLosses) -> Table:
    title = f"{table.table}: {table.num_embeddings:,} x {table.embedding_dim}, by bytes a row"
    shown = make_table(title, ("", "library", "method"), ("bytes", "loss", "ratio"))
    for own in table.losses:
        rows = "" if own.rows == table.num_embeddings else f", {own.rows:,} rows"
        ratio = "" if own.by_baseline is None else f"{own.by_baseline:.3f}"
        of_row = ("*" if own.on_front else "", own.library, own.method + rows)
        shown.add_row(*of_row, f"{own.bytes_per_row:.2f}", f"{own.loss:.5f}", ratio)
    return shown
