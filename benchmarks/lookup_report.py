"""What a run of python -m benchmarks.lookup found, as JSON and as a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Standing
from benchmarks.report import RaceResult, describe_ratio, make_table, print_machine


@dataclass(frozen=True)
class LookupReport:
    """Everything that a run found; dataclasses.asdict makes it JSON."""

    machine: dict[str, Any]
    left_out: dict[str, str]
    races: list[RaceResult]


def print_lookup_report(report: LookupReport) -> None:
    """Print the machine, who is left out, and the races."""
    console = Console()
    print_machine(console, report.machine, report.left_out)
    console.print(_make_races_table(report.races))


def _make_races_table(races: Iterable[RaceResult]) -> Table:
    table = make_table(
        "Sums of bags. M rows/s, µs a call: fastest round; ratio: our rate by theirs, median of rounds",
        ("case", "d", "MB", "bags", "contestant"),
        ("M rows/s", "µs", "ratio", "quartiles", "goal"),
    )
    table.add_column("", no_wrap=True)
    for race in races:
        settings = race.settings
        bags = f"{settings['bag_size']} {settings['distribution']}"
        size = f"{settings['table_bytes'] / 2**20:.1f}"
        for place, standing in enumerate(race.standings):
            of_race = ("", "", "", "") if place else (settings["case"], str(settings["embedding_dim"]), size, bags)
            table.add_row(*of_race, *_describe(standing))
        table.add_section()
    return table


def _describe(standing: Standing) -> tuple[str, ...]:
    rate = standing.rows_per_second
    speed = (f"{rate / 1e6:.1f}", f"{standing.rows / rate * 1e6:.1f}")
    return standing.name, *speed, *describe_ratio(standing.ratio), *_judge(standing)


def _judge(standing: Standing) -> tuple[str, str]:
    if standing.goal is None or standing.ratio is None:
        return "", ""
    return f"{standing.goal:g}", "met" if standing.ratio.median >= standing.goal else "missed"
