"""What a run of python -m benchmarks.loss found, as JSON and as tables."""

from dataclasses import dataclass
from typing import Any

from benchmarks.losses import TableLosses
from benchmarks.report import print_machine
from embpack.cli import show


@dataclass(frozen=True)
class LossReport:
    """Everything that a run found; dataclasses.asdict makes it JSON."""

    machine: dict[str, Any]
    left_out: dict[str, str]
    tables: list[TableLosses]


def print_loss_report(report: LossReport) -> None:
    """Print the machine, who is left out, and a table for each table."""
    print_machine(report.machine, report.left_out)
    for table in report.tables:
        _print_losses(table)
        for way, reason in table.left_out.items():
            show.output.print(f"{way} is left out: {reason}")
    show.output.print()
    show.output.print(
        "* least loss at its size, of the rows that both packed. Ratio: of the losses of these rows to PyTorch's"
    )
    show.output.print("greedy search's, or FBGEMM's")


def _print_losses(table: TableLosses) -> None:
    title = f"{table.table}: {table.num_embeddings:,} x {table.embedding_dim}, by bytes a row"
    columns = ("", "library", "method", "bytes", "loss", f"of {table.common_rows:,} rows", "ratio")
    show.output.print()
    shown = show.start_table(title, columns, text_columns=3, cut="method")
    for own in table.losses:
        rows = "" if own.rows == table.num_embeddings else f", {own.rows:,} rows"
        ratio = "" if own.by_baseline is None else f"{own.by_baseline:.3f}"
        of_row = ("*" if own.on_front else "", own.library, own.method + rows)
        shown.add_row(*of_row, f"{own.bytes_per_row:.2f}", f"{own.loss:.5f}", f"{own.common_loss:.5f}", ratio)
    show.output.print(shown)
