"""What each of several tables comes to, to be unfolded."""

import base64
import gzip

from embpack.comparison.checkpoint import FileComparison, TableComparison
from embpack.comparison.report.bars import draw_row_losses
from embpack.comparison.report.figures import make_brief_figures, make_figures
from embpack.comparison.report.scatter import draw_error_against_bytes, draw_tables
from embpack.comparison.report.subject import Subject
from embpack.comparison.report.svg import NARROW, breakable, draw_twice, element, escape

# More than this lies on the page compressed: some twelve tables.
_MOST_PLAIN = 400_000

ROW_NOTE = (
    "Loss of single rows: the line spans 1 to 99 % of them, the box the middle half, the stroke is the median and the "
    "ring the worst row. An arrow: the worst row lies beyond."
)


def make_tables(comparison: FileComparison) -> str:
    """Write what each table comes to.

    A page with few tables has all of it. One with many would be too large: it has the best at each size, and the rest
    compressed, which its script puts in their place.
    """
    subjects = [_make_subject(table, comparison) for table in comparison.tables]
    parts = [_make_part(subject) for subject in subjects]
    if sum(map(len, parts)) <= _MOST_PLAIN:
        shown, packed = parts, ""
    else:
        briefs = [make_brief_figures(subject) if subject.front else "" for subject in subjects]
        shown = [element("div", brief, data_part=i) for i, brief in enumerate(briefs)]
        packed = element("script", _compress(parts), type="application/gzip", id="parts")
    folded = zip(comparison.tables, subjects, shown, strict=True)
    return "".join(_fold(table, subject, content) for table, subject, content in folded) + packed


def _compress(parts: list[str]) -> str:
    """Put parts, which are one line each, where a script finds them; without the time, so that pages compare equal."""
    return base64.b64encode(gzip.compress("\n".join(parts).encode(), mtime=0)).decode()


def _make_subject(table: TableComparison, comparison: FileComparison) -> Subject:
    recommended = comparison.recommended
    same = next((result for result in table.results if recommended and result.variant == recommended.variant), None)
    return Subject(table.name, table.results, comparison.find_front(table.results), same)


def _make_part(subject: Subject) -> str:
    """Write all of a table; its pictures are drawn for a phone, and lie side by side on a screen."""
    pictures = draw_error_against_bytes(subject, NARROW), draw_row_losses(subject, NARROW)
    return (
        element("div", "".join(element("div", str(picture)) for picture in pictures), class_="pair")
        + element("p", escape(ROW_NOTE), class_="note")
        + make_figures(subject)
    )


def _fold(table: TableComparison, subject: Subject, content: str) -> str:
    same = subject.recommended
    loss = f" · loss {same.loss:.5f}" if same else ""
    size = element("span", escape(f"{table.num_embeddings:,} x {table.embedding_dim}{loss}"))
    summary = element("summary", element("b", breakable(table.name)) + " " + size)
    return element("details", summary + element("p", escape(f"{table.describe_sample()}."), class_="note") + content)


def make_overview(comparison: FileComparison) -> str:
    """Draw all tables, as recommended, on a screen and on a phone; nothing if there is no way for all of them."""
    recommended = comparison.recommended
    if recommended is None:
        return ""
    chosen = [
        (table, next(result for result in table.results if result.variant == recommended.variant))
        for table in comparison.tables
    ]
    return draw_twice(lambda width: draw_tables(chosen, width))
