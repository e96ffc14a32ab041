"""embpack methods."""

import dataclasses
import inspect
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import typer

from embpack import _native
from embpack.cli import show
from embpack.cli.json_output import describe_methods
from embpack.cli.options import checking, complete_methods
from embpack.comparison.array import Comparison, Sample, compare_rows
from embpack.comparison.front import find_front, list_readers
from embpack.methods import DEFAULT_METHOD, METHODS, Method, parse_method
from embpack.samples import make_table
from embpack.tables import cut_end
from embpack.threads import get_num_threads
from embpack.variant import Variant

# What all methods are measured on: enough rows to tell them apart, few enough for the slowest ones.
_ROWS, _DIM = 2000, 64
# Bits that one method is measured at, those of them that it has.
_BITS = (2, 3, 4, 6, 8)


_check_method = checking(parse_method)


def methods(
    method: Annotated[
        str | None,
        typer.Argument(
            metavar="METHOD",
            help="One method, with its parameters: trellis, greedy:b=1000,r=0.5.",
            show_default="all",
            callback=_check_method,
            autocompletion=complete_methods,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the methods: what each is, its bytes, loss and speed, and who reads its rows; measured now, in seconds.

    [dim]embpack methods trellis[/]
    """
    variants = [Variant(name) for name in METHODS] if method is None else _list_bits(method)
    with show.row_progress({"methods": _ROWS * len(variants)}, shown=not as_json) as progress:
        results = _measure(variants, lambda _, rows: progress("methods", rows))
    if as_json:
        parameters = [_list_parameters(parse_method(result.method)) for result in results]
        show.print_json(describe_methods(_ROWS, _DIM, results, parameters))
    elif method is None:
        _print_all(results)
    else:
        _print_one(parse_method(method), results)


def _list_bits(method: str) -> list[Variant]:
    variants = [Variant(method, bits) for bits in _BITS]
    return [variant for variant in variants if variant.find_refusal() is None]


def _measure(variants: Sequence[Variant], progress: Any) -> Sequence[Comparison]:
    weight = make_table(np.random.default_rng(0), _ROWS, _DIM)
    return compare_rows(Sample.make("methods", weight, "float32", np.arange(_ROWS), _ROWS), variants, progress)[0]


def _list_parameters(method: Method) -> dict[str, Any]:
    """List the parameters; None is one that is found in each table."""
    values = dataclasses.asdict(method)
    return {name: None if _is_nan(value) else value for name, value in values.items()}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _print_all(results: Sequence[Comparison]) -> None:
    results = sorted(results, key=lambda result: result.loss)
    what = show.start_table("", ["method", "what it is"], text_columns=2, cut="what it is", shorten=cut_end)
    for result in results:
        default = "the default; " if result.method == DEFAULT_METHOD else ""
        what.add_row(result.method, default + METHODS[result.method].summary)
    show.output.print(what)
    show.output.print()
    _print_figures("method", results, [result.method for result in results])
    show.output.print("* least loss at its size. One method and its parameters: embpack methods NAME", style="dim")


def _print_figures(header: str, results: Sequence[Comparison], names: Sequence[str]) -> None:
    title = (
        f"Measured now: {_ROWS:,} rows of {_DIM} values that look trained; packed by "
        f"{show.count(get_num_threads(), 'thread')}, looked up by 1 ({_native.isa()})"
    )
    columns = ["", header, "bytes/row", "l2 loss", "rows/s", "lookups/s", "read by"]
    shown = show.start_table(title, columns, text_columns=2, left=["read by"], cut=header)
    front = find_front(results)
    for name, result in zip(names, results, strict=True):
        shown.add_row(
            "*" if result in front else "",
            name,
            f"{result.bytes_per_row:.4g}",
            show.loss_text(result.loss),
            show.rate(result.rows_per_second),
            show.rate(result.lookups_per_second),
            list_readers(result),
        )
    show.output.print(shown)


def _print_one(method: Method, results: Sequence[Comparison]) -> None:
    show.output.print(f"{method.name}: {method.summary}", style="bold")
    for paragraph in _read_paragraphs(type(method)):
        show.output.print()
        show.output.print(paragraph)
    show.output.print()
    parameters = _list_parameters(method)
    if parameters:
        columns = ["parameter", "value", "what it is"]
        shown = show.start_table("", columns, text_columns=3, cut="what it is", shorten=cut_end)
        for name, value in parameters.items():
            shown.add_row(name, "-" if value is None else str(value), explain_parameter(type(method), name))
        show.output.print(shown)
        show.output.print()
    _print_figures("bits", results, [str(result.bits) for result in results])
    show.output.print(f"embpack quantize SRC DST --method {results[0].method}", style="dim")


def _read_paragraphs(method: type[Method]) -> list[str]:
    """Read what a method's documentation says beside its parameters, a line for each paragraph."""
    text = re.sub(r"^(Class attributes|Attributes):\n(?: {4}.*\n?|\n)+", "", inspect.getdoc(method) or "", flags=re.M)
    return [" ".join(paragraph.split()).replace("``", "") for paragraph in re.split(r"\n{2,}", text.strip())]


def explain_parameter(method: type[Method], name: str) -> str:
    """Say what a parameter is, from the documentation of the method or of what it derives from."""
    for kind in method.__mro__:
        found = re.search(rf"^ {{4}}{name}: (.*(?:\n {{8}}.*)*)", inspect.cleandoc(kind.__doc__ or ""), re.M)
        if found:
            return " ".join(found[1].split())
    return ""
