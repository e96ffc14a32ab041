"""What a run of python -m benchmarks.lookup found, as JSON and as a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.cores import Busyness
from benchmarks.harness import Standing
from benchmarks.report import RaceResult, describe_goal, describe_ratio, print_busyness, print_machine
from embpack.cli import show


@dataclass(frozen=True)
class LookupReport:
    """Everything that a run found; dataclasses.asdict makes it JSON."""

    machine: dict[str, Any]
    busyness: Busyness
    left_out: dict[str, str]
    races: list[RaceResult]


def print_lookup_report(report: LookupReport) -> None:
    """Print the machine, who is left out, and the races."""
    print_machine(report.machine, report.left_out)
    print_busyness(report.busyness)
    _print_races(report.races)


def _print_races(races: Iterable[RaceResult]) -> None:
    show.output.print()
    shown = show.start_table(
        "Sums of bags. M rows/s, µs a call: fastest round; ratio: our rate by theirs, median of rounds",
        ("contestant", "isa", "M rows/s", "µs", "ratio", "quartiles", "goal", ""),
        text_columns=2,
        left=("",),
        drop=("µs",),
    )
    for race in races:
        settings = race.settings
        case, d, size = settings["case"], settings["embedding_dim"], settings["table_bytes"] / 2**20
        shown.add_row("")
        shown.add_row(f"{case}, d = {d}, {size:.1f} MB, bags of {settings['bag_size']}, {settings['distribution']}")
        for standing in race.standings:
            shown.add_row(*_describe(standing))
    show.output.print(shown)


def _describe(standing: Standing) -> tuple[str, ...]:
    rate = standing.rows_per_second
    speed = (f"{rate / 1e6:.1f}", f"{standing.rows / rate * 1e6:.1f}")
    return standing.name, standing.isa, *speed, *describe_ratio(standing.ratio), *describe_goal(standing)
