"""What embpack compare writes, known again, so that a later run may replace it."""

from pathlib import Path

from embpack.comparison.report.rows import COLUMNS

# What the first bytes of a page, of a picture as SVG and as PNG, and of a table of rows have.
_HEAD_BYTES = 4096
_MARKS = (b'<meta name="generator" content="embpack ', b"<metadata>embpack ", b"Software\x00embpack ")


def is_report(path: Path) -> bool:
    """Whether embpack compare wrote the file at a path."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return any(mark in head for mark in _MARKS) or head.startswith(",".join(COLUMNS).encode())
