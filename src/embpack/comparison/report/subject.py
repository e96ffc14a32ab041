"""What a picture or a table of figures is of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from embpack.comparison.array import Comparison
from embpack.comparison.front import name_variant

_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


@dataclass(frozen=True)
class Subject:
    """Results that are shown together.

    Attributes:
        title: of what they are.
        results: at least one.
        front: the best of them at each size, as find_front finds them.
        recommended: one of them, or None.
        metric: what the user's own figure is called, if the results have one.
    """

    title: str
    results: Sequence[Comparison]
    front: Sequence[Comparison]
    recommended: Comparison | None
    metric: str | None = None

    @property
    def by_size(self) -> list[Comparison]:
        """The results by rising bytes, and those of one size by rising loss."""
        return sorted(self.results, key=lambda result: (result.bytes_per_row, result.loss))

    def name(self, result: Comparison) -> str:
        """Name a result as briefly as tells it apart from the others."""
        return name_variant(result, self.results)


def describe(result: Comparison) -> str:
    """Say in a line what a result is."""
    return (
        f"{result.variant}: loss {result.loss:.5f}, {result.bytes_per_row:.4g} bytes a row "
        f"({100 * result.share_of_float32:.2f} % of float32)"
    )


def amount(value: float) -> str:
    """Write a number to three digits, with a unit's prefix; a space that does not break lies between."""
    one, unit = next((item for item in _UNITS if value >= item[0]), _UNITS[-1])
    return f"{value / one:.3g}\u00a0{unit}"


def distinguish(names: Sequence[str]) -> list[str]:
    """Cut from names of tables the words that all begin and end with, as long as something is left of each."""
    if len(names) < 2:
        return list(names)
    words = [re.split(r"(?<=[./_-])", name) for name in names]
    least = min(map(len, words)) - 1
    first = next((i for i in range(least) if len({each[i] for each in words}) > 1), least)
    last = next((i for i in range(least - first) if len({each[-1 - i] for each in words}) > 1), least - first)
    cut = ["".join(each[first : len(each) - last]) for each in words]
    return [f"{'…' if first else ''}{name}{'…' if last else ''}" for name in cut]
