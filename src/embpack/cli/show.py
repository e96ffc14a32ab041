"""What the commands print with."""

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.text import Text

from embpack.cli.progress import RowBars
from embpack.cli.progress import rate as rate  # callers say show.rate
from embpack.convert import Report
from embpack.estimate import Expectation
from embpack.planning import Plan
from embpack.rules import MIN_ROWS, Decision
from embpack.shard_writer import Progress as OnRows
from embpack.tables import find_terminal_width, fit_table
from embpack.text import printable
from embpack.threads import get_num_threads


class Printer(Console):
    """Prints each string as a line of plain text, or a cell of a table.

    Names of tensors and files, and what a file says of itself, do nothing to a terminal: nor do "[red]" and ":smile:".
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make what Rich prints, in tables too, of a string."""
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """Print to nowhere from now on."""
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


# Columns where no terminal sets a width: no line is folded, no name is cut.
_ENDLESS = 1_000_000
output = Printer(width=None if find_terminal_width() else _ENDLESS)
errors = Printer(stderr=True)


def explain(error: BaseException) -> str:
    """Say why a command failed: of an error of the system the file and the reason, without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def go_on_unread() -> None:
    """Do the work to its end though nobody may read what is printed: the command does more than print.

    Others end when their reader has enough (``| head -1``), as the programs of a shell do.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def print_error(message: object) -> None:
    """Print on stderr why a command failed, in one line."""
    errors.print(Text.assemble(("error:", "bold red"), f" {printable(message)}"), soft_wrap=True)


def print_traceback(error: BaseException) -> None:
    """Print on stderr where a command failed."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        errors.print(line, soft_wrap=True)


def print_warning(message: object, *_: object, **__: object) -> None:
    """Print on stderr what the library warns of, in one line: in place of warnings.showwarning."""
    errors.print(Text.assemble(("warning:", "bold yellow"), f" {printable(message)}"), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value for a program to read, in ASCII; of what does something to a terminal, dumps leaves DEL alone."""
    output.print(Text(json.dumps(value, indent=2, allow_nan=False).replace("\x7f", "\\u007f")), soft_wrap=True)


def count(number: int, thing: str) -> str:
    """Say how many there are: "1 other tensor", "2 other tensors"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def size(count: int) -> str:
    """Bytes for a person to read."""
    return decimal(count)


def share(after: int, before: int) -> str:
    """A size as a share of another."""
    return f"{100 * after / before:.2f} %" if before else "-"


def loss_text(loss: float | None) -> str:
    """A normalized l2 loss, to five decimals as in the paper."""
    return "unknown" if loss is None else f"{loss:.5f}"


def find_width(console: Console) -> int | None:
    """Columns of the terminal; None if there is none, where lines may be of any length."""
    return None if console.width == _ENDLESS else console.width


class ShownTable:
    """A table under a title, one line a row, as wide as the terminal at most."""

    def __init__(self, title: str, columns: Sequence[str], things: str | None, **layout: Any) -> None:
        self._title, self._columns, self._things, self._layout = title, columns, things, layout
        self._rows: list[Sequence[str]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row, a cell for each column; one cell alone is a line of its own, such as a heading."""
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitted = fit_table(
            self._columns, self._rows, find_width(console), has_names=self._things is not None, **self._layout
        )
        for line, style in (
            (printable(self._title), "bold"),
            (fitted.say_prefix(self._things or ""), "dim"),
            (fitted.header, "bold"),
            *((line, "") for line in fitted.lines),
            (fitted.say_left_out(), "dim"),
        ):
            if line or not style:
                yield Text(line, style)


def start_table(
    title: str,
    columns: Sequence[str],
    *,
    text_columns: int = 1,
    things: str | None = None,
    left: Sequence[str] = (),
    drop: Sequence[str] = (),
    cut: str | None = None,
    shorten: Callable[[str, int], str] | None = None,
) -> ShownTable:
    """Make a table under a line of its own, to add rows to and to print.

    Args:
        title: the line; "" for none.
        columns: headers.
        text_columns: so many of the first columns are text, flush left; the rest are numbers.
        things: what the names in the column that may be cut are of, "tables": where all begin alike, that is shown
            once; None if they are no names.
        left: more columns of text.
        drop: columns that may be left out where the terminal is narrow, the first one first.
        cut: the column whose cells may be cut there; None is the first one.
        shorten: cuts a cell to a width; None is cut_middle.
    """
    left = [*columns[:text_columns], *left]
    return ShownTable(title, columns, things, left=left, drop=drop, cut=cut, shorten=shorten)


@contextmanager
def row_progress(totals: dict[str, int], *, shown: bool) -> Iterator[OnRows]:
    """Show bars with rows a second and the time left, on stderr, where that is a terminal.

    Args:
        totals: rows of each table that are to be worked on.
        shown: False shows nothing anywhere.

    Yields:
        What is to be called with a table's name and how many more of its rows are done.
    """
    if not shown:
        yield lambda name, rows: None
        return
    bars = RowBars(errors, totals)
    with bars.progress:
        yield bars.advance


@contextmanager
def noted_interruption() -> Iterator[None]:
    """Print on stderr what is to be known when Ctrl-C ends the command."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        for note in getattr(interruption, "__notes__", ()):
            errors.print(note, soft_wrap=True)
        raise


def print_decisions(
    path: str,
    decisions: Sequence[Decision],
    left_out: Sequence[str],
    plan: Plan | None,
    file_sizes: tuple[int, int] | None = None,
) -> None:
    """Print which tensors are packed and which are not, and why, and what a plan makes of them, if there is one.

    With the sizes of the files that are read and would be written, both to the byte, also what each table takes.
    """
    sizes = () if file_sizes is None else ("method", "bits", "before", "after")
    columns = ["to pack", "shape", "type", *sizes, "why"]
    left, drop = (("method", "why"), ("type", "why", "shape", "before")) if sizes else (("why",), ("type", "why"))
    table = start_table(f"Plan for {path}", columns, text_columns=3, left=left, things="tables", drop=drop)
    for decision in decisions:
        if decision.variant:
            variant, before, after = decision.variant, decision.bytes_before, decision.bytes_after
            cells = (variant.name, str(variant.bits), f"{before:,}", f"{after:,}") if sizes else ()
            table.add_row(decision.tensor.name, _shape(decision), _describe_type(decision), *cells, decision.reason)
    output.print(table)
    for reason, names in _group_copied(decisions).items():
        output.print(f"copied: {_name_first(names)} ({reason})", style="dim")
    for note in left_out:
        output.print(f"left out: {note}", style="yellow")
    output.print(
        f"A table is a 2-D tensor of float32, float16, bfloat16, or FP8 or INT8 with scales, with at least {MIN_ROWS} "
        "rows, that gets smaller; its name says embedding (word_embeddings.weight, wte.weight, user_emb.weight, "
        "embed_tokens.weight), or the format says that it holds vectors. Change that with --include and --exclude.",
        style="dim",
    )
    if plan is not None:
        for line in ("", *plan.describe(find_width(output)).split("\n")):
            output.print(line)
    if file_sizes is not None:
        before, after = file_sizes
        output.print(f"file: {before:,} -> {after:,} bytes ({share(after, before)}); nothing was written", style="bold")


def print_expected(
    expected: Expectation, from_seconds: float = 0, workers: int | None = None, *, may_reuse: bool = False
) -> None:
    """Print how long packing will take, if that is known and so long, by whom, and what it takes on the disk.

    If rows may be copied from an earlier run, how many is not known, and the time is that of packing all.
    """
    if expected.seconds is not None and expected.seconds >= from_seconds:
        who = count(get_num_threads(), "thread") if workers is None else count(workers, "worker")
        what = "packing all rows" if may_reuse else "packing"
        output.print(
            f"{what} takes about {duration(expected.seconds)} with {who}, and {size(expected.file_bytes)} of disk",
            style="dim",
        )


def duration(seconds: float) -> str:
    """Say how long something takes, in two units at most: "1 s", "3 min", "2 h 10 min", "4 days 5 h"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} days {hours % 24} h"


def _group_copied(decisions: Sequence[Decision]) -> dict[str, list[str]]:
    """Names of the tensors that are copied, by the reason."""
    groups: dict[str, list[str]] = {}
    for decision in decisions:
        if decision.variant is None and not decision.is_left_out:
            groups.setdefault(decision.reason, []).append(decision.tensor.name)
    return groups


def _name_first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _describe_type(decision: Decision) -> str:
    """Say what a table's values are stored as, and in how many pieces if it lies in pieces."""
    tensor, stored_as = decision.tensor, decision.tensor.stored_as or decision.dtype
    return stored_as if tensor.num_pieces == 1 else f"{stored_as}, {count(tensor.num_pieces, 'piece')}"


def _shape(decision: Decision) -> str:
    return " x ".join(f"{n:,}" for n in decision.tensor.shape)


def print_report(path: str, report: Report) -> None:
    """Print what packing came to."""
    columns = ["table", "rows", "dim", "before", "after", "ratio", "l2 loss", "rows/s"]
    drop = ("dim", "before", "rows/s", "rows")
    has_reused = any(item.reused_rows is not None for item in report.tables)
    if has_reused:
        columns[2:2] = ["left alone", "packed"]
    table = start_table(f"Packed into {path}", columns, things="tables", drop=drop)
    for item in report.tables:
        table.add_row(
            item.name,
            f"{item.num_embeddings:,}",
            *_count_reused(item.reused_rows or 0, item.num_embeddings) * has_reused,
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
            output.print(f"{item.name}: {item.warning}", style="yellow")
    _print_anew({item.name: item.packed_anew for item in report.tables})
    before, after = report.file_bytes_before, report.file_bytes_after
    copied = f", {count(len(report.passed_through), 'other tensor')} copied" if report.passed_through else ""
    copied += f", {count(len(report.copied_files), 'other file')} copied" if report.copied_files else ""
    output.print(
        f"{size(before)} -> {size(after)} ({share(after, before)}) in {report.seconds:.1f} s{copied}",
        style="bold",
    )


def _count_reused(reused: int, rows: int) -> tuple[str, str]:
    return f"{reused:,}", f"{rows - reused:,}"


def _print_anew(reasons: Mapping[str, str | None]) -> None:
    """Print of which tables no row was left alone, and why, by the reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            groups.setdefault(reason, []).append(name)
    for reason, names in groups.items():
        output.print(f"all rows packed: {_name_first(names)} ({reason})", style="yellow")


def print_reused(decisions: Sequence[Decision], reused: Mapping[str, int]) -> None:
    """Print how many rows of tables would be left alone."""
    rows = {each.tensor.name: each.tensor.shape[0] for each in decisions if each.variant}
    for name, count in reused.items():
        left, packed = _count_reused(count, rows[name])
        output.print(f"{name}: {left} rows left alone, {packed} to pack")
