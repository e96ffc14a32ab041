"""The page: one HTML file that shows what the methods come to on a checkpoint, and which to choose."""

import base64
import hashlib
from functools import partial
from importlib.resources import files

import embpack
from embpack.comparison.array import Comparison
from embpack.comparison.checkpoint import FileComparison, TableComparison
from embpack.comparison.front import describe_metric, list_readers
from embpack.comparison.report.bars import draw_losses, draw_row_losses
from embpack.comparison.report.details import ROW_NOTE, make_overview, make_tables
from embpack.comparison.report.figures import make_figures
from embpack.comparison.report.scatter import draw_error_against_bytes
from embpack.comparison.report.subject import Subject, amount
from embpack.comparison.report.svg import breakable, draw_twice, element, escape

_FILES = files("embpack.comparison.report")


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
        body += _make_all_tables(comparison)
    body += _make_skipped(comparison.tables) + _make_notes(comparison)
    style, script = _read("chart.css") + _read("page.css"), _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<meta name="generator" content="embpack {embpack.__version__}"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        f"<title>Packing {escape(name)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main><script>{script}</script></body></html>\n"
    )


def _read(name: str) -> str:
    return (_FILES / name).read_text()


def _paragraph(content: str, kind: str = "") -> str:
    return element("p", escape(content), **({"class_": kind} if kind else {}))


def _make_head(comparison: FileComparison, name: str) -> str:
    tables = comparison.tables
    rows = sum(table.num_embeddings for table in tables)
    said = f"{len(tables)} embedding tables, {rows:,} rows" if len(tables) > 1 else tables[0].describe_sample()
    size = sum(4 * table.num_embeddings * table.embedding_dim for table in tables)
    return element("h1", "Packing " + breakable(name)) + _paragraph(f"{said}; {amount(size)}B in float32.")


def _make_choice(comparison: FileComparison) -> str:
    recommendation = comparison.recommendation
    if recommendation is None:
        return element("section", _paragraph(comparison.explain_nothing()), class_="card")
    result = recommendation.result
    figures = {
        f"{result.bits} bits, {result.param_dtype} parameters": result.variant.name,
        "of float32": f"{100 * result.share_of_float32:.2f}\u00a0%",
        "normalized l2 loss": f"{result.loss:.5f}",
        **_describe_own(comparison, result),
        "rows packed a second": amount(result.rows_per_second),
        "rows looked up a second": amount(result.lookups_per_second),
        "read by": list_readers(result),
    }
    shown = "".join(
        element("div", element("dt", escape(label)) + element("dd", escape(value))) for label, value in figures.items()
    )
    return element(
        "section",
        element("h2", "Recommended")
        + element("dl", shown, class_="figures")
        + _write_code(comparison.write_command(result))
        + _paragraph(recommendation.reason, "note"),
        class_="card",
    )


def _describe_own(comparison: FileComparison, result: Comparison) -> dict[str, str]:
    """Name and write the user's own figure, if there is one."""
    if comparison.metrics is None:
        return {}
    figure, change = describe_metric(result)
    return {f"{comparison.metrics.name}, {change} against float": figure}


def _write_code(command: str) -> str:
    """Show a command, its lines broken at spaces alone; the keyboard can scroll it."""
    words = [element("span", escape(word)) if "-" in word else escape(word) for word in command.split(" ")]
    return element("code", " ".join(words), tabindex=0)


def _make_overall(comparison: FileComparison) -> str:
    """Show what to choose by: the only table, or all tables together."""
    if not comparison.overall:
        return ""
    is_one = len(comparison.tables) == 1
    title = comparison.tables[0].name if is_one else "all tables"
    metric = comparison.metrics.name if comparison.metrics else None
    subject = Subject(title, comparison.overall, comparison.front, comparison.recommended, metric)
    points = "A point is a method" if is_one else "A point is a method on all tables"
    said = (
        f"{points}, and says more under the pointer, on a tap, or at the keyboard, where arrows go on to the next. "
        "Down and left is better; green is the least loss at its size."
    )
    parts = [
        element("h2", "Loss against bytes") + _paragraph(said, "note"),
        draw_twice(partial(draw_error_against_bytes, subject)),
        element("h2", "The best at each size"),
        _paragraph("A click on a command selects all of it, ready to copy.", "note") + _make_sizes(comparison, subject),
        element("h2", "Loss by method"),
        _paragraph("Normalized l2 loss, each number of bits on its own scale; a cut bar is longer.", "note"),
        draw_twice(partial(draw_losses, subject)),
    ]
    if is_one:
        parts += [element("h2", "Loss of single rows") + _paragraph(ROW_NOTE, "note")]
        parts += [draw_twice(partial(draw_row_losses, subject))]
    parts += [element("h2", "Figures")]
    if comparison.metrics:
        of_floats = f"{comparison.metrics.name} of the float tables: {comparison.metrics.of_floats:.6g}."
        parts += [_paragraph(of_floats, "note")]
    return "".join(parts) + make_figures(subject)


def _make_sizes(comparison: FileComparison, subject: Subject) -> str:
    items = []
    for result in subject.front:
        size = f"{100 * result.share_of_float32:.2f}\u00a0% of float32"
        said = f" · {subject.name(result)}, {result.bits} bits · loss {result.loss:.5f}"
        mark = element("span", " · recommended", class_="chosen") if result == subject.recommended else ""
        line = element("span", escape(size), class_="size") + element("span", escape(said)) + mark
        items.append(element("li", line + _write_code(comparison.write_command(result))))
    return element("ol", "".join(items), class_="sizes")


def _make_all_tables(comparison: FileComparison) -> str:
    said = "A point is a table, packed as recommended." if comparison.recommended else ""
    return (
        element("h2", "The tables")
        + (_paragraph(said, "note") if said else "")
        + make_overview(comparison)
        + make_tables(comparison)
    )


def _make_skipped(tables: tuple[TableComparison, ...]) -> str:
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
        f"leaves, codebooks too. Rows a second are those that quantize packs in memory, with {threads}. Lookups a "
        "second are rows that one thread sums, in bags of 20 drawn at random from what was packed, which lie in the "
        "cache if they fit there. Both are of the machine that wrote this page. Read by: who else reads such rows as "
        "they are; all are PyTorch, FBGEMM, TorchRec and ONNX Runtime, and embpack reads any. embpack "
        f"{embpack.__version__}."
    )
    return element("h2", "How it was measured") + _paragraph(said, "note")
