"""What the commands print with."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from embpack.convert import Report
from embpack.rules import MIN_ROWS, Decision
from embpack.shard_writer import Progress as OnRows

# Names of tensors and files are shown as they are: "[red]" and ":smile:" in them mean nothing.
# If no terminal sets a width, lines are long enough for the names of tensors.
output = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """Print a value for a program to read."""
    output.print(json.dumps(value, indent=2, allow_nan=False), soft_wrap=True)


def size(count: int) -> str:
    """Bytes for a person to read."""
    return decimal(count)


def share(after: int, before: int) -> str:
    """A size as a share of another."""
    return f"{100 * after / before:.2f} %" if before else "-"


def loss_text(loss: float | None) -> str:
    """A normalized l2 loss, to five decimals as in the paper."""
    return "unknown" if loss is None else f"{loss:.5f}"


def rate(rows_per_second: float) -> str:
    """Rows a second, to three digits."""
    if not math.isfinite(rows_per_second):
        return "-"
    for unit, one in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rows_per_second >= one:
            return f"{rows_per_second / one:.3g} {unit}"
    return f"{rows_per_second:.3g}"


def start_table(title: str, columns: Sequence[str], *, text_columns: int = 1) -> Table:
    """Make a table under a line of its own, whose first columns are text and the rest numbers."""
    if title:
        output.print(title, style="bold", soft_wrap=True)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < text_columns else "right", overflow="fold")
    return table


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{rate(task.speed)} rows/s" if task.speed else "")


@contextmanager
def row_progress(totals: dict[str, int], *, shown: bool) -> Iterator[OnRows]:
    """Show a bar with rows a second and time left for each table, on stderr, while it is being worked on."""
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        # Where there is no terminal, bars would leave an empty line.
        disable=not (shown and errors.is_terminal),
    )
    with bars:
        tasks = {name: bars.add_task(name, total=total, start=False) for name, total in totals.items()}

        def advance(name: str, rows: int) -> None:
            bars.start_task(tasks[name])
            bars.advance(tasks[name], rows)

        yield advance


def print_decisions(path: str, decisions: Sequence[Decision], left_out: Sequence[str]) -> None:
    """Print which tensors are packed and which are not, and why."""
    table = start_table(f"Plan for {path}", ["to pack", "shape", "type", "why"], text_columns=4)
    for decision in decisions:
        if decision.variant:
            table.add_row(decision.tensor.name, _shape(decision), decision.dtype, decision.reason)
    output.print(table)
    for reason, names in _group_copied(decisions).items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        output.print(f"copied: {names[0]}{more} ({reason})", style="dim", soft_wrap=True)
    for note in left_out:
        output.print(f"left out: {note}", style="yellow", soft_wrap=True)
    output.print(
        f"A table is a 2-D float tensor of at least {MIN_ROWS} rows whose name ends in a word for embedding "
        "(word_embeddings.weight, wte.weight, user_emb.weight, embed_tokens.weight), or that the format says holds "
        "vectors. Change it with --include and --exclude.",
        style="dim",
    )


def _group_copied(decisions: Sequence[Decision]) -> dict[str, list[str]]:
    """Names of the tensors that are not packed, by the reason."""
    groups: dict[str, list[str]] = {}
    for decision in decisions:
        if decision.variant is None:
            groups.setdefault(decision.reason, []).append(decision.tensor.name)
    return groups


def _shape(decision: Decision) -> str:
    return " x ".join(f"{n:,}" for n in decision.tensor.shape)


def print_report(path: str, report: Report) -> None:
    """Print what packing came to."""
    columns = ["table", "rows", "dim", "before", "after", "ratio", "l2 loss", "rows/s"]
    table = start_table(f"Packed into {path}", columns)
    for item in report.tables:
        table.add_row(
            item.name,
            f"{item.num_embeddings:,}",
            str(item.embedding_dim),
            size(item.bytes_before),
            size(item.bytes_after),
            share(item.bytes_after, item.bytes_before),
            loss_text(item.loss),
            rate(item.rows_per_second),
        )
    output.print(table)
    for item in report.tables:
        if item.warning is not None:
            output.print(f"{item.name}: {item.warning}", style="yellow", soft_wrap=True)
    before, after = report.file_bytes_before, report.file_bytes_after
    copied = f", {len(report.passed_through)} other tensors copied" if report.passed_through else ""
    output.print(
        f"{size(before)} -> {size(after)} ({share(after, before)}) in {report.seconds:.1f} s{copied}",
        style="bold",
    )
