"""embpack compare."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from embpack.cli import show
from embpack.comparison.array import QUANTILES, Comparison
from embpack.comparison.checkpoint import FileComparison, Total, compare_table, count_rows
from embpack.comparison.front import find_front, list_readers, name_variant
from embpack.comparison.report import make_page
from embpack.comparison.variants import make_variants
from embpack.formats import open_checkpoint
from embpack.formats.atomic import new_file
from embpack.rules import Rules, decide_all
from embpack.text import printable
from embpack.threads import get_num_threads, set_num_threads
from embpack.variant import parse_bits

# Columns of a terminal that has room for all columns of the table.
_WIDE = 135


def _split_methods(text: str) -> list[str]:
    """Split "greedy:b=1000,r=0.5,asym": a comma also lies between the parameters of one method."""
    methods: list[str] = []
    for part in text.split(","):
        if methods and ":" in methods[-1] and "=" in part and ":" not in part:
            methods[-1] += f",{part}"
        else:
            methods.append(part)
    return methods


def _check_methods(text: str | None) -> str | None:
    if text is not None:
        try:
            make_variants(_split_methods(text))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return text


def _check_param_dtype(text: str | None) -> str | None:
    if text is not None:
        try:
            make_variants(param_dtype=text.split(","))
        except ValueError:
            raise typer.BadParameter(f"{text!r}; choose float16, float32 or float16,float32") from None
    return text


def _split_rotations(text: str) -> list[str | None]:
    return [None if part == "none" else part for part in text.split(",")]


def _check_rotate(text: str | None) -> str | None:
    if text is not None:
        try:
            make_variants(rotate=_split_rotations(text))
        except ValueError:
            raise typer.BadParameter(f"{text!r}; choose none, hadamard or none,hadamard") from None
    return text


def _parse_rows(text: str) -> int | None:
    """Read the number of rows; None is all."""
    if text in ("all", "0"):
        return None
    return int(text)


def _check_rows(text: str) -> str:
    if text != "all" and not (text.isascii() and text.isdigit()):
        raise typer.BadParameter(f"{text!r}; give a number of rows, or all")
    return text


def compare(
    src: Annotated[
        Path,
        typer.Argument(help="A checkpoint, of the formats that embpack quantize reads.", show_default=False),
    ],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, with commas between: greedy,asym or greedy:b=1000,r=0.5,asym.",
            show_default="all; asym, optimal and trellis also at other bits, optimal and trellis also rotated",
            callback=_check_methods,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Bits a value, with commas between: 2,4,8, for trellis also 3.5.", show_default="4", metavar="NUMBERS"
        ),
    ] = None,
    rotate: Annotated[
        str | None,
        typer.Option(
            help="Rotations, with commas between: none,hadamard.", show_default="none", callback=_check_rotate
        ),
    ] = None,
    param_dtype: Annotated[
        str | None,
        typer.Option(
            help="Types of scales and biases, or of codebooks, with commas between: float16,float32.",
            show_default="float16; float32 for uniform rows at 8 bits, and for trellis",
            callback=_check_param_dtype,
        ),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(
            help="Measure this many rows of each larger table, evenly spread and packed as a table of their own; all "
            "or 0 measures every row, in memory.",
            callback=_check_rows,
        ),
    ] = "20000",
    include: Annotated[
        list[str] | None,
        typer.Option(help="Also compare on tensors whose name matches this glob; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Never compare on tensors whose name matches this glob; may be repeated."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page with pictures, one file that needs no network.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to use.", show_default="all CPUs, or OMP_NUM_THREADS")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure every method on your own tables: loss, bytes and speed; nothing is packed to a file.

    [dim]embpack compare model.safetensors --html report.html[/]
    """
    if html is not None:
        show.go_on_unread()
    if threads is not None:
        set_num_threads(threads)
    try:
        variants = make_variants(
            _split_methods(methods) if methods else None,
            [parse_bits(part) for part in bits.split(",")] if bits else None,
            param_dtype.split(",") if param_dtype else None,
            _split_rotations(rotate) if rotate else None,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--bits") from None
    most_rows = _parse_rows(rows)
    rules = Rules(tuple(include or ()), tuple(exclude or ()))
    if html is not None and html.exists() and src.exists() and html.samefile(src):
        raise typer.BadParameter(f"{printable(html)} is the checkpoint; choose another name", param_hint="--html")
    # The page's place is taken before anything is measured: whoever cannot write there learns it at once.
    with open_checkpoint(src) as checkpoint, nullcontext() if html is None else new_file(html) as page:
        decisions = [decision for decision in decide_all(checkpoint, rules) if decision.variant]
        totals = {d.tensor.name: count_rows(d, most_rows) * len(variants) for d in decisions}
        with show.row_progress(totals, shown=not as_json) as progress:
            tables = [compare_table(decision, variants, most_rows, progress) for decision in decisions]
        report = FileComparison(src, tuple(tables), tuple(rules.include), tuple(rules.exclude), get_num_threads())
        if page is not None:
            page.write(make_page(report).encode())
    if as_json:
        show.print_json(_as_json(report))
    else:
        _print(report, html)


def _as_json(report: FileComparison) -> dict[str, Any]:
    recommended = report.recommended
    overall = report.overall if len(report.tables) > 1 else ()
    return {
        "source": str(report.src),
        "threads": report.threads,
        "tables": [
            {
                "name": table.name,
                "num_embeddings": table.num_embeddings,
                "embedding_dim": table.embedding_dim,
                "dtype": table.dtype,
                "rows_measured": table.rows_measured,
            }
            for table in report.tables
        ],
        "quantiles": QUANTILES,
        "results": [dataclasses.asdict(result) for table in report.tables for result in table.results],
        "total": [dataclasses.asdict(result) for result in overall],
        "skipped": [dataclasses.asdict(item) for table in report.tables for item in table.skipped],
        "front": [_choice_json(report, result) for result in report.front],
        "recommended": None if recommended is None else _choice_json(report, recommended),
    }


def _choice_json(report: FileComparison, result: Comparison) -> dict[str, Any]:
    return {**dataclasses.asdict(result.variant), "command": report.write_command(result)}


def _print(report: FileComparison, html: Path | None) -> None:
    for table in report.tables:
        _print_results(f"{table.name}: {table.describe_sample()}", table.results)
        for item in table.skipped:
            show.output.print(f"left out: {item.variant}: {item.reason}", style="yellow", soft_wrap=True)
        show.output.print()
    if len(report.tables) > 1:
        _print_results(f"All {len(report.tables)} tables", report.overall)
        show.output.print()
    _print_choices(report)
    if html is not None:
        show.output.print(f"The page with pictures is {html}", style="dim", soft_wrap=True)


def _print_results(title: str, results: Sequence[Comparison]) -> None:
    # A narrow terminal has room for what there is to choose by.
    is_wide = show.output.width >= _WIDE
    details, more = (["parameters", "layout"], ["worst row", "its loss", "bytes/row"]) if is_wide else ([], [])
    columns = ["", "method", *details, "bits", "l2 loss", *more, "of fp32", "rows/s", "lookups/s", "read by"]
    shown = show.start_table(title, columns, text_columns=2 + len(details))
    front = find_front(results)
    for result in sorted(results, key=lambda result: (result.bytes_per_row, result.loss)):
        where = f"{result.worst_table}[{result.worst_row}]" if isinstance(result, Total) else str(result.worst_row)
        shown.add_row(
            "*" if result in front else "",
            *([result.variant.name, result.param_dtype, result.layout] if is_wide else [name_variant(result, results)]),
            str(result.bits),
            show.loss_text(result.loss),
            *([where, show.loss_text(result.worst_row_loss), f"{result.bytes_per_row:.4g}"] if is_wide else []),
            f"{100 * result.share_of_float32:.2f} %",
            show.rate(result.rows_per_second),
            show.rate(result.lookups_per_second),
            list_readers(result),
        )
    show.output.print(shown)


def _print_choices(report: FileComparison) -> None:
    recommended = report.recommended
    if recommended is None:
        show.output.print("No way that was measured makes all of these tables smaller.", style="yellow")
        return
    show.output.print("* least loss at its size; to pack so:", style="bold")
    for result in report.front:
        mark = "  (recommended)" if result == recommended else ""
        size = f"{100 * result.share_of_float32:.2f} % of float32, loss {show.loss_text(result.loss)}{mark}"
        show.output.print(size)
        show.output.print(f"  {report.write_command(result)}", soft_wrap=True)
