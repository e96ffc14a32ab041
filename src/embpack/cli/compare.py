"""embpack compare."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from embpack.cli import compare_arguments as arguments
from embpack.cli import show
from embpack.cli.json_output import describe_comparison
from embpack.cli.metric import load_metric
from embpack.cli.options import check_readers, split_bits, split_methods, split_rotations
from embpack.comparison.array import Comparison
from embpack.comparison.checkpoint import FileComparison, Total, count_rows, read_sample
from embpack.comparison.choice import PREFERENCES
from embpack.comparison.front import describe_metric, list_readers, name_variant
from embpack.comparison.report import is_report, make_csv, make_page, make_png, make_svg, require_matplotlib
from embpack.comparison.tables import compare_samples
from embpack.comparison.variants import make_variants
from embpack.formats import open_checkpoint
from embpack.formats.atomic import new_file
from embpack.readers import READERS
from embpack.rules import Rules, decide_all
from embpack.text import printable
from embpack.threads import get_num_threads, set_num_threads

# Columns of a terminal that has room for all columns of the table.
_WIDE = 135
# Columns that the user's own figure takes, in about.
_FIGURE = 20


@dataclass(frozen=True)
class _Output:
    """A file that is written beside what is printed."""

    option: str
    title: str
    path: Path
    make: Callable[[FileComparison], str | bytes]


def _check_outputs(written: Sequence[_Output], src: Path) -> None:
    """Refuse to write over the checkpoint, or two files over each other."""
    names: dict[Path, str] = {}
    for output in written:
        path = output.path
        if path.exists() and src.exists() and path.samefile(src):
            raise typer.BadParameter(
                f"{printable(path)} is the checkpoint; choose another name", param_hint=output.option
            )
        other = names.setdefault(path.resolve(), output.option)
        if other != output.option:
            raise typer.BadParameter(
                f"{printable(path)} is what {other} writes; choose another name", param_hint=output.option
            )


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
            callback=arguments.check_methods,
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
            help="Rotations, with commas between: none,hadamard.", show_default="none", callback=arguments.check_rotate
        ),
    ] = None,
    param_dtype: Annotated[
        str | None,
        typer.Option(
            help="Types of scales and biases, or of codebooks, with commas between: float16,float32.",
            show_default="float16; float32 for uniform rows at 8 bits, and for trellis",
            callback=arguments.check_param_dtype,
        ),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Measure this many rows of each larger table, evenly spread and packed as a table of their own; all "
            "or 0 measures every row, in memory.",
            callback=arguments.check_rows,
            show_default="20000; all with --metric",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Measure a figure of your own, too, such as an AUC: a function in a module of this folder, or an "
            "installed one, that makes a number of all tables by name. Takes all rows, in memory.",
            metavar="MODULE:FUNCTION",
            show_default=False,
        ),
    ] = None,
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
    svg: Annotated[
        Path | None, typer.Option(help="Also write the picture of loss against bytes as SVG.", show_default=False)
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Also write that picture as PNG; needs matplotlib (embpack[png]).", show_default=False),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Also write a row for each result of each table (docs/compare.md).", show_default=False),
    ] = None,
    readers: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            help=f"Recommend what this reads as it is: {', '.join(READERS)}; may be repeated.",
            metavar="READER",
            callback=check_readers,
        ),
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(
            help="What counts most. loss: the least loss in the bytes of 4 bits; size: the fewest bytes with no more "
            "loss than quantize's default; speed: the fastest lookups with about its bytes and loss.",
            metavar="|".join(PREFERENCES),
            callback=arguments.check_preference,
        ),
    ] = "loss",
    force: Annotated[
        bool, typer.Option("--force", help="Write over files that embpack compare did not write.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to use.", show_default="all CPUs, or OMP_NUM_THREADS")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure every method on your own tables: loss, bytes and speed; nothing is packed to a file.

    [dim]embpack compare model.safetensors --html report.html[/]
    """
    written = [
        _Output(option, title, path, make)
        for option, title, path, make in (
            ("--html", "The page with pictures", html, make_page),
            ("--svg", "The picture", svg, make_svg),
            ("--png", "The picture in pixels", png, make_png),
            ("--csv", "The table of all results", csv, make_csv),
        )
        if path is not None
    ]
    if written:
        show.go_on_unread()
    if threads is not None:
        set_num_threads(threads)
    try:
        variants = make_variants(
            split_methods(methods) if methods else None,
            split_bits(bits) if bits else None,
            param_dtype.split(",") if param_dtype else None,
            split_rotations(rotate) if rotate else None,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--bits") from None
    function = load_metric(metric) if metric else None
    if function and rows is not None and arguments.parse_rows(rows) is not None:
        raise typer.BadParameter(f"{rows} rows are a sample, but --metric takes whole tables", param_hint="--rows")
    most_rows = None if function else arguments.parse_rows(rows or "20000")
    rules = Rules(tuple(include or ()), tuple(exclude or ()))
    _check_outputs(written, src)
    if png is not None:
        require_matplotlib()
    # The places of files are taken before anything is measured: whoever cannot write there learns it at once.
    with open_checkpoint(src) as checkpoint, ExitStack() as stack:
        files = [
            stack.enter_context(new_file(output.path, lambda path: force or is_report(path))) for output in written
        ]
        decisions = [decision for decision in decide_all(checkpoint, rules) if decision.variant]
        times = len(variants) * (2 if function else 1)
        totals = {d.tensor.name: count_rows(d, most_rows) * times for d in decisions}
        with show.row_progress(totals, shown=not as_json) as progress:
            samples = (read_sample(decision, most_rows) for decision in decisions)
            tables, metrics = compare_samples(samples, variants, function, progress)
        report = FileComparison(
            src,
            tuple(tables),
            tuple(rules.include),
            tuple(rules.exclude),
            get_num_threads(),
            tuple(dict.fromkeys(readers or ())),
            prefer,
            metrics,
        )
        for output, file in zip(written, files, strict=True):
            made = output.make(report)
            file.write(made if isinstance(made, bytes) else made.encode())
    if as_json:
        show.print_json(describe_comparison(report))
    else:
        _print(report, written)


def _print(report: FileComparison, written: Sequence[_Output]) -> None:
    for table in report.tables:
        results = report.overall if len(report.tables) == 1 else table.results
        _print_results(f"{table.name}: {table.describe_sample()}", results, report)
        for item in table.skipped:
            show.output.print(f"left out: {item.variant}: {item.reason}", style="yellow", soft_wrap=True)
        show.output.print()
    if len(report.tables) > 1:
        _print_results(f"All {len(report.tables)} tables", report.overall, report)
        show.output.print()
    _print_choices(report)
    for output in written:
        show.output.print(f"{output.title} is {output.path}", style="dim", soft_wrap=True)


def _print_results(title: str, results: Sequence[Comparison], report: FileComparison) -> None:
    has_metric = report.metrics is not None and all(result.metric is not None for result in results)
    figure = [report.metrics.name, "change"] if report.metrics and has_metric else []
    # A narrow terminal has room for what there is to choose by.
    is_wide = show.output.width >= _WIDE + _FIGURE * has_metric
    details, more = (["parameters", "layout"], ["worst row", "its loss", "bytes/row"]) if is_wide else ([], [])
    others = ["lookups/s"] if figure and not is_wide else ["rows/s", "lookups/s", "read by"]
    columns = ["", "method", *details, "bits", "l2 loss", *figure, *more, "of fp32", *others]
    shown = show.start_table(title, columns, text_columns=2 + len(details))
    front = report.find_front(results)
    for result in sorted(results, key=lambda result: (result.bytes_per_row, result.loss)):
        where = f"{result.worst_table}[{result.worst_row}]" if isinstance(result, Total) else str(result.worst_row)
        rates = [show.rate(result.rows_per_second), show.rate(result.lookups_per_second), list_readers(result)]
        shown.add_row(
            "*" if result in front else "",
            *([result.variant.name, result.param_dtype, result.layout] if is_wide else [name_variant(result, results)]),
            str(result.bits),
            show.loss_text(result.loss),
            *describe_metric(result),
            *([where, show.loss_text(result.worst_row_loss), f"{result.bytes_per_row:.4g}"] if is_wide else []),
            f"{100 * result.share_of_float32:.2f} %",
            *(rates[1:2] if len(others) == 1 else rates),
        )
    show.output.print(shown)
    if report.metrics and has_metric:
        show.output.print(f"{report.metrics.name} of the float tables: {report.metrics.of_floats:.6g}", soft_wrap=True)


def _print_choices(report: FileComparison) -> None:
    recommended = report.recommendation
    if recommended is None:
        show.output.print(report.explain_nothing(), style="yellow")
        return
    show.output.print("Recommended:", style="bold")
    show.output.print(recommended.reason)
    show.output.print(f"  {report.write_command(recommended.result)}", soft_wrap=True)
    show.output.print()
    show.output.print("* least loss at its size; to pack so:", style="bold")
    for result in report.front:
        mark = "  (recommended)" if result == recommended.result else ""
        size = f"{100 * result.share_of_float32:.2f} % of float32, loss {show.loss_text(result.loss)}{mark}"
        show.output.print(size)
        show.output.print(f"  {report.write_command(result)}", soft_wrap=True)
