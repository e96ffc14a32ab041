"""Bars of what is being worked on: one of everything, above those of single tables."""

import math
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column
from rich.text import Text

from embpack.tables import cut_middle, find_prefix
from embpack.text import printable

# Bars of tables that are shown at most, those of the last ones worked on.
_MOST_SHOWN = 4
# Columns of a terminal: from which width on there is a long bar; what stands beside the name and the bar.
_WIDE, _BESIDE = 80, 34
# Of how many seconds the rate is: workers tell of some seconds of work at a time, slow ones of a minute.
_RATE_SECONDS = 120.0


def rate(rows_per_second: float) -> str:
    """Rows a second, to three digits."""
    if not math.isfinite(rows_per_second):
        return "-"
    for unit, one in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rows_per_second >= one:
            return f"{rows_per_second / one:.3g} {unit}"
    return f"{rows_per_second:.3g}"


class _NameColumn(ProgressColumn):
    """Names, cut to the width that is left."""

    def __init__(self, width: int) -> None:
        super().__init__(Column(no_wrap=True))
        self._width = width

    def render(self, task: Task) -> Text:
        return Text(cut_middle(task.description, self._width))


class _PercentColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{int(task.percentage):3} %")


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{rate(task.speed)} rows/s" if task.speed else "", style="cyan")


class _TimeColumn(ProgressColumn):
    """Time left, of everything."""

    def render(self, task: Task) -> Text:
        seconds = task.time_remaining if task.fields["is_overall"] else None
        return Text("" if seconds is None else f"{timedelta(seconds=int(seconds))} left")


class RowBars:
    """Bars on a terminal: one of all tables with the time left, and one of each table that is being worked on.

    Attributes:
        progress: Rich's display of them, a context manager.
    """

    def __init__(self, console: Console, totals: Mapping[str, int]) -> None:
        bar_width = 20 if console.width >= _WIDE else 10
        self.progress = Progress(
            _NameColumn(max(console.width - bar_width - _BESIDE, 8)),
            BarColumn(bar_width, table_column=Column(no_wrap=True)),
            *(column(Column(no_wrap=True)) for column in (_PercentColumn, _RateColumn, _TimeColumn)),
            console=console,
            speed_estimate_period=_RATE_SECONDS,
            transient=True,
            disable=not console.is_terminal,  # otherwise an empty line is left
        )
        names = {name: printable(name) for name in totals}
        self._totals, self._prefix = totals, find_prefix(list(names.values()))
        [name, *others] = [*names.values()] or [""]
        self._overall = self.progress.add_task(
            self._count_done(0) if others else name, total=sum(totals.values()), is_overall=True
        )
        # The rate is of all rows from now on: otherwise the first ones would only say when they were done.
        self.progress.advance(self._overall, 0)
        self._done = Counter[str]()
        self._tasks: dict[str, TaskID] = {}
        self._current: list[str] = []

    def advance(self, name: str, rows: int) -> None:
        """Show that more rows of a table are done."""
        self._done[name] += rows
        if len(self._totals) > 1:
            self._show_table(name, rows)
            num_done = sum(done >= self._totals[each] for each, done in self._done.items())
            self.progress.update(self._overall, description=self._count_done(num_done))
        self.progress.advance(self._overall, rows)

    def _count_done(self, num_done: int) -> str:
        return f"{num_done} of {len(self._totals)} tables"

    def _show_table(self, name: str, rows: int) -> None:
        """Show the tables that were worked on last and are not done."""
        self._current = [each for each in self._current if each != name]
        if self._done[name] < self._totals[name]:
            self._current.append(name)
            if name in self._tasks:
                self.progress.advance(self._tasks[name], rows)
            else:
                short, total = printable(name).removeprefix(self._prefix), self._totals[name]
                self._tasks[name] = self.progress.add_task(short, total=total, completed=rows, is_overall=False)
        for each, task in self._tasks.items():
            self.progress.update(task, visible=each in self._current[-_MOST_SHOWN:])
