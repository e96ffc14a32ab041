"""Tables of text that fit a terminal: one line a row, never folded."""

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from embpack.text import printable

_ELLIPSIS, _GAP = "...", "  "
# Columns of a terminal that a cell which may be cut gets before another column is left out for it.
_LEAST = 24


@dataclass(frozen=True)
class FittedTable:
    """A table as it is printed.

    Attributes:
        header: the line above the rows.
        lines: of the rows.
        prefix: what all names begin with, which the lines leave out; "" for nothing.
        left_out: headers of columns that there is no room for.
    """

    header: str
    lines: tuple[str, ...]
    prefix: str
    left_out: tuple[str, ...]

    def say_prefix(self, things: str) -> str:
        """Say what all names begin with; "" if the lines have them whole."""
        return f"{things} under {self.prefix}" if self.prefix else ""

    def say_left_out(self) -> str:
        """Say which columns are left out; "" if none is."""
        return f"no room for: {', '.join(self.left_out)}" if self.left_out else ""

    def write(self, things: str) -> list[str]:
        """List all lines, those around the table too; things is what the rows are: "tables"."""
        lines = (self.say_prefix(things), self.header, *self.lines, self.say_left_out())
        return [line for line in lines if line]


def fit_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    *,
    left: Sequence[str] = (),
    drop: Sequence[str] = (),
    cut: str | None = None,
    shorten: Callable[[str, int], str] | None = None,
    has_names: bool = False,
) -> FittedTable:
    """Lay a table out in lines that are no longer than a terminal is wide.

    Where that is too narrow, columns are left out, and what remains too long is cut.

    Args:
        columns: headers.
        rows: a cell for each column; one cell alone is a line of its own, such as a heading.
        width: of the terminal; None leaves every cell whole.
        left: headers of columns that are flush left; numbers are flush right.
        drop: headers of columns that may be left out, the first one first.
        cut: the column whose cells may be cut; None is the first one.
        shorten: cuts a cell to a width; None is cut_middle.
        has_names: whether the cells of that column are names of which a common prefix may be left out.
    """
    cells = [list(map(printable, row)) for row in rows]
    full = [row for row in cells if len(row) == len(columns)]
    at = 0 if cut is None else columns.index(cut)
    prefix = find_prefix([row[at] for row in full]) if has_names and width is not None else ""
    for row in full:
        row[at] = row[at].removeprefix(prefix)
    widths = [max(map(cell_len, column)) for column in zip(columns, *full, strict=True)]
    kept = list(range(len(columns)))
    if width is not None:
        kept = _choose_columns(widths, width, at, list(map(columns.index, drop)))
        others = sum(widths[i] for i in kept if i != at) + len(_GAP) * (len(kept) - 1)
        widths[at] = min(widths[at], max(width - others, len(_ELLIPSIS) + 1))
    flush_left = [columns[i] in left for i in range(len(columns))]

    def write(row: Sequence[str]) -> str:
        line = row[0]
        if len(row) == len(columns):
            texts = [(shorten or cut_middle)(text, widths[i]) if i == at else text for i, text in enumerate(row)]
            line = _GAP.join(_pad(texts[i], widths[i], flush_left=flush_left[i]) for i in kept).rstrip()
        return line if width is None else cut_end(line, width)

    left_out = tuple(column for i, column in enumerate(columns) if i not in kept)
    return FittedTable(write(columns), tuple(map(write, cells)), prefix, left_out)


def _choose_columns(widths: Sequence[int], width: int, cut: int, drop: Sequence[int]) -> list[int]:
    """List the columns that fit, if the one that may be cut is, but not too much."""
    least = [min(natural, _LEAST) if i == cut else natural for i, natural in enumerate(widths)]
    kept = set(range(len(widths)))

    def fits(columns: set[int]) -> bool:
        return sum(least[i] for i in columns) + len(_GAP) * (len(columns) - 1) <= width

    for i in drop:
        if fits(kept):
            break
        kept.remove(i)
    # A wide column has perhaps made room for narrow ones.
    for i in reversed(drop):
        if fits(kept | {i}):
            kept.add(i)
    return sorted(kept)


def _pad(text: str, width: int, *, flush_left: bool) -> str:
    blanks = " " * (width - cell_len(text))
    return text + blanks if flush_left else blanks + text


def find_prefix(names: Sequence[str]) -> str:
    """Find what several names begin with, up to a dot; "" for nothing."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)  # all others lie between them, and begin alike
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    prefix = first[: first.rfind(".", 0, length) + 1]
    return "" if prefix in names else prefix


def cut_middle(text: str, width: int) -> str:
    """Cut a name to so many columns of a terminal, in the middle: names differ at their ends, mostly the last one."""
    if cell_len(text) <= width:
        return text
    room = width - len(_ELLIPSIS)
    tail = text[-max(2 * room // 3, 1) :]
    while cell_len(tail) > max(2 * room // 3, 1):
        tail = tail[1:]
    return cut_end(text, width - cell_len(tail)) + tail


def cut_end(text: str, width: int) -> str:
    """Cut a text to so many columns of a terminal, at its end."""
    if cell_len(text) <= width:
        return text
    text = text[:width]
    while cell_len(text) > max(width - len(_ELLIPSIS), 0):
        text = text[:-1]
    return text + _ELLIPSIS[:width]


def find_terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None if it is none, where lines may be of any length."""
    has_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if has_terminal else None
