"""The page: one HTML file that shows what the methods come to on a checkpoint, and which to choose."""

import re
from collections.abc import Callable, Sequence

import embpack
from embpack.comparison.array import Comparison
from embpack.comparison.checkpoint import ABOUT, FileComparison, TableComparison, Total
from embpack.comparison.front import find_front, name_variant
from embpack.comparison.report.charts import draw_error_against_bytes, draw_losses, draw_row_losses
from embpack.comparison.report.style import CSS
from embpack.comparison.report.svg import element, escape
from embpack.methods import DEFAULT_METHOD
from embpack.variant import Variant

# The width of the text on a screen, and on a phone.
_WIDE, _NARROW = 760.0, 350.0
_WIDE_ONLY = (1, 4, 6, 7)
# What quantize does if nobody says how, and what most others do.
_DEFAULT, _PEER = (Variant(method, 4, "float16") for method in (DEFAULT_METHOD, "asym"))
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))

Draw = Callable[[Sequence[Comparison], Comparison | None, float], str]


def make_page(comparison: FileComparison) -> str:
    """Write the page, which is also well-formed XML and needs no network.

    Args:
        comparison: of the tables of a checkpoint.

    Returns:
        The whole file's text.
    """
    name = comparison.src.name or str(comparison.src.resolve())
    body = _make_head(comparison, name) + _make_choice(comparison) + _make_overall(comparison)
    if len(comparison.tables) > 1:
        body += "".join(_make_table(table, comparison) for table in comparison.tables)
    body += _make_skipped(comparison.tables) + _make_notes(comparison)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>"
        f"<title>Packing {escape(name)}</title><style>{CSS}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _paragraph(content: str, kind: str = "") -> str:
    return element("p", escape(content), **({"class_": kind} if kind else {}))


def _make_head(comparison: FileComparison, name: str) -> str:
    tables = comparison.tables
    rows = sum(table.num_embeddings for table in tables)
    said = f"{len(tables)} embedding tables, {rows:,} rows" if len(tables) > 1 else tables[0].describe_sample()
    size = sum(4 * table.num_embeddings * table.embedding_dim for table in tables)
    return element("h1", escape(f"Packing {name}")) + _paragraph(f"{said}; {_amount(size)}B in float32.")


def _amount(value: float) -> str:
    """Write a number to three digits, with a unit's prefix; a space that does not break lies between."""
    one, unit = next((item for item in _UNITS if value >= item[0]), _UNITS[-1])
    return f"{value / one:.3g}\u00a0{unit}"


def _make_choice(comparison: FileComparison) -> str:
    result = comparison.recommended
    if result is None:
        return element(
            "section", _paragraph("No way that was measured makes all of these tables smaller."), class_="card"
        )
    figures = {
        f"{result.bits} bits, {result.param_dtype} parameters": result.variant.name,
        "of float32": f"{100 * result.share_of_float32:.2f}\u00a0%",
        "normalized l2 loss": f"{result.loss:.5f}",
        "rows a second": _amount(result.rows_per_second),
    }
    shown = "".join(
        element("div", element("dt", escape(label)) + element("dd", escape(value))) for label, value in figures.items()
    )
    return element(
        "section",
        element("h2", "Recommended")
        + element("dl", shown, class_="figures")
        + _write_code(comparison.write_command(result))
        + _paragraph(_explain(result, comparison), "note"),
        class_="card",
    )


def _explain(result: Comparison, comparison: FileComparison) -> str:
    """Say why a result is recommended, beside what others would use."""
    default = f"quantize's default, {_DEFAULT.name} at {_DEFAULT.bits} bits"
    most = ABOUT * comparison.default_bytes
    if result.bytes_per_row > most:
        return f"It is the smallest of those that were measured; {default}, is smaller."
    more = f"at most {100 * (ABOUT - 1):.0f}\u00a0% more bytes"
    if result.variant == _DEFAULT:
        said = f"It is {default}. Of those measured that take {more}, it has the least loss"
    else:
        said = f"Of those measured that take {more} than {default}, it has the least loss"
    least = min(other.loss for other in comparison.overall if other.bytes_per_row <= most)
    said += "." if result.loss <= least else ", but for rotated rows that save less than 1\u00a0%."
    for variant in (_DEFAULT, _PEER):
        other = next((other for other in comparison.overall if other.variant == variant), None)
        if other is not None and other.loss > result.loss:
            saved = 100 * (1 - result.loss / other.loss)
            pace = _say_pace(result.rows_per_second / other.rows_per_second)
            said += f" Against {variant.name}, {saved:.1f}\u00a0% less loss; {pace}."
    return said


def _say_pace(pace: float) -> str:
    times = max(pace, 1 / pace)
    said = f"{times:,.0f}" if times >= 10 else f"{times:.1f}"
    return f"packing is {said} times as fast" if pace > 1 else f"packing takes {said} times as long"


def _write_code(command: str) -> str:
    """Show a command, its options not broken at their hyphens."""
    return element("code", re.sub(r"(?<= )--[a-z-]+", lambda found: element("span", found[0]), escape(command)))


def _make_overall(comparison: FileComparison) -> str:
    """Show what to choose by: the only table, or all tables together."""
    if not comparison.overall:
        return ""
    points = "A point is a method on all tables" if len(comparison.tables) > 1 else "A point is a method"
    return (
        element("h2", "Loss against bytes")
        + _paragraph(
            f"{points}, and says more under the pointer; down and left is better. Green is the least loss at its size.",
            "note",
        )
        + _make_pictures(draw_error_against_bytes, comparison.overall, comparison.recommended)
        + element("h2", "The best at each size")
        + _paragraph("A click on a command selects all of it, ready to copy.", "note")
        + _make_sizes(comparison)
        + _make_details(comparison.overall, comparison.recommended, "h2")
    )


def _make_pictures(draw: Draw, results: Sequence[Comparison], recommended: Comparison | None) -> str:
    """Draw twice: text that shrinks with its picture could not be read on a phone."""
    wide, narrow = (draw(results, recommended, width) for width in (_WIDE, _NARROW))
    return element("div", wide, class_="wide") + element("div", narrow, class_="narrow")


def _make_sizes(comparison: FileComparison) -> str:
    items = []
    for result in comparison.front:
        size = f"{100 * result.share_of_float32:.2f}\u00a0% of float32"
        said = f" · {name_variant(result, comparison.overall)}, {result.bits} bits · loss {result.loss:.5f}"
        mark = element("span", " · recommended", class_="mark") if result == comparison.recommended else ""
        line = element("span", escape(size), class_="size") + element("span", escape(said)) + mark
        items.append(element("li", line + _write_code(comparison.write_command(result))))
    return element("ol", "".join(items), class_="sizes")


def _make_details(results: Sequence[Comparison], recommended: Comparison | None, heading: str) -> str:
    parts = [
        element(heading, "Loss by method"),
        _paragraph("Normalized l2 loss, each number of bits on its own scale; a cut bar is longer.", "note"),
        _make_pictures(draw_losses, results, recommended),
    ]
    if not isinstance(results[0], Total):
        said = (
            "Normalized l2 loss of single rows: the line spans 1 to 99 % of them, the box the middle half, the stroke "
            "is the median and the ring the worst row. An arrow: the worst row lies beyond."
        )
        parts += [
            element(heading, "Loss of single rows"),
            _paragraph(said, "note"),
            _make_pictures(draw_row_losses, results, recommended),
        ]
    return "".join(parts) + element(heading, "Figures") + _make_figures(results)


def _make_figures(results: Sequence[Comparison]) -> str:
    front = find_front(results)
    columns = ["method", "layout", "bits", "loss", "bytes a row", "of float32", "worst row", "its loss", "rows/s"]
    rows = _make_row("th", columns)
    for result in sorted(results, key=lambda result: (result.bytes_per_row, result.loss)):
        where = f"{result.worst_table} [{result.worst_row}]" if isinstance(result, Total) else f"{result.worst_row}"
        values = [
            name_variant(result, results),
            result.layout,
            str(result.bits),
            f"{result.loss:.5f}",
            f"{result.bytes_per_row:.4g}",
            f"{100 * result.share_of_float32:.2f}\u00a0%",
            where,
            f"{result.worst_row_loss:.5f}",
            _amount(result.rows_per_second),
        ]
        rows += _make_row("td", values, "best" if result in front else "")
    return element("table", rows)


def _make_row(cell: str, values: Sequence[str], kind: str = "") -> str:
    """Write a row of a table; a phone has no room for the columns in _WIDE_ONLY."""
    cells = "".join(
        element(cell, escape(value), **({"class_": "wide-cell"} if i in _WIDE_ONLY else {}))
        for i, value in enumerate(values)
    )
    return element("tr", cells, **({"class_": kind} if kind else {}))


def _make_table(table: TableComparison, comparison: FileComparison) -> str:
    """Show one of several tables, to be unfolded."""
    recommended = comparison.recommended
    same = next((result for result in table.results if recommended and result.variant == recommended.variant), None)
    loss = f" · loss {same.loss:.5f} as recommended" if same else ""
    summary = element(
        "summary",
        escape(table.name) + " " + element("span", escape(f"{table.num_embeddings:,} x {table.embedding_dim}{loss}")),
    )
    content = (
        _paragraph(f"{table.describe_sample()}.", "note")
        + _make_pictures(draw_error_against_bytes, table.results, same)
        + _make_details(table.results, same, "h3")
    )
    return element("details", summary + content)


def _make_skipped(tables: Sequence[TableComparison]) -> str:
    skipped = [item for table in tables for item in table.skipped]
    if not skipped:
        return ""
    items = "".join(element("li", escape(f"{item.table}: {item.variant}: {item.reason}")) for item in skipped)
    return element("h2", "Left out") + element("ul", items, class_="note")


def _make_notes(comparison: FileComparison) -> str:
    threads = "1 thread" if comparison.threads == 1 else f"{comparison.threads} threads"
    said = (
        "Normalized l2 loss is ‖X - Q(X)‖ / ‖X‖, over all rows that were measured or over one row. Of a large table, "
        "evenly spread rows are measured and packed as a table of their own. Bytes a row count everything that packing "
        f"leaves, codebooks too. Rows a second are quantize's, in memory, with {threads} on the machine that wrote "
        f"this page. embpack {embpack.__version__}."
    )
    return element("h2", "How it was measured") + _paragraph(said, "note")
