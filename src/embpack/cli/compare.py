"""embpack compare."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from embpack.cli import compare_arguments as arguments
from embpack.cli import options, show
from embpack.cli.json_output import describe_comparison
from embpack.cli.metric import load_metric
from embpack.comparison.array import Comparison
from embpack.comparison.checkpoint import FileComparison, TableComparison, Total, count_rows, read_sample
from embpack.comparison.choice import PREFERENCES
from embpack.comparison.front import describe_metric, list_readers, name_variant
from embpack.comparison.metric import Metric, Metrics
from embpack.comparison.report import is_report, make_csv, make_page, make_png, make_svg, require_matplotlib
from embpack.comparison.tables import compare_samples
from embpack.formats import open_checkpoint
from embpack.formats.atomic import new_file
from embpack.formats.paths import is_remote, is_same
from embpack.readers import READERS
from embpack.rules import Decision, Rules, decide_all
from embpack.tables import find_prefix
from embpack.text import printable
from embpack.threads import get_num_threads, set_num_threads
from embpack.variant import Variant

# A group of options in the help.
_RECOMMENDED = "What is recommended"


@dataclass(frozen=True)
class _Output:
    """A file that is written beside what is printed."""

    option: str
    title: str
    path: Path
    make: Callable[[FileComparison], str | bytes]


def _list_outputs(html: Path | None, svg: Path | None, png: Path | None, csv: Path | None) -> list[_Output]:
    outputs = (
        ("--html", "The page with pictures", html, make_page),
        ("--svg", "The picture", svg, make_svg),
        ("--png", "The picture in pixels", png, make_png),
        ("--csv", "The table of all results", csv, make_csv),
    )
    return [_Output(option, title, path, make) for option, title, path, make in outputs if path is not None]


def _check_outputs(written: Sequence[_Output], src: Path) -> None:
    """Refuse to write over the checkpoint, or two files over each other."""
    names: dict[Path, str] = {}
    for output in written:
        path = output.path
        if not is_remote(src) and src.exists() and is_same(path, src):
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
        options.of_place("SRC", "A checkpoint, of the formats that embpack quantize reads, or its URI."),
    ],
    include: Annotated[
        list[str] | None,
        options.of_names("Also compare on tensors of such names; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        options.of_names("Never compare on tensors of such names; may be repeated."),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Measure so many rows of a larger table, evenly spread; all measures every row, in memory.",
            callback=arguments.check_rows,
            show_default="20000; all with --metric",
            rich_help_panel=options.WHAT,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Measure a figure of your own, too, such as an AUC: a function in a module of this folder, or an "
            "installed one, that makes a number of all tables by name. Takes all rows, in memory.",
            show_default=False,
            rich_help_panel=options.WHAT,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="METHODS",
            help="With commas between: greedy:b=1000,r=0.5,asym. [bold]embpack methods[/] lists all.",
            show_default="all; some also at other bits and rotated",
            callback=options.check_methods,
            autocompletion=options.complete_methods,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help="Bits a value: 2,4,8; for trellis also 3.5.",
            show_default="4",
            autocompletion=options.complete_bits,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    param_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPES",
            help="Scales, biases and codebooks: float16,float32.",
            show_default="float16; float32 for uniform rows at 8 bits, and for trellis",
            callback=arguments.check_param_dtype,
            autocompletion=options.complete_param_dtype,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    rotate: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Rotations: none,hadamard.",
            show_default="none",
            callback=arguments.check_rotate,
            autocompletion=options.complete_rotations,
            rich_help_panel=options.HOW,
        ),
    ] = None,
    readers: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="READER",
            help=f"Recommend what {', '.join(READERS[:-1])} or {READERS[-1]} reads as it is; may be repeated.",
            callback=options.check_readers,
            autocompletion=options.complete_readers,
            show_default=False,
            rich_help_panel=_RECOMMENDED,
        ),
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(
            metavar="|".join(PREFERENCES),
            help="loss: the least in the bytes of 4 bits; size: the fewest bytes with no more loss than quantize's "
            "default; speed: the fastest lookups with about its bytes and loss.",
            callback=arguments.check_preference,
            autocompletion=options.complete_preference,
            rich_help_panel=_RECOMMENDED,
        ),
    ] = "loss",
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a page with pictures, which needs no network.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the picture of loss against bytes.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The same in pixels; needs matplotlib.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write a row for each result of each table.",
            show_default=False,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Write over files that embpack compare did not write.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    as_json: options.AsJson = False,
    threads: options.Threads = None,
) -> None:
    """Measure every method on your own tables: loss, bytes and speed; nothing is packed to a file.

    [dim]embpack compare model.safetensors --html report.html[/]
    """
    written = _list_outputs(html, svg, png, csv)
    if force and not written:
        raise typer.BadParameter("goes with --html, --svg, --png or --csv", param_hint="--force")
    if written:
        show.go_on_unread()
    if threads is not None:
        set_num_threads(threads)
    variants = arguments.list_variants(methods, bits, param_dtype, rotate)
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
        tables, metrics = _measure(decisions, variants, most_rows, function, shown=not as_json)
        report = FileComparison(
            src,
            tables,
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


def _measure(
    decisions: Sequence[Decision],
    variants: Sequence[Variant],
    most_rows: int | None,
    metric: Metric | None,
    *,
    shown: bool,
) -> tuple[tuple[TableComparison, ...], Metrics | None]:
    times = len(variants) * (1 if metric is None else 2)
    totals = {decision.tensor.name: count_rows(decision, most_rows) * times for decision in decisions}
    with show.row_progress(totals, shown=shown) as progress:
        samples = (read_sample(decision, most_rows) for decision in decisions)
        tables, metrics = compare_samples(samples, variants, metric, progress)
    return tuple(tables), metrics


def _print(report: FileComparison, written: Sequence[_Output]) -> None:
    names = [printable(table.name) for table in report.tables]
    prefix = "" if show.find_width(show.output) is None else find_prefix(names)
    if prefix:
        show.output.print(f"tables under {prefix}", style="dim")
    for name, table in zip(names, report.tables, strict=True):
        results = report.overall if len(report.tables) == 1 else table.results
        _print_results(f"{name.removeprefix(prefix)}: {table.describe_sample()}", results, report)
        for item in table.skipped:
            show.output.print(f"left out: {item.variant}: {item.reason}", style="yellow")
        show.output.print()
    if len(report.tables) > 1:
        _print_results(f"All {len(report.tables)} tables", report.overall, report)
        show.output.print()
    _print_choices(report)
    for output in written:
        show.output.print(f"{output.title} is {output.path}", style="dim")


def _print_results(title: str, results: Sequence[Comparison], report: FileComparison) -> None:
    has_metric = report.metrics is not None and all(result.metric is not None for result in results)
    figure = [report.metrics.name, "change"] if report.metrics and has_metric else []
    columns = ["", "method", "parameters", "layout", "bits", "l2 loss", *figure, "worst row", "its loss", "bytes/row"]
    columns += ["of fp32", "rows/s", "lookups/s", "read by"]
    drop = ("worst row", "its loss", "layout", "parameters", "bytes/row", "read by", "rows/s")
    shown = show.start_table(title, columns, text_columns=4, left=["read by"], drop=drop, cut="method")
    front = report.find_front(results)
    for result in sorted(results, key=lambda result: (result.bytes_per_row, result.loss)):
        where = f"{result.worst_table}[{result.worst_row}]" if isinstance(result, Total) else str(result.worst_row)
        rates = [show.rate(result.rows_per_second), show.rate(result.lookups_per_second), list_readers(result)]
        shown.add_row(
            "*" if result in front else "",
            name_variant(result, results),
            result.param_dtype,
            result.layout,
            str(result.bits),
            show.loss_text(result.loss),
            *(describe_metric(result) if has_metric else []),
            where,
            show.loss_text(result.worst_row_loss),
            f"{result.bytes_per_row:.4g}",
            f"{100 * result.share_of_float32:.2f} %",
            *rates,
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
