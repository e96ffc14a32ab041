"""What an experiment found: the paper's number, ours and the difference, printed and as JSON."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.harness import describe_machine

# Where no terminal sets a width, lines are long enough for twelve columns.
console = Console(highlight=False, markup=False, emoji=False)
if not console.is_terminal:
    console = Console(highlight=False, markup=False, emoji=False, width=160)


@dataclass(frozen=True)
class Entry:
    """One number.

    Attributes:
        series: the line it belongs to.
        column: of the table that is printed: embedding_dim, or what else the experiment varies.
        paper: what the paper has; None where it has nothing.
        ours: what was measured; None where it was not, for which there is a note.
        flag: follows the difference in print.
        details: more of what was measured, for the JSON alone.
    """

    series: str
    column: int | str
    paper: float | None
    ours: float | None
    flag: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.paper is None or self.ours is None else self.ours - self.paper

    def as_json(self) -> dict[str, Any]:
        """All of it, flat."""
        numbers = {"paper": self.paper, "ours": self.ours, "difference": self.difference}
        flag = {"flag": self.flag} if self.flag else {}
        return {"series": self.series, "column": self.column, **numbers, **flag, **self.details}


@dataclass(frozen=True)
class Result:
    """Everything that one experiment found.

    Attributes:
        name: of its command.
        title: what the numbers are.
        settings: what they were measured with.
        entries: in the order of the table.
        notes: what a reader must know, and what was left out and why.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    entries: Sequence[Entry]
    notes: Sequence[str] = ()
    digits: int = 3

    def write(self, folder: Path) -> Path:
        """Write the JSON; returns where."""
        path = folder / f"{self.name}.json"
        value = {
            "experiment": self.name,
            "title": self.title,
            "settings": dict(self.settings),
            "machine": describe_machine(),
            "notes": list(self.notes),
            "entries": [entry.as_json() for entry in self.entries],
        }
        path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        return path

    def print(self) -> None:
        """Print a table with three lines a series."""
        columns = list(dict.fromkeys(entry.column for entry in self.entries))
        console.print(self.title, style="bold", soft_wrap=True)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("")
        table.add_column("")
        for column in columns:
            table.add_column(str(column), justify="right", no_wrap=True)
        for series in dict.fromkeys(entry.series for entry in self.entries):
            found = {entry.column: entry for entry in self.entries if entry.series == series}
            self._add_lines(table, series, [found.get(column) for column in columns])
        console.print(table)
        for note in self.notes:
            console.print(note, soft_wrap=True)

    def _add_lines(self, table: Table, series: str, entries: Sequence[Entry | None]) -> None:
        ours = self._show(entry.ours if entry else None for entry in entries)
        if any(entry and entry.paper is not None for entry in entries):
            table.add_row(series, "paper", *self._show(entry.paper if entry else None for entry in entries))
            table.add_row("", "ours", *ours)
            differences = self._show((entry.difference if entry else None for entry in entries), sign="+")
            flags = (entry.flag if entry else "" for entry in entries)
            table.add_row("", "difference", *map(str.__add__, differences, flags), style="dim")
        else:
            table.add_row(series, "ours", *ours)
        table.add_section()

    def _show(self, numbers: Iterable[float | None], sign: str = "") -> list[str]:
        return ["" if number is None else f"{number:{sign}.{self.digits}f}" for number in numbers]


def mean(numbers: Sequence[float]) -> float:
    """Return the mean, summed exactly."""
    return math.fsum(numbers) / len(numbers)
