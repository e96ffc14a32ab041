"""How often tables are looked up: what a row's error counts."""

from collections.abc import Mapping, Sequence
from numbers import Real

from embpack.rules import list_names, suggest

# Larger ones are taken for a mistake, and sums might overflow.
_MOST_COUNT = 1e18


def check_counts(access_counts: Mapping[str, float], names: Sequence[str]) -> None:
    """Check how often tables are looked up.

    Args:
        access_counts: by a table's name, how often rows of it are looked up in all; of every table, or empty.
        names: of the tables.

    Raises:
        TypeError: a count is no number.
        ValueError: a count is of something else, negative or not finite, or all are 0; or a table has none.
    """
    for name, number in access_counts.items():
        if name not in names:
            tables = list_names(names)
            raise ValueError(f"access_counts are of {name!r}, but the tables are {tables}; {suggest(name, names)}")
        what = f"access_counts[{name!r}] is"
        if isinstance(number, bool) or not isinstance(number, Real):
            kind = type(number).__name__
            raise TypeError(f"{what} of type {kind}; give a number: how often rows of the table are looked up in all")
        if not 0 <= number <= _MOST_COUNT:
            raise ValueError(f"{what} {number}; give a number from 0 to {_MOST_COUNT:g}")
    missing = [name for name in names if name not in access_counts]
    if access_counts and missing:
        raise ValueError(
            f"access_counts have {len(access_counts)} of the {len(names)} tables, and not {list_names(missing)}; give "
            "each table's count, 0 where no row is looked up, or none at all"
        )
    if access_counts and not any(access_counts.values()):
        raise ValueError("access_counts are all 0, so no error counts; leave them out, and each row counts the same")
