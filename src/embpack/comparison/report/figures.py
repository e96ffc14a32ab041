"""Tables of figures, which scroll in a box of their own where there is no room for them."""

from collections.abc import Sequence

from embpack.comparison.array import Comparison
from embpack.comparison.checkpoint import Total
from embpack.comparison.front import describe_metric, list_readers
from embpack.comparison.report.subject import Subject, amount
from embpack.comparison.report.svg import element, escape

_COLUMNS = (
    *("method", "bits", "loss", "of float32", "bytes a row", "rows/s", "lookups/s", "read by"),
    *("layout", "worst row's loss", "worst row"),
)
_BRIEF = ("best at its size", "bits", "loss", "of float32")


def make_figures(subject: Subject) -> str:
    """Write all figures of all results, in a box that the keyboard can scroll."""
    rows = [
        _make_row([subject.name(result), *_list_figures(result)], is_best=result in subject.front)
        for result in subject.by_size
    ]
    table = _make_table(_list_columns(subject), rows)
    return element("div", table, class_="scroll", tabindex=0, role="group", aria_label=f"Figures, {subject.title}")


def make_brief_figures(subject: Subject) -> str:
    """Write what there is to choose by of the best at each size; a phone has room for it."""
    rows = []
    for result in subject.front:
        values = [str(result.bits), f"{result.loss:.5f}", f"{100 * result.share_of_float32:.2f}\u00a0%"]
        rows.append(_make_row([subject.name(result), *values], is_best=result == subject.recommended))
    return _make_table(_BRIEF, rows)


def _list_columns(subject: Subject) -> list[str]:
    name, bits, *others = _COLUMNS
    return [name, bits, *([subject.metric, "against float"] if subject.metric else []), *others]


def _list_figures(result: Comparison) -> list[str]:
    where = f"{result.worst_table} [{result.worst_row}]" if isinstance(result, Total) else f"{result.worst_row}"
    return [
        str(result.bits),
        *describe_metric(result),
        f"{result.loss:.5f}",
        f"{100 * result.share_of_float32:.2f}\u00a0%",
        f"{result.bytes_per_row:.4g}",
        amount(result.rows_per_second),
        amount(result.lookups_per_second),
        list_readers(result),
        result.layout,
        f"{result.worst_row_loss:.5f}",
        where,
    ]


def _make_row(values: Sequence[str], *, is_best: bool) -> str:
    name, *figures = values
    cells = element("th", escape(name)) + "".join(element("td", escape(value)) for value in figures)
    return element("tr", cells, **({"class_": "best"} if is_best else {}))


def _make_table(columns: Sequence[str], rows: Sequence[str]) -> str:
    head = element("tr", "".join(element("th", escape(column)) for column in columns))
    return element("table", element("thead", head) + element("tbody", "".join(rows)))
